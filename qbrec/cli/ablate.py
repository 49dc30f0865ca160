"""`qbrec ablate`: the run again without each of its parts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from qbrec.cli.options import run_options
from qbrec.cli.seeds import seeded_pipeline
from qbrec.config.ablations import FULL, VARIANTS

if TYPE_CHECKING:
    from qbrec.storage.artifact import Artifact


@click.command()
@run_options
@click.option(
    "--only",
    multiple=True,
    type=click.Choice([name for name in VARIANTS if name != FULL]),
    help="Leave out only this. May be repeated; all of them otherwise.",
)
def ablate(config_path: str | None, overrides: tuple[str, ...], resume: str, only: tuple[str, ...]) -> None:
    """What each part is worth: runs without it, compared with the full model user by user.

    Variants: no pretraining, each kind of mask off, every item through all fusion blocks, no behaviour
    view, text alone, IDs dealt at random. Each is a run of its own, `<run.name>-<variant>`: stages that a
    change does not touch are shared, and a run that was cut off goes on. The result is a table, and
    `ablation.json` in the folder of the run.

    \b
    Examples:
      qbrec ablate --config shop.yaml
      qbrec ablate --config shop.yaml --only random-ids --only no-gate --workers 2
    """
    import json

    from qbrec.config import load_config
    from qbrec.errors import ConfigError, GateError
    from qbrec.evaluation.ablation import compare, format_ablation
    from qbrec.pipeline import say
    from qbrec.run_record import run_directory
    from qbrec.storage.artifact import write_atomic

    plain = load_config(config_path, overrides=overrides)
    configs = {}
    for variant in (FULL, *(only or VARIANTS)):
        name = plain.run.name if variant == FULL else f"{plain.run.name}-{variant}"
        keys = (*overrides, *VARIANTS[variant][1], f"run.name={name}")
        try:  # now, not after hours of training
            configs[variant] = load_config(config_path, overrides=keys)
        except ConfigError as error:
            say(f"{variant} is left out: {error}")
    evaluations: dict[str, Artifact] = {}
    for variant, config in configs.items():
        say(f"\n{variant}: {VARIANTS[variant][0]}")
        if variant == "text-only" and "text" not in evaluations[FULL].meta["modalities"]:
            say("left out: the items have no text")
            continue
        try:
            with seeded_pipeline(config, resume=resume) as pipeline:
                evaluations[variant] = pipeline.up_to("evaluation")
                main = pipeline.is_main
        except GateError as error:
            if variant == FULL:
                raise
            say(f"left out: {error}")
    if not main:
        return
    found = compare(evaluations, resamples=plain.evaluation.bootstrap, seed=plain.run.seed)
    path = run_directory(plain) / "ablation.json"
    write_atomic(path, json.dumps(found, indent=1).encode())
    click.echo()
    click.echo(format_ablation(found))
    click.echo()
    click.echo(f"figures   {path}")
