"""SASRec and BERT4Rec as stages: trained on the target domain with the loop that trains the model itself."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from qbrec.baselines.item_batch import ItemCollate
from qbrec.baselines.item_encoder import ItemEncoder
from qbrec.baselines.item_scorer import ItemScorer, numbers_of, save_item_encoder
from qbrec.baselines.item_tasks import ItemTask
from qbrec.config import RootConfig
from qbrec.config.stages import ItemEncoderConfig
from qbrec.engine.candidates import Candidates
from qbrec.engine.context import StageContext
from qbrec.engine.history_loader import history_loader
from qbrec.engine.train import train
from qbrec.ranking.validate import validator
from qbrec.storage.artifact import Artifact
from qbrec.storage.catalog_view import CatalogView

MONITOR = "ndcg@10"


def sasrec(ctx: StageContext, config: RootConfig, inputs: Mapping[str, Artifact]) -> Artifact:
    """Train SASRec on the training part of the target domain's histories.

    The weights kept are those with the best validation NDCG@10 over the full catalogue, seen items removed.

    Args:
        ctx: The rank's context.
        config: `baselines.sasrec` and the target domain are read.
        inputs: `catalog`.

    Returns:
        `item_encoder.safetensors`, `item_encoder.json`, `rows.npy`, `curve.json`.

    Raises:
        DataError: The input is damaged, or the target domain has no history to learn from.
    """
    return _run(ctx, config, inputs, settings=config.baselines.sasrec, causal=True)


def bert4rec(ctx: StageContext, config: RootConfig, inputs: Mapping[str, Artifact]) -> Artifact:
    """Train BERT4Rec; as `sasrec`, with `baselines.bert4rec`."""
    return _run(ctx, config, inputs, settings=config.baselines.bert4rec, causal=False)


def _run(
    ctx: StageContext,
    config: RootConfig,
    inputs: Mapping[str, Artifact],
    *,
    settings: ItemEncoderConfig,
    causal: bool,
) -> Artifact:
    catalog, target = CatalogView(inputs["catalog"]), config.data.target_domain
    numbers = numbers_of(catalog, target)
    torch.manual_seed(ctx.sub_seed(f"{ctx.stage}/init"))
    module = ItemEncoder(settings, num_items=len(numbers), causal=causal)
    seed, allowed = ctx.sub_seed(f"{ctx.stage}/draws"), catalog.candidates(target)
    pool = torch.from_numpy(np.flatnonzero(allowed[numbers.rows]))
    task = ItemTask.of(module, candidates=Candidates(pool, count=settings.candidates, seed=seed), seed=seed)
    collate = ItemCollate(numbers, max_items=settings.max_items, cloze=task.cloze, seed=seed)
    loader = history_loader(
        ctx, catalog, settings.train, collate=collate, domain=catalog.domain_number(target)
    )

    def scorer(trained: nn.Module) -> ItemScorer:
        assert isinstance(trained, ItemEncoder)
        return ItemScorer(ctx.stage, trained, numbers=numbers, device=ctx.device)

    evaluate = validator(
        ctx,
        catalog,
        scorer,
        domain=target,
        max_users=settings.validation_users,
        seed=ctx.sub_seed("baselines/validation"),
        batch_users=config.evaluation.batch_users,
    )
    result = train(
        ctx, task, loader, config=settings.train, label=ctx.stage, evaluate=evaluate, monitor=MONITOR
    )
    writer = ctx.writer()
    if ctx.is_main:
        save_item_encoder(writer, module, numbers=numbers)
        writer.save_json("curve.json", result.curve)
    meta = {
        "steps": result.steps,
        "epochs": result.curve[-1]["epoch"],
        "best": result.best,
        "num_histories": loader.num_samples,
        "num_parameters": sum(parameter.numel() for parameter in module.parameters()),
    }
    return ctx.commit(writer, meta=meta, inputs=inputs)
