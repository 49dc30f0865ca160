"""`qbrec doctor`: is this machine fit for a run?"""

from __future__ import annotations

import json
import sys

import click

from qbrec.cli.options import config_options


@click.command()
@config_options
@click.option("--json", "as_json", is_flag=True, help="Print a document.")
def doctor(config_path: str | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Check versions, GPUs, collectives, limits, input, storage, MLflow, token, cluster and clock.

    Every line is ✓ fine, ! a run works, but not as it should, or ✗ a run fails, with what is wrong and how to
    mend it. A cluster is asked where RAY_API_SERVER_ADDRESS or RAY_ADDRESS names one. Files and objects that
    it writes are deleted at once. Exit code 5 if there is a ✗.

    \b
    Examples:
      qbrec doctor
      qbrec doctor --config shop.yaml --json
      ray job submit --working-dir . -- python -m qbrec doctor --set run.storage=/mnt/qbrec/storage
    """
    from qbrec.config import load_config
    from qbrec.doctor.examine import examine
    from qbrec.doctor.finding import document, is_healthy, text
    from qbrec.errors import LaunchError

    findings = examine(load_config(config_path, overrides=overrides))
    click.echo(json.dumps(document(findings), indent=1) if as_json else text(findings))
    if not is_healthy(findings):
        sys.exit(LaunchError.exit_code)
