"""`qbrec register|promote|rollback`: from a finished run to the model that serves."""

from __future__ import annotations

from pathlib import Path

import click

from qbrec.cli.options import config_options


@click.command()
@config_options
def register(config_path: str | None, overrides: tuple[str, ...]) -> None:
    """Register the model of a finished run as a new version with the alias @challenger.

    What `qbrec append` added since is part of it: new items are served, retired ones are not.

    \b
    Example:
      qbrec register --config shop.yaml
    """
    from qbrec.config import load_config
    from qbrec.pipeline import finished_artifacts
    from qbrec.registry.versions import register as register_run
    from qbrec.run_generations import with_generations
    from qbrec.run_record import run_directory

    config = load_config(config_path, overrides=overrides)
    artifacts = with_generations(config, finished_artifacts(config))
    version = register_run(config, run_directory(config), artifacts)
    click.echo(f"models:/{config.registry.model_name}@challenger is version {version}")


@click.command()
@config_options
@click.option("--version", "number", help="Version to promote; default: @challenger.")
@click.option(
    "--gate",
    "gate_file",
    type=click.Path(exists=True, dir_okay=False),
    help="YAML gate, e.g. mlflow/gates/default.yaml.",
)
def promote(
    config_path: str | None, overrides: tuple[str, ...], number: str | None, gate_file: str | None
) -> None:
    """Judge a version by the gate and, if it passes, give it @champion.

    The champion until then becomes @previous. A gate that says no ends with exit code 6 and leaves all
    aliases.

    \b
    Example:
      qbrec promote --config shop.yaml --gate mlflow/gates/default.yaml
    """
    from qbrec.config import load_config
    from qbrec.registry.gate import load_gate
    from qbrec.registry.promote import promote as promote_version

    config = load_config(config_path, overrides=overrides)
    gate = load_gate(Path(gate_file)) if gate_file else None
    click.echo(str(promote_version(config, version=number, gate=gate)))


@click.command()
@config_options
def rollback(config_path: str | None, overrides: tuple[str, ...]) -> None:
    """Give @champion back to @previous.

    \b
    Example:
      qbrec rollback --config shop.yaml
    """
    from qbrec.config import load_config
    from qbrec.registry.promote import rollback as rollback_model

    config = load_config(config_path, overrides=overrides)
    click.echo(f"models:/{config.registry.model_name}@champion is version {rollback_model(config)} again")
