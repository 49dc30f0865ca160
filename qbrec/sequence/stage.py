"""Stage 3: pretrain the masked encoder on all domains, then fine-tune it on the target domain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from qbrec.config import RootConfig
from qbrec.config.stages import MaskConfig, SequenceConfig, TrainConfig
from qbrec.engine.candidates import Candidates
from qbrec.engine.context import StageContext
from qbrec.engine.history_loader import history_loader
from qbrec.engine.train import TrainResult, train
from qbrec.ranking.graphs import ItemGraphs
from qbrec.ranking.scorer import FactorisedScorer
from qbrec.ranking.validate import validator
from qbrec.sequence.bonus import fit_bonus, save_bonus
from qbrec.sequence.encoder import SequenceEncoder
from qbrec.sequence.item_codes import ItemCodes
from qbrec.sequence.recommender import SequenceRecommender, load_encoder, save_encoder
from qbrec.sequence.tasks import HistoryCollate, MaskedTask
from qbrec.sequence.vocabulary import Vocabulary
from qbrec.storage.artifact import Artifact
from qbrec.storage.catalog_view import CatalogView
from qbrec.storage.token_table import CODEBOOKS, TokenTable, codebooks_file, token_table

MONITOR = "ndcg@10"

Start = tuple[SequenceEncoder, ItemCodes | None]  # an encoder, and who has an item code in it


def pretrain(ctx: StageContext, config: RootConfig, inputs: Mapping[str, Artifact]) -> Artifact:
    """Train an encoder from scratch: span, tail and multi-region masks over the histories of all domains.

    Args:
        ctx: The rank's context.
        config: The whole configuration.
        inputs: `catalog` and `quantizer`.

    Returns:
        `encoder.safetensors`, `encoder.json`, `curve.json`, `item_codes.npy` where items have codes of their
        own.

    Raises:
        DataError: An input is damaged, or there is no history to learn from.
    """
    catalog = CatalogView(inputs["catalog"])
    return _run(
        ctx,
        config,
        inputs,
        catalog=catalog,
        start=_new_encoder(ctx, config, inputs, catalog=catalog),
        masks=config.sequence.masks,
        schedule=config.sequence.pretrain,
        prefix=config.sequence.pretrain_prefix,
        domain=None,
    )


def finetune(ctx: StageContext, config: RootConfig, inputs: Mapping[str, Artifact]) -> Artifact:
    """Go on from the pretrained encoder: the last item of every prefix of the target domain's histories.

    Without one (`sequence.pretraining: false`) it starts as pretraining would, see `from_scratch`.

    The weights kept are those with the best validation NDCG@10 of the factorised scorer over the full
    catalogue.

    Args:
        ctx: The rank's context.
        config: The whole configuration.
        inputs: `catalog`, `quantizer`, and `pretrain` and `neighbours` where the run has them.

    Returns:
        The files of `pretrain`, and `bonus.json` where there are item graphs.

    Raises:
        DataError: An input is damaged, or the target domain has no history to learn from.
    """
    catalog, before = CatalogView(inputs["catalog"]), inputs.get("pretrain")
    if before is not None:
        start, schedule = (load_encoder(before), ItemCodes.load(before)), config.sequence.finetune
    else:
        start = _new_encoder(ctx, config, inputs, catalog=catalog)
        schedule = from_scratch(config.sequence)
    return _run(
        ctx,
        config,
        inputs,
        catalog=catalog,
        start=start,
        masks=config.sequence.finetune_masks,
        schedule=schedule,
        prefix=config.sequence.finetune_prefix,
        domain=list(catalog.domains).index(config.data.target_domain),
    )


def from_scratch(sequence: SequenceConfig) -> TrainConfig:
    """Fine-tuning without a pretrained encoder: the epochs of both, at the learning rate of pretraining."""
    before, schedule = sequence.pretrain, sequence.finetune
    epochs = before.epochs + schedule.epochs
    return schedule.model_copy(update={"epochs": epochs, "learning_rate": before.learning_rate})


def _new_encoder(
    ctx: StageContext, config: RootConfig, inputs: Mapping[str, Artifact], *, catalog: CatalogView
) -> Start:
    table, sequence = token_table(inputs["quantizer"]), config.sequence
    counts = np.asarray(catalog.train_counts)
    own = ItemCodes.choose(counts, largest=sequence.item_codes, least=sequence.item_code_interactions)
    sizes = table.sizes if own is None else (*table.sizes, own.size)
    torch.manual_seed(ctx.sub_seed("sequence/init"))
    module = SequenceEncoder(sequence, Vocabulary(sizes, tuple(catalog.domains)))
    if own is not None:
        module.start_small(len(table.sizes))
    if sequence.codebook_start:
        start_from_codebooks(module, inputs["quantizer"], table)
    return module, own


def start_from_codebooks(module: SequenceEncoder, quantizer: Artifact, table: TokenTable) -> None:
    """Start the code embeddings of every level that has a codebook in the artifact, space by space.

    Args:
        module: An encoder over the levels of `table`.
        quantizer: Artifact of kind `quantizer`.
        table: Its codes.
    """
    spaces = [(CODEBOOKS, table.num_joint)]
    spaces += [(codebooks_file(name), depth) for name, depth in table.modalities]
    first = 0
    for file, depth in spaces:
        stored = quantizer.load_safetensors(file)
        # A level of the ID that only tells collisions apart has no codebook.
        books = [stored.get(f"level.{level}") for level in range(depth)]
        module.start_from_codebooks(books, first_level=first)
        first += depth


def _run(
    ctx: StageContext,
    config: RootConfig,
    inputs: Mapping[str, Artifact],
    *,
    catalog: CatalogView,
    start: Start,
    masks: MaskConfig,
    schedule: TrainConfig,
    prefix: float,
    domain: int | None,
) -> Artifact:
    module, own = start
    semantic_ids = token_table(inputs["quantizer"]).codes
    if own is not None:
        semantic_ids = own.beside(semantic_ids)
    seed = ctx.sub_seed(f"{ctx.stage}/masks")
    pool = np.flatnonzero(catalog.candidates(None if domain is None else catalog.domains[domain]))
    task = MaskedTask(
        module,
        semantic_ids=semantic_ids,
        masks=masks,
        seed=seed,
        candidates=Candidates(torch.from_numpy(pool), count=config.sequence.candidates, seed=seed),
        item_weight=config.sequence.item_weight,
        label_smoothing=config.sequence.label_smoothing,
    )
    collate = HistoryCollate(max_items=module.num_positions, seed=seed, prefix=prefix)
    loader = history_loader(ctx, catalog, schedule, collate=collate, domain=domain)

    def scorer(trained: nn.Module) -> FactorisedScorer:
        assert isinstance(trained, SequenceEncoder)
        recommender = SequenceRecommender(trained, semantic_ids=semantic_ids, device=ctx.device)
        return FactorisedScorer(
            recommender, semantic_ids=semantic_ids, chunk_items=config.ranking.chunk_items
        )

    result = train(
        ctx,
        task,
        loader,
        config=schedule,
        label=ctx.stage,
        evaluate=validator(
            ctx,
            catalog,
            scorer,  # of the semantic IDs alone: the bonus is fitted to trained ones
            domain=config.data.target_domain,
            max_users=config.sequence.validation_users,
            seed=ctx.sub_seed("sequence/validation"),
            batch_users=config.evaluation.batch_users,
        ),
        monitor=MONITOR,
        start_counts="pretrain" in inputs,
    )
    bonus = None
    if "neighbours" in inputs:
        graphs = ItemGraphs.load(inputs["neighbours"])
        bonus = fit_bonus(ctx, config, catalog, graphs=graphs, scorer=scorer(module))
    writer = ctx.writer()
    if ctx.is_main:
        save_encoder(writer, module)
        if own is not None:
            own.save(writer)
        if bonus is not None:
            save_bonus(writer, *bonus)
        writer.save_json("curve.json", result.curve)
    meta = _meta(result, module, num_histories=loader.num_samples)
    return ctx.commit(writer, meta=meta, inputs=inputs)


def _meta(result: TrainResult, module: SequenceEncoder, *, num_histories: int) -> dict[str, Any]:
    return {
        "steps": result.steps,
        "best": result.best,
        "num_histories": num_histories,
        "num_parameters": sum(parameter.numel() for parameter in module.parameters()),
    }
