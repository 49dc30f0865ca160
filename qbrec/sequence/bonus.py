"""The bonus of the model: weighed when fine-tuning ends, its weights kept beside the encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qbrec.config import RootConfig
from qbrec.engine.context import StageContext
from qbrec.errors import DataError
from qbrec.ranking.bonus import Bonus, BonusScorer, tune_bonus
from qbrec.ranking.graphs import ItemGraphs
from qbrec.ranking.scorer import FactorisedScorer, Scorer
from qbrec.ranking.topk import tie_rank
from qbrec.ranking.validate import batch_rows, contexts_and_targets, drawn_histories
from qbrec.sequence.recommender import SequenceRecommender
from qbrec.storage.artifact import Artifact, ArtifactWriter
from qbrec.storage.catalog_view import CatalogView

BONUS_FILE = "bonus.json"
MOST_USERS = 20_000  # that the weights are fitted on


def fit_bonus(
    ctx: StageContext, config: RootConfig, catalog: CatalogView, *, graphs: ItemGraphs, scorer: Scorer
) -> tuple[Bonus, dict[str, float]]:
    """Fit the weights of the paths on the validation users of the target domain.

    Args:
        ctx: The rank's context; the users are shared among the ranks.
        config: The whole configuration.
        catalog: The catalogue.
        graphs: Its item graphs.
        scorer: The trained scorer over semantic IDs.

    Returns:
        The bonus, and NDCG@10 by share of it added.
    """
    target = config.data.target_domain
    most = min(config.sequence.validation_users or MOST_USERS, MOST_USERS)
    seed = ctx.sub_seed("sequence/validation")
    histories = drawn_histories(catalog, target, max_users=most, seed=seed)
    mine = np.arange(len(histories))[ctx.rank :: ctx.world]
    step = batch_rows(config.evaluation.batch_users, catalog.num_items)
    batches = []
    for begin in range(0, len(mine), step):
        batch = mine[begin : begin + step]
        batches.append((*contexts_and_targets(histories, batch, part=0), histories.domain[batch]))
    return tune_bonus(
        scorer,
        graphs,
        batches,
        tie_rank=tie_rank(np.asarray(catalog.train_counts)),
        allowed=catalog.candidates(target),
        gather=ctx.gather_bytes,
        device=ctx.device,
    )


def save_bonus(writer: ArtifactWriter, bonus: Bonus, table: dict[str, float]) -> None:
    """Write `BONUS_FILE`: the weight of every path, NDCG@10 by share of the bonus."""
    weights = dict(zip(bonus.graphs.names, bonus.weights, strict=True))
    writer.save_json(BONUS_FILE, {"weights": weights, "validation_ndcg@10": table})


def load_bonus(
    finetune: Artifact, neighbours: Artifact | None, appended: Sequence[Artifact] = ()
) -> Bonus | None:
    """The bonus of a run; None where it has none, or where validation wanted none.

    Args:
        finetune: Of fine-tuning.
        neighbours: The item graphs, if there are any.
        appended: Their rows of the generations appended since, oldest first; items without get no bonus.

    Raises:
        DataError: A file is damaged, or the graphs are not those that the weights were fitted on.
    """
    if not finetune.has(BONUS_FILE):
        return None
    wanted = finetune.inputs.get("neighbours")
    if neighbours is None or neighbours.fingerprint != wanted:
        raise DataError(
            "the model's bonus was fitted on other item graphs"
            if neighbours
            else "the item graphs are missing",
            where=str(finetune.path),
            fix="bring the run up to date with `qbrec run`, then register it again",
        )
    weights = finetune.load_json(BONUS_FILE)["weights"]
    if not any(weights.values()):
        return None
    graphs = ItemGraphs.load(neighbours, appended)
    bonus = Bonus(graphs, tuple(float(weights[name]) for name in graphs.names))
    _ = bonus.kin  # now, not within somebody's first request
    return bonus


def load_scorer(
    finetune: Artifact,
    neighbours: Artifact | None = None,
    *,
    appended: Sequence[Artifact] = (),
    semantic_ids: NDArray[Any],
    chunk_items: int,
    device: torch.device | str = "cpu",
) -> Scorer:
    """*The model*: what evaluation ranks with.

    Args:
        finetune: Of fine-tuning, or its part of a bundle.
        neighbours: The item graphs that it was fine-tuned beside, if there are any.
        appended: Rows of these graphs, `alike-1`, … of the generations appended since.
        semantic_ids: Codes of all items [N, L], without item codes.
        chunk_items: Items scored at once.
        device: Where the encoder shall run.

    Raises:
        DataError: A file is damaged, or the artifacts do not belong together.
    """
    encoder = SequenceRecommender.load(finetune, semantic_ids=semantic_ids, device=device)
    scorer = FactorisedScorer(encoder, semantic_ids=encoder.semantic_ids, chunk_items=chunk_items)
    bonus = load_bonus(finetune, neighbours, appended)
    return scorer if bonus is None else BonusScorer(scorer, bonus)
