"""Which items follow which: decayed co-occurrence in training histories, and the bonus it adds to a score.

co(i, j) sums, over training histories of length n and over their pairs at a distance d ≤ 10, 1 / (d · log(2 +
n)) when j comes after i and half of that when it comes before. For a history with items i the candidate j
collects

    s(j) = Σ_{i in the last 20}  decay^age(i) · co(i, j) / ( (pop_j + 1)^0.1 · sqrt(pop_i + 1) )

and its bonus is weight · log(1 + 10 · s(j) / s̄), s̄ the mean over the candidates of that history: zero for
items that co-occur with nothing in it, and on one scale for every user. Semantic IDs generalise,
co-occurrence remembers; `weight` (0 switches it off) and `decay` are chosen on validation.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray

from qbrec.ranking.metrics import METRICS, metrics_of_ranks
from qbrec.ranking.scorer import Domain, Scorer
from qbrec.ranking.topk import target_ranks
from qbrec.storage.ragged import Ragged

WINDOW = 10
BACKWARD = 0.5
LAST = 20
POPULARITY_POWER = 0.1
SHARPNESS = 10.0
WEIGHTS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0)
DECAYS = (0.6, 0.8)
CHUNK_INTERACTIONS = 1 << 21


@dataclass(frozen=True)
class Neighbours:
    """For every item its strongest followers.

    Attributes:
        matrix: co(i, j) / ((pop_j + 1)^0.1 · sqrt(pop_i + 1)), float32 CSR [N, N].
        weight: Of the bonus; 0: none.
        decay: Of older items of a history.
    """

    matrix: sp.csr_matrix
    weight: float = 0.0
    decay: float = DECAYS[0]

    @classmethod
    def fit(cls, training: Ragged, *, num_items: int, keep: int) -> Neighbours:
        """Count in the training part of histories; `keep` followers stay for each item."""
        counts = np.bincount(training.values, minlength=num_items) + 1.0
        matrix = co_occurrence(training, num_items=num_items)
        matrix = sp.diags(counts**-0.5) @ matrix @ sp.diags(counts**-POPULARITY_POWER)
        return cls(_strongest(matrix.tocsr().astype(np.float32), keep))

    def bonus(self, histories: Ragged) -> sp.csr_matrix:
        """log(1 + 10 · s / s̄) of the candidates of every history, float32 CSR [B, N], without the weight."""
        found = (recency(histories, decay=self.decay, num_items=self.matrix.shape[0]) @ self.matrix).tocsr()
        lengths = np.diff(found.indptr)
        means = np.asarray(found.sum(1)).ravel() / np.maximum(lengths, 1)
        found.data = np.log1p(SHARPNESS * found.data / np.repeat(means, lengths)).astype(np.float32)
        return found

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What is kept on disk: `indptr` int64 [N + 1], `indices` int32, `data` float32."""
        return {
            "indptr": self.matrix.indptr.astype(np.int64),
            "indices": self.matrix.indices.astype(np.int32),
            "data": self.matrix.data.astype(np.float32),
        }

    @classmethod
    def from_arrays(cls, arrays: dict[str, NDArray[Any]], *, weight: float, decay: float) -> Neighbours:
        """What `arrays` gave, with the chosen weight and decay."""
        size = len(arrays["indptr"]) - 1
        matrix = sp.csr_matrix((arrays["data"], arrays["indices"], arrays["indptr"]), shape=(size, size))
        return cls(matrix, weight=weight, decay=decay)


class BonusScorer:
    """Another scorer's scores plus the co-occurrence bonus; exact, since every item is scored.

    Args:
        base: The scorer over semantic IDs; it may know more rows than `neighbours` (items appended after the
            training), which get no bonus.
        neighbours: Followers, weight and decay.
    """

    def __init__(self, base: Scorer, neighbours: Neighbours) -> None:
        self.base, self.neighbours, self.name = base, neighbours, base.name

    def scores(self, histories: Ragged, domain: Domain) -> torch.Tensor:
        """Scores float32 [B, N of the base scorer]."""
        scores = self.base.scores(histories, domain)
        add_bonus(scores, self.neighbours.bonus(histories), weight=self.neighbours.weight)
        return scores


def add_bonus(scores: torch.Tensor, bonus: sp.csr_matrix, *, weight: float) -> None:
    """Add `weight` · bonus (CSR [B, <= N]) to scores [B, N] in place."""
    rows = np.repeat(np.arange(bonus.shape[0]), np.diff(bonus.indptr))
    places = (
        torch.from_numpy(rows).to(scores.device),
        torch.from_numpy(bonus.indices.astype(np.int64)).to(scores.device),
    )
    values = torch.from_numpy(bonus.data * np.float32(weight)).to(scores)
    scores.index_put_(places, values, accumulate=True)


def tune_bonus(
    base: Scorer,
    neighbours: Neighbours,
    batches: list[tuple[Ragged, NDArray[np.int64], NDArray[Any]]],
    *,
    tie_rank: NDArray[np.int64],
    allowed: NDArray[np.bool_] | None = None,
    all_reduce: Callable[[torch.Tensor], object] | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Neighbours, dict[str, float]]:
    """Choose weight and decay by NDCG@10 on validation targets, seen items removed.

    Args:
        base: The scorer over semantic IDs.
        neighbours: Fitted on the training part.
        batches: (contexts, targets int64 [b], domain [b]) of this rank's validation users.
        tie_rank: Order of equal scores, [N].
        allowed: Candidates, bool [N].
        all_reduce: Sums a float64 tensor over the ranks in place.
        device: Where that tensor must lie.

    Returns:
        The neighbours with the best setting (the smallest weight among equals), and NDCG@10 of every setting.
    """
    place = METRICS.index("ndcg@10")
    gains = torch.zeros(len(DECAYS), len(WEIGHTS), dtype=torch.float64)
    users = torch.zeros((), dtype=torch.float64)
    for contexts, targets, domain in batches:
        alone = base.scores(contexts, domain)
        users += len(targets)
        for d, decay in enumerate(DECAYS):
            scores, reached = alone.clone(), 0.0
            bonus = replace(neighbours, decay=decay).bonus(contexts)
            for w, weight in enumerate(WEIGHTS):
                add_bonus(scores, bonus, weight=weight - reached)
                reached = weight
                ranks = target_ranks(scores, targets, tie_rank=tie_rank, exclude=contexts, allowed=allowed)
                gains[d, w] += metrics_of_ranks(ranks)[:, place].sum()
    total = torch.cat([gains.flatten(), users[None]]).to(device)
    if all_reduce is not None:
        all_reduce(total)
    means = (total[:-1] / total[-1].clamp(min=1)).cpu().numpy().reshape(gains.shape)
    chosen_decay, chosen_weight = divmod(int(means.argmax()), len(WEIGHTS))
    table = {
        f"weight {weight:g} decay {decay:g}": float(means[i, j])
        for i, decay in enumerate(DECAYS)
        for j, weight in enumerate(WEIGHTS)
    }
    return replace(neighbours, weight=WEIGHTS[chosen_weight], decay=DECAYS[chosen_decay]), table


def _strongest(matrix: sp.csr_matrix, keep: int) -> sp.csr_matrix:
    """The `keep` largest entries of every row; of equal ones those of lower column."""
    matrix.sort_indices()
    rows = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    order = np.lexsort((matrix.indices, -matrix.data, rows))
    place = np.arange(len(rows)) - matrix.indptr[rows]  # within its row, since `order` keeps rows together
    kept = np.sort(order[place < keep])
    indptr = np.concatenate([[0], np.cumsum(np.minimum(np.diff(matrix.indptr), keep))])
    return sp.csr_matrix((matrix.data[kept], matrix.indices[kept], indptr), shape=matrix.shape)


def co_occurrence(histories: Ragged, *, num_items: int) -> sp.csr_matrix:
    """co(i, j) of training histories, as in the head of this module.

    Args:
        histories: Training histories, U ragged rows of item rows.
        num_items: N.

    Returns:
        float32 CSR [N, N]. The diagonal is dropped: an item is no reason to recommend itself.
    """
    total = sp.csr_matrix((num_items, num_items), dtype=np.float64)
    # Cut into parts of so many interactions: the pairs of one part are twenty times as many.
    marks = np.arange(0, histories.offsets[-1], CHUNK_INTERACTIONS)
    cuts = np.searchsorted(histories.offsets, marks, side="right") - 1
    for begin, end in itertools.pairwise(np.unique(np.append(cuts, len(histories)))):
        total = total + _pairs(histories.slice(int(begin), int(end)), num_items=num_items)
    return total.astype(np.float32)


def _pairs(histories: Ragged, *, num_items: int) -> sp.csr_matrix:
    items, user = histories.values.astype(np.int64), histories.row_ids
    weight = (1 / np.log(2.0 + histories.lengths))[user]
    rows, columns, data = [], [], []
    for distance in range(1, WINDOW + 1):
        same = user[distance:] == user[:-distance]
        early, late = items[:-distance][same], items[distance:][same]
        forward = weight[distance:][same] / distance
        other = early != late
        early, late, forward = early[other], late[other], forward[other]
        rows += [early, late]
        columns += [late, early]
        data += [forward, BACKWARD * forward]
    pairs = (np.concatenate(data), (np.concatenate(rows), np.concatenate(columns)))
    return sp.csr_matrix(pairs, shape=(num_items, num_items))


def recency(histories: Ragged, *, decay: float, num_items: int) -> sp.csr_matrix:
    """Weight decay^age of the last 20 items of every history (age 0: the last one).

    Args:
        histories: B ragged rows of item rows, most recent last. Rows from N on, items appended after the
            training, keep their place in the history but follow nothing: they are left out.
        decay: Weight of an item against the one after it.
        num_items: N.

    Returns:
        float32 CSR [B, N]; repeated items add up.
    """
    last = histories.last(LAST)
    age = np.repeat(last.offsets[1:], last.lengths) - 1 - np.arange(len(last.values))
    known = last.values < num_items
    offsets = np.concatenate([[0], np.cumsum(known)])[last.offsets]
    data = (decay ** age[known]).astype(np.float32)
    return sp.csr_matrix((data, last.values[known].astype(np.int64), offsets), shape=(len(last), num_items))
