"""`qbrec register|promote|rollback`: from a finished run to the model that serves."""

from __future__ import annotations

import click

from qbrec.cli.options import config_options


@click.command()
@config_options
def register(config_path: str | None, overrides: tuple[str, ...]) -> None:
    """Register the model of a finished run as a new version with the alias @challenger.

    What `qbrec append` added since is part of it: new items are served, retired ones are not. So are the
    figures of `qbrec coldstart`, for gates that ask for them.

    \b
    Example:
      qbrec register --config shop.yaml
    """
    from qbrec.config import load_config
    from qbrec.pipeline import finished_artifacts
    from qbrec.registry.versions import register as register_run
    from qbrec.run_coldstart import with_coldstart
    from qbrec.run_generations import with_generations
    from qbrec.run_record import run_directory

    config = load_config(config_path, overrides=overrides)
    artifacts = with_coldstart(config, with_generations(config, finished_artifacts(config)))
    version = register_run(config, run_directory(config), artifacts)
    click.echo(f"models:/{config.registry.model_name}@challenger is version {version}")


@click.command()
@config_options
@click.option("--version", "number", help="Version to promote; default: @challenger.")
@click.option(
    "--gate",
    "gate_name",
    metavar="NAME|FILE",
    help="A gate of mlflow/gates/ by name (default, strict), or a YAML file; default: registry.gate.",
)
def promote(
    config_path: str | None, overrides: tuple[str, ...], number: str | None, gate_name: str | None
) -> None:
    """Judge a version by the gate and, if it passes, give it @champion.

    The champion until then becomes @previous. A gate that says no ends with exit code 6 and leaves all
    aliases. Either way the verdict is written on the version: `qbrec registry show`.

    \b
    Examples:
      qbrec promote --config shop.yaml
      qbrec promote --config shop.yaml --version 3 --gate strict
    """
    from qbrec.config import load_config
    from qbrec.registry.gate import OWN_GATE, named_gate
    from qbrec.registry.promote import promote as promote_version

    config = load_config(config_path, overrides=overrides)
    name, gate = named_gate(gate_name) if gate_name else (OWN_GATE, config.registry.gate)
    click.echo(str(promote_version(config, version=number, gate=gate, gate_name=name)))


@click.command()
@config_options
def rollback(config_path: str | None, overrides: tuple[str, ...]) -> None:
    """Give @champion back to @previous; repeated, go back one promotion further each time.

    \b
    Example:
      qbrec rollback --config shop.yaml
    """
    from qbrec.config import load_config
    from qbrec.registry.promote import rollback as rollback_model

    config = load_config(config_path, overrides=overrides)
    click.echo(f"models:/{config.registry.model_name}@champion is version {rollback_model(config)} again")
