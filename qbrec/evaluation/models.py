"""The models of an evaluation: ours, the semantic IDs alone, every baseline, and what was chosen of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from qbrec.baselines import ItemKNN, Popularity
from qbrec.baselines.item_scorer import load_item_scorer
from qbrec.baselines.itemknn import TUNING_USERS
from qbrec.baselines.stage import MONITOR
from qbrec.config import RootConfig
from qbrec.engine.context import StageContext
from qbrec.evaluation.results import IDS_ALONE, MODEL
from qbrec.ranking import Scorer
from qbrec.ranking.bonus import BonusScorer
from qbrec.ranking.validate import validation_users
from qbrec.sequence.bonus import load_scorer
from qbrec.storage.artifact import Artifact
from qbrec.storage.catalog_view import CatalogView, Histories
from qbrec.storage.token_table import token_table

Settings = dict[str, float]


def models_of(
    ctx: StageContext,
    config: RootConfig,
    inputs: Mapping[str, Artifact],
    catalog: CatalogView,
    histories: Histories,
    *,
    seed: int,
) -> Iterator[tuple[str, Scorer, Settings]]:
    """Name, scorer and settings of every model, one in memory at a time.

    Args:
        ctx: Seeds, device, progress.
        config: The whole configuration.
        inputs: Of the evaluation.
        catalog: The catalogue.
        histories: Of the target domain.
        seed: 0 for the run itself, s for the s-th further seed, which has only what is trained.

    Raises:
        DataError: An artifact is damaged or belongs to another run.
    """
    own = {name.removesuffix(f"@{seed}"): a for name, a in inputs.items() if name.endswith(f"@{seed}")}
    found = own if seed else inputs
    yield from _ours(ctx, config, found)
    for name in config.evaluation.baselines:
        if name == "popularity":
            if not seed:
                yield name, Popularity(np.asarray(catalog.train_counts)), {}
        elif name == "itemknn":
            if not seed:
                knn = _itemknn(ctx, histories, allowed=catalog.candidates(config.data.target_domain))
                yield name, knn, {"alpha": knn.alpha, "decay": knn.decay}
        else:
            meta = found[name].meta
            best = {"best_epoch": meta["best"]["epoch"], f"validation_{MONITOR}": meta["best"][MONITOR]}
            yield name, load_item_scorer(found[name], device=ctx.device), {"epochs": meta["epochs"], **best}


def _ours(
    ctx: StageContext, config: RootConfig, inputs: Mapping[str, Artifact]
) -> Iterator[tuple[str, Scorer, Settings]]:
    model = load_scorer(
        inputs["finetune"],
        inputs.get("neighbours"),
        semantic_ids=token_table(inputs["quantizer"]).codes,
        chunk_items=config.ranking.chunk_items,
        device=ctx.device,
    )
    if not isinstance(model, BonusScorer):
        yield MODEL, model, {}
        return
    yield MODEL, model, dict(zip(model.bonus.graphs.names, model.bonus.weights, strict=True))
    yield IDS_ALONE, model.base, {}


def _itemknn(ctx: StageContext, histories: Histories, *, allowed: NDArray[np.bool_]) -> ItemKNN:
    training = histories.rows.prefix(np.asarray(histories.cut)[:, 0])
    progress = ctx.progress(
        min(len(validation_users(histories.cut)), TUNING_USERS), "tune ItemKNN on validation"
    )
    knn = ItemKNN.fit(training, num_items=len(allowed)).tuned(
        histories, allowed=allowed, seed=ctx.sub_seed("evaluation/itemknn"), on_batch=progress.update
    )
    progress.close()
    return knn
