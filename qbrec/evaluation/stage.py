"""The evaluation stage: qbrec and every baseline, all test users, the full catalogue of the target domain."""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from qbrec.baselines import ItemKNN, Popularity
from qbrec.baselines.item_scorer import load_item_scorer
from qbrec.baselines.itemknn import TUNING_USERS
from qbrec.baselines.stage import MONITOR
from qbrec.config import RootConfig
from qbrec.engine.context import StageContext
from qbrec.evaluation.bootstrap import CONFIDENCE
from qbrec.evaluation.protocol import ModelRanks, TestSet, rank_model
from qbrec.evaluation.results import IDS_ALONE, MODEL, MODES, summarise
from qbrec.evaluation.slices import test_slices
from qbrec.ranking import Scorer
from qbrec.ranking.bonus import BonusScorer
from qbrec.ranking.validate import validation_users
from qbrec.sequence.bonus import load_scorer
from qbrec.storage.artifact import Artifact
from qbrec.storage.catalog_view import CatalogView, Histories
from qbrec.storage.token_table import token_table


def run(ctx: StageContext, config: RootConfig, inputs: Mapping[str, Artifact]) -> Artifact:
    """Rank, compare, write `metrics.json` (layout: `evaluation.results`) and `ranks.parquet`.

    Args:
        ctx: Context of one process.
        config: `evaluation`, `ranking.chunk_items` and the target domain are read.
        inputs: `catalog`, `quantizer`, `finetune`, and the artifacts of the baselines that are trained.

    Raises:
        DataError: The target domain has no test user, or an input is damaged or belongs to another run.
    """
    assert ctx.world == 1, "evaluation runs in one process"
    domain = config.data.target_domain
    catalog = CatalogView(inputs["catalog"])
    histories = catalog.load_histories(domain)
    counts = np.asarray(catalog.train_counts)
    allowed = catalog.candidates(domain)
    test = TestSet.build(
        histories,
        allowed=allowed,
        train_counts=counts,
        max_users=config.evaluation.max_users,
        seed=ctx.sub_seed("evaluation/users"),
    )
    settings: dict[str, dict[str, float]] = {}
    models = _models(ctx, config, inputs)
    ours = models[MODEL]
    if isinstance(ours, BonusScorer):
        settings[MODEL] = dict(zip(ours.bonus.graphs.names, ours.bonus.weights, strict=True))
    for baseline in config.evaluation.baselines:
        models[baseline], chosen = _baseline(ctx, baseline, inputs, catalog, histories, allowed=allowed)
        if chosen:
            settings[baseline] = chosen
    ranks = {}
    for name, scorer in models.items():
        progress = ctx.progress(len(test), f"rank all items: {name}")
        ranks[name] = rank_model(
            scorer,
            test,
            batch_users=config.evaluation.batch_users,
            ranking=config.ranking,
            on_batch=progress.update,
        )
        progress.close()
    slices = test_slices(test, train_counts=counts, near_duplicate_group=catalog.near_duplicate_group)
    metrics = summarise(
        ranks, slices, resamples=config.evaluation.bootstrap, seed=ctx.sub_seed("evaluation/bootstrap")
    )
    metrics["settings"] = settings
    metrics["protocol"] = {
        "domain": domain,
        "split": config.catalog.split,
        "num_users": len(test),
        "num_candidates": int(allowed.sum()),
        "duplicate_share": float(1 - slices["non_duplicate"].mean()),
        "bootstrap": config.evaluation.bootstrap,
        "confidence": CONFIDENCE,
    }
    reached = metrics["models"][MODEL]["removed"]
    ctx.log_metrics(0, {metric: cell["mean"] for metric, cell in reached.items()})
    writer = ctx.writer()
    writer.save_json("metrics.json", metrics)
    writer.write_bytes("ranks.parquet", _parquet(ranks_table(test, histories, ranks=ranks, slices=slices)))
    meta = {
        "domain": domain,
        "num_users": len(test),
        "models": list(models),
        **{metric: reached[metric]["mean"] for metric in ("hr@10", "ndcg@10")},
    }
    return ctx.commit(writer, meta=meta, inputs=inputs)


def _models(ctx: StageContext, config: RootConfig, inputs: Mapping[str, Artifact]) -> dict[str, Scorer]:
    """The model, and beside it the semantic IDs alone where it has more than them."""
    semantic_ids = token_table(inputs["quantizer"]).codes
    model = load_scorer(
        inputs["finetune"],
        inputs.get("neighbours"),
        semantic_ids=semantic_ids,
        chunk_items=config.ranking.chunk_items,
        device=ctx.device,
    )
    return {MODEL: model, IDS_ALONE: model.base} if isinstance(model, BonusScorer) else {MODEL: model}


def _baseline(
    ctx: StageContext,
    name: str,
    inputs: Mapping[str, Artifact],
    catalog: CatalogView,
    histories: Histories,
    *,
    allowed: NDArray[np.bool_],
) -> tuple[Scorer, dict[str, float]]:
    """A baseline, fitted here or trained by its own stage, and what validation chose of it."""
    if name == "popularity":
        return Popularity(np.asarray(catalog.train_counts)), {}
    if name == "itemknn":
        knn = _itemknn(ctx, histories, allowed=allowed)
        return knn, {"alpha": knn.alpha, "decay": knn.decay}
    scorer = load_item_scorer(inputs[name], device=ctx.device)
    meta = inputs[name].meta
    best = {"best_epoch": meta["best"]["epoch"], f"validation_{MONITOR}": meta["best"][MONITOR]}
    return scorer, {"epochs": meta["epochs"], **best}


def _itemknn(ctx: StageContext, histories: Histories, *, allowed: NDArray[np.bool_]) -> ItemKNN:
    training = histories.rows.prefix(np.asarray(histories.cut)[:, 0])
    progress = ctx.progress(min(len(validation_users(histories)), TUNING_USERS), "tune ItemKNN on validation")
    knn = ItemKNN.fit(training, num_items=len(allowed)).tuned(
        histories, allowed=allowed, seed=ctx.sub_seed("evaluation/itemknn"), on_batch=progress.update
    )
    progress.close()
    return knn


def ranks_table(
    test: TestSet,
    histories: Histories,
    *,
    ranks: Mapping[str, ModelRanks],
    slices: Mapping[str, NDArray[np.bool_]],
) -> pa.Table:
    """One row per test user, in the order of histories.

    Columns: `user`, `domain`, `target_row`, `history_length`, `<model>_<mode>` (rank), `in_<slice>`.
    """
    columns = {
        "user": pa.array(np.asarray(histories.user)[test.users], pa.int64()),
        "domain": pa.array(test.domain, pa.uint8()),
        "target_row": pa.array(test.targets, pa.int64()),
        "history_length": pa.array(test.contexts.lengths, pa.int32()),
    }
    for model, result in ranks.items():
        for mode in MODES:
            columns[f"{model}_{mode}"] = pa.array(result.of(mode), pa.int32())
    for name, member in slices.items():
        if name != "all":
            columns[f"in_{name}"] = pa.array(member)
    return pa.table(columns)


def _parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()
