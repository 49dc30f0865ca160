"""`qbrec report`: the run's HTML page."""

from __future__ import annotations

import click

from qbrec.cli.options import config_options


@click.command()
@config_options
def report(config_path: str | None, overrides: tuple[str, ...]) -> None:
    """Write the report of a run from what is finished of it, and print where it lies.

    \b
    Example:
      qbrec report --config shop.yaml
    """
    from qbrec.config import load_config
    from qbrec.pipeline import finished_artifacts
    from qbrec.report.page import write_report
    from qbrec.run_record import run_directory

    config = load_config(config_path, overrides=overrides)
    click.echo(write_report(config, run_directory(config), finished_artifacts(config)))
