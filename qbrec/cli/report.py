"""`qbrec report`: the run's HTML page."""

from __future__ import annotations

import click

from qbrec.cli.options import config_options


@click.command()
@config_options
def report(config_path: str | None, overrides: tuple[str, ...]) -> None:
    """Write the report of a run from what is finished of it, and print where it lies.

    It compares the run with the @champion of this moment and has the last verdict of the gate: write it
    again before and after a promotion.

    \b
    Example:
      qbrec report --config shop.yaml
    """
    from qbrec.config import load_config
    from qbrec.pipeline import finished_artifacts, report_of

    config = load_config(config_path, overrides=overrides)
    click.echo(report_of(config, finished_artifacts(config)))
