"""The evaluation stage: qbrec and every baseline, all test users, the full catalogue of the target domain."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from qbrec.config import RootConfig
from qbrec.engine.context import StageContext
from qbrec.evaluation.bootstrap import CONFIDENCE
from qbrec.evaluation.models import models_of
from qbrec.evaluation.protocol import ModelRanks, TestSet, rank_model
from qbrec.evaluation.results import MODEL, MODES, summarise
from qbrec.evaluation.slices import test_slices
from qbrec.storage.artifact import Artifact
from qbrec.storage.catalog_view import CatalogView, Histories


def run(ctx: StageContext, config: RootConfig, inputs: Mapping[str, Artifact]) -> Artifact:
    """Rank, compare, write `metrics.json` (layout: `evaluation.results`) and `ranks.parquet`.

    Args:
        ctx: The rank's context: the ranks share the users.
        config: `evaluation`, `ranking` and the target domain are read.
        inputs: `catalog`, `quantizer`, `finetune`, `neighbours` where the run has them, the artifacts of the
            baselines that are trained, and the same of further seeds (`finetune@1`, …).

    Raises:
        DataError: The target domain has no test user, or an input is damaged or belongs to another run.
    """
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
    ranks: dict[str, list[ModelRanks]] = {}
    for seed in range(config.evaluation.seeds):
        for name, scorer, chosen in models_of(ctx, config, inputs, catalog, histories, seed=seed):
            if chosen and not seed:
                settings[name] = chosen
            label = f"rank all items: {name}" + (f", seed {seed + 1}" if config.evaluation.seeds > 1 else "")
            progress = ctx.progress(len(test), label)
            ranks.setdefault(name, []).append(
                rank_model(
                    scorer,
                    test,
                    batch_users=config.evaluation.batch_users,
                    ranking=config.ranking,
                    on_batch=progress.update,
                    ctx=ctx,
                )
            )
            progress.close()
    writer = ctx.writer()
    meta: dict[str, Any] = {}
    if ctx.is_main:
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
            "seeds": config.evaluation.seeds,
            "duplicate_share": float(1 - slices["non_duplicate"].mean()),
            "bootstrap": config.evaluation.bootstrap,
            "confidence": CONFIDENCE,
        }
        reached = {metric: cell["mean"] for metric, cell in metrics["models"][MODEL]["removed"].items()}
        ctx.log_metrics(0, reached)
        writer.save_json("metrics.json", metrics)
        table = ranks_table(test, histories, ranks=ranks, slices=slices)
        writer.write_bytes("ranks.parquet", _parquet(table))
        meta = {
            "domain": domain,
            "num_users": len(test),
            "models": list(ranks),
            "modalities": list(inputs["catalog"].meta.get("modalities", ())),
            **{metric: reached[metric] for metric in ("hr@10", "ndcg@10")},
        }
    return ctx.commit(writer, meta=meta, inputs=inputs)


def ranks_table(
    test: TestSet,
    histories: Histories,
    *,
    ranks: Mapping[str, Sequence[ModelRanks]],
    slices: Mapping[str, NDArray[np.bool_]],
) -> pa.Table:
    """One row per test user, in the order of histories.

    Columns: `user`, `domain`, `target_row`, `history_length`, `<model>_<mode>` (rank; of further seeds
    `<model>_<mode>@1`, …), `in_<slice>`.
    """
    columns = {
        "user": pa.array(np.asarray(histories.user)[test.users], pa.int64()),
        "domain": pa.array(test.domain, pa.uint8()),
        "target_row": pa.array(test.targets, pa.int64()),
        "history_length": pa.array(test.contexts.lengths, pa.int32()),
    }
    for model, results in ranks.items():
        for seed, result in enumerate(results):
            for mode in MODES:
                name = f"{model}_{mode}" + (f"@{seed}" if seed else "")
                columns[name] = pa.array(result.of(mode), pa.int32())
    for name, member in slices.items():
        if name != "all":
            columns[f"in_{name}"] = pa.array(member)
    return pa.table(columns)


def _parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()
