"""`qbrec catalog|fuse|quantize|pretrain|finetune|evaluate`: one stage, and what must come before it."""

from __future__ import annotations

import click

from qbrec.cli.options import run_options
from qbrec.cli.seeds import seeded_pipeline


def _command(name: str, *, stage: str, what: str) -> click.Command:
    help_text = (
        f"{what}\n\nStages before it are brought up to date first; whatever is up to date is skipped.\n\n"
        f"\b\nExample:\n  qbrec {name} --config shop.yaml"
    )

    @click.command(name, help=help_text)
    @run_options
    def command(config_path: str | None, overrides: tuple[str, ...], resume: str) -> None:
        from qbrec.config import load_config
        from qbrec.pipeline import Pipeline

        config = load_config(config_path, overrides=overrides)
        make = seeded_pipeline if stage == "evaluation" else Pipeline
        with make(config, resume=resume) as pipeline:
            artifact = pipeline.up_to(stage)
        if not pipeline.is_main:
            return
        if stage == "evaluation":
            from qbrec.evaluation.table import format_table

            click.echo(format_table(artifact.load_json("metrics.json")))
        click.echo(artifact.path)

    return command


catalog = _command(
    "catalog", stage="catalog", what="Validate items and interactions, encode features, group users."
)
fuse = _command("fuse", stage="fusion", what="Stage 1: train the fusion transformer and fuse every item.")
quantize = _command(
    "quantize", stage="quantizer", what="Stage 2: fit codebooks and give every item its semantic ID."
)
pretrain = _command("pretrain", stage="pretrain", what="Stage 3: pretrain the masked encoder on all domains.")
finetune = _command(
    "finetune", stage="finetune", what="Stage 3: fine-tune on the target domain, early stop on NDCG@10."
)
evaluate = _command(
    "evaluate", stage="evaluation", what="Rank the full catalogue for every test user, with baselines."
)
