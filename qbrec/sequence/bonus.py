"""The co-occurrence bonus of the model: fitted and weighed when fine-tuning ends, kept beside the encoder."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qbrec.config import RootConfig
from qbrec.engine.context import StageContext
from qbrec.ranking.cooccurrence import BonusScorer, Neighbours, tune_bonus
from qbrec.ranking.scorer import FactorisedScorer, Scorer
from qbrec.ranking.topk import tie_rank
from qbrec.ranking.validate import contexts_and_targets, drawn_users
from qbrec.sequence.recommender import SequenceRecommender
from qbrec.storage.artifact import Artifact, ArtifactWriter
from qbrec.storage.catalog_view import CatalogView

BONUS_SETTING = "bonus.json"
_PARTS = ("indptr", "indices", "data")
BONUS_FILES = (BONUS_SETTING, *(f"neighbours.{part}.npy" for part in _PARTS))


def fit_bonus(
    ctx: StageContext, config: RootConfig, catalog: CatalogView, *, scorer: Scorer
) -> tuple[Neighbours, dict[str, float]]:
    """Count followers in the training part of the target domain and choose the weight on validation.

    Args:
        ctx: The rank's context; the users are shared among the ranks.
        config: The whole configuration.
        catalog: The catalogue.
        scorer: The trained scorer over semantic IDs.

    Returns:
        The neighbours with the chosen weight and decay, and NDCG@10 of every setting tried.
    """
    target = config.data.target_domain
    histories = catalog.load_histories(target)
    training = histories.rows.prefix(np.asarray(histories.cut)[:, 0])
    neighbours = Neighbours.fit(training, num_items=catalog.num_items, keep=config.ranking.neighbours)
    users = drawn_users(
        histories, max_users=config.sequence.validation_users, seed=ctx.sub_seed("sequence/validation")
    )
    mine = users[ctx.rank :: ctx.world]
    step = config.evaluation.batch_users
    batches = []
    for begin in range(0, len(mine), step):
        batch = mine[begin : begin + step]
        batches.append((*contexts_and_targets(histories, batch, part=0), histories.domain[batch]))
    return tune_bonus(
        scorer,
        neighbours,
        batches,
        tie_rank=tie_rank(np.asarray(catalog.train_counts)),
        allowed=catalog.candidates(target),
        all_reduce=ctx.all_reduce,
        device=ctx.device,
    )


def save_bonus(writer: ArtifactWriter, neighbours: Neighbours, table: dict[str, float]) -> None:
    """Write `BONUS_FILES`: the chosen setting, NDCG@10 of all settings, the followers."""
    writer.save_json(
        BONUS_SETTING, {"weight": neighbours.weight, "decay": neighbours.decay, "validation_ndcg@10": table}
    )
    for part, array in neighbours.arrays().items():
        writer.save_npy(f"neighbours.{part}.npy", array)


def load_scorer(
    artifact: Artifact,
    *,
    semantic_ids: NDArray[Any],
    chunk_items: int,
    device: torch.device | str = "cpu",
    bonus: bool = True,
) -> Scorer:
    """*The model*: what early stop, evaluation, `recommend`, gates and bundle rank with.

    Args:
        artifact: Of fine-tuning, or its part of a bundle.
        semantic_ids: Codes of all items [N, L].
        chunk_items: Items scored at once.
        device: Where the encoder shall run.
        bonus: False leaves the co-occurrence bonus out: semantic IDs alone.

    Raises:
        DataError: A file is damaged.
    """
    encoder = SequenceRecommender.load(artifact, semantic_ids=semantic_ids, device=device)
    scorer = FactorisedScorer(encoder, semantic_ids=semantic_ids, chunk_items=chunk_items)
    if not (bonus and artifact.has(BONUS_SETTING)):
        return scorer
    setting = artifact.load_json(BONUS_SETTING)
    if not setting["weight"]:
        return scorer
    arrays = {part: np.asarray(artifact.load_npy(f"neighbours.{part}.npy")) for part in _PARTS}
    return BonusScorer(
        scorer, Neighbours.from_arrays(arrays, weight=setting["weight"], decay=setting["decay"])
    )
