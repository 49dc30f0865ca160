"""`qbrec run`: the whole road in one command."""

from __future__ import annotations

import click

from qbrec.cli.options import run_options
from qbrec.cli.seeds import seeded_pipeline


@click.command()
@run_options
def run(config_path: str | None, overrides: tuple[str, ...], resume: str) -> None:
    """Catalog, fusion, quantizer, pretraining, fine-tuning, evaluation, registration, report.

    Stages that are up to date are skipped; one that was cut off goes on from its last checkpoint. It ends
    with a table: qbrec beside the baselines, over the full catalogue, with 95 % intervals. With several
    seeds every trained model is trained so often, and the metrics of each user are averaged first.

    \b
    Examples:
      qbrec run --config launch/quickstart.yaml
      qbrec run --config shop.yaml --set run.name=shop-2 --set fusion.width=128
      qbrec run --config shop.yaml --set run.name=shop-3 --collapse-duplicates
      qbrec run --config shop.yaml --seeds 3
      torchrun --nproc-per-node 2 -m qbrec run --config shop.yaml
    """
    from qbrec.config import load_config
    from qbrec.errors import QbrecError, RegistryError

    config = load_config(config_path, overrides=overrides)
    with seeded_pipeline(config, resume=resume) as pipeline:
        evaluation = pipeline.up_to("evaluation")
        if not pipeline.is_main:
            return
        try:
            pipeline.catch_up()
        except QbrecError as error:
            click.secho(f"appended items have no semantic IDs: {error}", err=True, fg="yellow")
        try:
            version = pipeline.register()
        except RegistryError as error:
            # The training is worth more than its record: everything else is finished and on disk.
            click.secho(
                f"not registered: {error}\n  later: `qbrec register` with the same options",
                err=True,
                fg="yellow",
            )
            version = None
        report = pipeline.report()
        pipeline.tracker.artifacts([report])
    from qbrec.evaluation.table import format_table
    from qbrec.tracking.client import tracking_uri

    click.echo()
    click.echo(format_table(evaluation.load_json("metrics.json")))
    click.echo()
    click.echo(f"metrics   {evaluation.path / 'metrics.json'}")
    click.echo(f"report    {report}")
    if config.tracking.enabled:
        click.echo(f"mlflow    {tracking_uri(pipeline.config)}")
    if version is not None:
        click.echo(f"model     models:/{config.registry.model_name}@challenger (version {version})")
