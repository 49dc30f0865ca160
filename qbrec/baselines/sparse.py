"""Ranks from sparse scores: a catalogue's dense scores are never made while a baseline is tuned."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from qbrec.storage.ragged import Ragged


class SparseRace:
    """One batch of users whose candidates are scored sparsely; everything else ranks below, by popularity.

    What does not depend on the discount is worked out once, so that a grid of them costs a comparison each.

    Args:
        raw: Positive scores, float32 CSR [B, N]; its indices are sorted in place.
        targets: Item row sought, [B].
        places: Popularity order (`ranking.tie_rank`), breaks ties and ranks all items without a score, [N].
        seen: Items that do not compete, `B` ragged rows.
        allowed: Candidates, bool [N].
    """

    def __init__(
        self,
        raw: sp.csr_matrix,
        targets: NDArray[np.int64],
        *,
        places: NDArray[np.int64],
        seen: Ragged,
        allowed: NDArray[np.bool_] | None,
    ) -> None:
        raw.sort_indices()
        self.batch, self.num_items = raw.shape
        self.rows = np.repeat(np.arange(self.batch, dtype=np.int64), np.diff(raw.indptr))
        self.items, self.data = raw.indices, raw.data
        key = self.rows * self.num_items + self.items  # ascending
        gone = np.unique(seen.row_ids * self.num_items + seen.values)
        goal = np.arange(self.batch, dtype=np.int64) * self.num_items + targets
        self.competes = np.ones(len(key), bool) if allowed is None else allowed[self.items]
        at, hit = _find(key, gone)
        self.competes[at[hit]] = False
        self.goal_at, self.goal_scored = _find(key, goal)
        self.goal_more_popular = places[self.items] < places[targets[self.rows]]
        # A target without a score also loses to every more popular item without one that still competes.
        popular = np.sort(places if allowed is None else places[allowed])
        self.fill = np.searchsorted(popular, places[targets])
        rest_rows, rest_items = np.divmod(gone[~hit], self.num_items)
        for rows, items in ((self.rows, self.items), (rest_rows, rest_items)):
            ahead = places[items] < places[targets[rows]]
            if allowed is not None:
                ahead &= allowed[items]
            self.fill -= np.bincount(rows[ahead], minlength=self.batch)
        self.lost = _find(gone, goal)[1]
        if allowed is not None:
            self.lost |= ~allowed[targets]

    def ranks(self, discount: NDArray[np.float32]) -> NDArray[np.int64]:
        """Rank of each target with seen items removed.

        Args:
            discount: Positive factor of every candidate's score, [N].

        Returns:
            int64 [B], as `ranking.target_ranks` gives for the dense scores; N + 1 for a target that was seen.
        """
        score = self.data * discount[self.items]
        own = np.zeros(self.batch, score.dtype)
        own[self.goal_scored] = score[self.goal_at[self.goal_scored]]
        mine = own[self.rows]
        beats = (score > mine) | ((score == mine) & self.goal_more_popular)
        ranks = 1 + np.bincount(self.rows[beats & self.competes], minlength=self.batch)
        ranks = np.where(self.goal_scored, ranks, ranks + self.fill)
        return np.where(self.lost, self.num_items + 1, ranks)


def _find(sorted_keys: NDArray[Any], keys: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Place of each key among the sorted ones, and whether it is there."""
    at = np.searchsorted(sorted_keys, keys)
    found = at < len(sorted_keys)
    found[found] = sorted_keys[at[found]] == keys[found]
    return at, found
