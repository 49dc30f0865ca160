"""Scores with a bonus: exact among the best without it and the explicit candidates that have one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from qbrec.errors import DataError
from qbrec.ranking.code_index import CodeIndex
from qbrec.ranking.tables import Floats, Ints
from qbrec.ranking.topk import LOWEST, not_a_number
from qbrec.storage.ragged import Ragged

if TYPE_CHECKING:
    import scipy.sparse as sp


def rescored(
    candidates: tuple[Ints, Ints, Floats],
    best: Ints,
    scores: Floats,
    *,
    index: CodeIndex,
    exclude: Ragged | None,
    bonus: PairBonus,
) -> tuple[Ints, Floats]:
    """Top-k with a bonus among the best without it and explicit candidates.

    Args:
        candidates: User, item row and score without bonus of each, [n].
        best: Rows of the best without bonus int64 [B, k], -1: none. None of them is excluded.
        scores: Their scores, float32 [B, k].
        index: Items that may be returned.
        exclude: Items taken out per user, B ragged rows.
        bonus: Of all pairs that have one.

    Returns:
        rows int64 [B, k] and scores float32 [B, k].
    """
    batch, k = best.shape
    users, rows, values = candidates
    kept = competes(users, rows=rows, index=index, exclude=exclude)
    first, place = np.nonzero(best >= 0)
    keys = np.concatenate([users[kept], first]) * index.num_items
    keys += np.concatenate([rows[kept], best[first, place]])
    values = np.concatenate([values[kept], scores[first, place]])
    keys, found = np.unique(keys, return_index=True)
    users, rows = np.divmod(keys, index.num_items)
    values = values[found] + bonus.of(users, rows)
    if np.isnan(values).any():
        raise not_a_number()
    return best_pairs(users, rows=rows, values=values, ties=index.trie.ties[rows], k=k, batch=batch)


def best_pairs(
    users: Ints, *, rows: Ints, values: Floats, ties: Ints, k: int, batch: int
) -> tuple[Ints, Floats]:
    """The k best rows of every user, out of explicit pairs.

    Args:
        users: User of each pair, int64 [n].
        rows: Its item row, [n].
        values: What it is worth, float32 [n], never NaN; -inf counts as the lowest float.
        ties: Place of each pair among a user's pairs of equal value, [n].
        k: How many.
        batch: B.

    Returns:
        rows int64 [B, k] and values float32 [B, k], best first; row -1 and -inf where a user has fewer pairs.
    """
    order = np.lexsort((ties, -np.maximum(values, np.float32(LOWEST)), users))
    users, rows, values = users[order], rows[order], values[order]
    rank = np.arange(len(users)) - np.searchsorted(users, users)
    top = rank < k
    out_rows, out_values = np.full((batch, k), -1, np.int64), np.full((batch, k), -np.inf, np.float32)
    out_rows[users[top], rank[top]], out_values[users[top], rank[top]] = rows[top], values[top]
    return out_rows, out_values


class PairBonus:
    """Bonuses of pairs of user and row.

    Attributes:
        users: User of each, int64 [n].
        rows: Item row of each, int64 [n].
        values: Its bonus, float32 [n].
    """

    def __init__(self, bonus: sp.csr_matrix | None, num_items: int) -> None:
        self.num_items = num_items
        self.users, self.rows = np.empty(0, np.int64), np.empty(0, np.int64)
        self.values = np.empty(0, np.float32)
        if bonus is not None:
            if not bonus.has_sorted_indices:
                bonus = bonus.sorted_indices()
            self.users = np.repeat(np.arange(bonus.shape[0], dtype=np.int64), np.diff(bonus.indptr))
            self.rows, self.values = bonus.indices.astype(np.int64), bonus.data
        self._keys = self.users * num_items + self.rows

    def of(self, users: Ints, rows: Ints) -> Floats:
        """float32 [n], 0 for pairs without one."""
        if not len(self._keys):
            return np.zeros(len(users), np.float32)
        keys = users * self.num_items + rows
        place = np.searchsorted(self._keys, keys).clip(max=len(self._keys) - 1)
        return np.where(self._keys[place] == keys, self.values[place], np.float32(0))


def checked_bonus(bonus: sp.csr_matrix) -> sp.csr_matrix:
    """The bonus with each pair once, as float32.

    Raises:
        DataError: A bonus is negative or NaN: items without one could no longer be told apart in advance.
    """
    if not bonus.has_canonical_format:
        bonus = bonus.copy()
        bonus.sum_duplicates()
    if len(bonus.data) and not bonus.data.min() >= 0:
        raise DataError(
            "a bonus is negative or NaN",
            where="ranking",
            fix="give bonuses of at least 0; leave out items without one",
        )
    return bonus.astype(np.float32)


def add_bonus(scores: torch.Tensor, bonus: sp.csr_matrix, *, scale: float = 1.0) -> None:
    """Add `scale` · bonus (CSR [B, <= N]) to scores [B, N] in place."""
    rows = np.repeat(np.arange(bonus.shape[0]), np.diff(bonus.indptr))
    places = (
        torch.from_numpy(rows).to(scores.device),
        torch.from_numpy(bonus.indices.astype(np.int64)).to(scores.device),
    )
    values = torch.from_numpy(bonus.data * np.float32(scale)).to(scores)
    scores.index_put_(places, values, accumulate=True)


def competes(users: Ints, *, rows: Ints, index: CodeIndex, exclude: Ragged | None) -> NDArray[np.bool_]:
    """Which pairs of user and item row may be returned: in the index and not excluded; bool [n]."""
    found = np.ones(len(users), bool) if index.allowed is None else index.allowed[rows]
    if exclude is not None and len(exclude.values):
        gone = exclude.row_ids * index.num_items + exclude.values.astype(np.int64)
        found &= ~np.isin(users * index.num_items + rows, gone)
    return found
