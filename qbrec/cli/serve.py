"""`qbrec serve`: a registered model over HTTP."""

from __future__ import annotations

import click

from qbrec.cli.options import config_options


@click.command()
@config_options
@click.option("--alias", default="champion", show_default=True, help="Alias to serve; followed as it moves.")
@click.option("--version", "number", metavar="N", help="Serve this version, whatever aliases do.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True)
@click.option(
    "--replicas", type=click.IntRange(min=1), default=1, show_default=True, help="Processes that rank."
)
def serve(
    config_path: str | None,
    overrides: tuple[str, ...],
    alias: str,
    number: str | None,
    host: str,
    port: int,
    replicas: int,
) -> None:
    """Serve a registered model over HTTP until SIGTERM.

    When the alias moves (`qbrec promote`, `qbrec rollback`), the new version is loaded beside the old one and
    takes its place; no request fails meanwhile. There is no access control: put a gateway in front of it.

    \b
    Example:
      qbrec serve --config shop.yaml --port 8000
      curl -s localhost:8000/v1/recommend -d '{"histories": [["A1", "A7"]], "k": 5}'
    """
    from qbrec.config import load_config
    from qbrec.serving.service import run_service
    from qbrec.serving.versions import model_uri

    config = load_config(config_path, overrides=overrides)
    uri = model_uri(config.registry.model_name, alias=alias, number=number)
    run_service(
        config, uri, host=host, port=port, replicas=replicas, say=lambda text: click.echo(text, err=True)
    )
