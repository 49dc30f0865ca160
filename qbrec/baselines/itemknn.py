"""ItemKNN: decayed item-to-item co-occurrence, tuned on validation. No text, no images, no training.

For a user whose history ends in the items i (age 0 for the last one), a candidate j scores

    score(j) = Σ_{i in the last 20}  decay^age(i) · co(i, j) / ( (pop_j + 1)^alpha · sqrt(pop_i + 1) )

where pop counts occurrences in the training part and co(i, j) sums, over training histories of length n and
over their pairs at a distance d ≤ 10, 1 / (d · log(2 + n)) when j comes after i and half of that when it
comes before. Items that co-occur with nothing in the history rank below all others, by popularity. `alpha`
and `decay` are chosen by NDCG@10 on the validation targets (seen items removed); matrix and popularity come
from the training part alone, also for the test.

The roles of i and j were settled by measuring: this reading gives HR@10 / NDCG@10 of .1391 / .1123 on the
Amazon Musical Instruments set and .0848 / .0528 on Amazon Beauty (seen removed); the other one (alpha on
the history's item) gives .1262 / .1046 and .0804 / .0498.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray

from qbrec.baselines.sparse import SparseRace
from qbrec.ranking.cooccurrence import co_occurrence, recency
from qbrec.ranking.scorer import Domain
from qbrec.ranking.topk import tie_rank
from qbrec.ranking.validate import HistoriesLike, contexts_and_targets, drawn_users
from qbrec.storage.ragged import Ragged

ALPHAS = (0.1, 0.2, 0.3, 0.5)
DECAYS = (0.6, 0.8, 0.9)
TUNING_USERS = 50_000
CHUNK_USERS = 1024

Array = NDArray[Any]


class ItemKNN:
    """Item-to-item neighbours by co-occurrence.

    Args:
        co: co(i, j), float32 CSR [N, N], row i the item of the history, column j the candidate.
        counts: Training occurrences of each item, int64 [N].
        alpha: How much the candidate's popularity is discounted.
        decay: Weight of the second to last item of a history relative to the last.
    """

    name = "itemknn"

    def __init__(self, co: sp.csr_matrix, counts: Array, *, alpha: float = 0.2, decay: float = 0.8) -> None:
        assert co.shape == (len(counts), len(counts))
        self.co, self.counts, self.alpha, self.decay = co, counts, alpha, decay
        self.num_items = len(counts)
        self._normalised = (sp.diags(1 / np.sqrt(counts + 1.0)) @ co).astype(np.float32)
        self._matrix = self._weighted(alpha)
        # Below every positive score, and distinct as far as float32 reaches; ties go by popularity as well.
        self._fill = torch.from_numpy((-(tie_rank(counts) + 1.0) / self.num_items).astype(np.float32))

    @classmethod
    def fit(cls, training: Ragged, *, num_items: int) -> ItemKNN:
        """Count co-occurrences in the training part of the histories (users × `rows[:cut0]`)."""
        counts = np.bincount(training.values, minlength=num_items)
        return cls(co_occurrence(training, num_items=num_items), counts)

    def tuned(
        self,
        histories: HistoriesLike,
        *,
        allowed: NDArray[np.bool_] | None = None,
        seed: int = 0,
        on_batch: Callable[[int], None] | None = None,
    ) -> ItemKNN:
        """The same neighbours with the `alpha` and `decay` of the best NDCG@10 on the validation targets.

        Args:
            histories: Histories of the target domain.
            allowed: Candidates, bool [N].
            seed: Of the draw where there are more than 50,000 users with a validation target.
            on_batch: Called with the number of users done, for progress.

        Returns:
            A new ItemKNN; this one's settings where no user has a validation target.
        """
        users = drawn_users(histories, max_users=TUNING_USERS, seed=seed)
        if not len(users):
            return self
        places = tie_rank(self.counts)
        discounts = [((self.counts + 1.0) ** -alpha).astype(np.float32) for alpha in ALPHAS]
        gains = np.zeros((len(DECAYS), len(ALPHAS)))
        for begin in range(0, len(users), CHUNK_USERS):
            batch = users[begin : begin + CHUNK_USERS]
            contexts, targets = contexts_and_targets(histories, batch, part=0)
            for d, decay in enumerate(DECAYS):
                raw = recency(contexts, decay=decay, num_items=self.num_items) @ self._normalised
                race = SparseRace(raw, targets, places=places, seen=contexts, allowed=allowed)
                for a, discount in enumerate(discounts):
                    ranks = race.ranks(discount)
                    gains[d, a] += np.where(ranks <= 10, 1 / np.log2(ranks + 1.0), 0.0).sum()
            if on_batch is not None:
                on_batch(len(batch))
        best = int(gains.argmax())
        alpha, decay = ALPHAS[best % len(ALPHAS)], DECAYS[best // len(ALPHAS)]
        return ItemKNN(self.co, self.counts, alpha=alpha, decay=decay)

    def scores(self, histories: Ragged, domain: Domain = 0) -> torch.Tensor:
        """Scores float32 [B, N]: positive for neighbours, below zero (by popularity) for all others."""
        found = recency(histories, decay=self.decay, num_items=self.num_items) @ self._matrix
        out = self._fill.repeat(len(histories), 1)
        dense = out.numpy()
        rows = np.repeat(np.arange(found.shape[0]), np.diff(found.indptr))
        dense[rows, found.indices] = found.data
        return out

    def _weighted(self, alpha: float) -> sp.csr_matrix:
        return (self._normalised @ sp.diags((self.counts + 1.0) ** -alpha)).tocsr().astype(np.float32)
