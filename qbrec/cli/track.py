"""`qbrec track`: send to MLflow what it missed."""

from __future__ import annotations

import click

from qbrec.cli.options import config_options


@click.command()
@config_options
@click.option("--again", is_flag=True, help="Forget what was sent and write the run anew.")
def track(config_path: str | None, overrides: tuple[str, ...], again: bool) -> None:
    """Replay a run's metrics, parameters and files into MLflow, as far as they are not there.

    \b
    Example:
      qbrec track --config shop.yaml
    """
    from qbrec.config import load_config
    from qbrec.run_record import run_directory
    from qbrec.tracking.replay import replay

    config = load_config(config_path, overrides=overrides)
    state = replay(config, run_directory(config), again=again)
    for refusal in state.refused:
        click.echo(f"MLflow refused: {refusal}", err=True)
    click.echo(f"MLflow has the whole run: {state.parent.run_id}")
