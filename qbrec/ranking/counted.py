"""The arrows counted in training histories: what follows, comes next, is together; the strongest stay."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.sparse as sp

from qbrec.ranking.cooccurrence import FOLLOWS, NEXT, TOGETHER, Counting, Occurrences
from qbrec.storage.ragged import Ragged

POPULARITY_POWER = 0.1  # how much a candidate's popularity is discounted
EVEN = 0.5  # the same where order counts for nothing: the cosine of two items' users
# By graph: what a pair counts, and that discount.
COUNTED: dict[str, tuple[Counting, float]] = {
    "follows": (FOLLOWS, POPULARITY_POWER),
    "next": (NEXT, POPULARITY_POWER),
    "together": (TOGETHER, EVEN),
}


def count_arrows(
    training: Ragged,
    *,
    num_items: int,
    keep: int,
    items: range | None = None,
    on_items: Callable[[int], None] = lambda items: None,
) -> dict[str, sp.csr_matrix]:
    """The strongest arrows from each item, by graph: co(i, j) over powers of both items' popularity.

    Args:
        training: Training part of histories, item rows.
        num_items: N.
        keep: Arrows per item and graph.
        items: The items to count; their rows do not depend on the others. None: all.
        on_items: Called with the number of items done, of `len(COUNTED)` times all, for progress.

    Returns:
        float32 CSR [n, N] each, rows in the order of the items.
    """
    items = range(num_items) if items is None else items
    popularity = np.bincount(training.values, minlength=num_items) + 1.0
    occurrences = Occurrences(training, items, num_items=num_items)
    found = {}
    for name, (counting, power) in COUNTED.items():
        ours, others = popularity[items.start : items.stop] ** -0.5, popularity**-power
        parts, first = [sp.csr_matrix((0, num_items), dtype=np.float32)], 0
        for matrix in occurrences.counted(counting):
            last = first + matrix.shape[0]
            matrix.data = np.repeat(ours[first:last], np.diff(matrix.indptr)) * matrix.data
            matrix.data = (matrix.data * others[matrix.indices]).astype(np.float32)
            parts.append(strongest(matrix, keep))
            on_items(last - first)
            first = last
        found[name] = sp.vstack(parts, "csr")
    return found


def strongest(matrix: sp.csr_matrix, keep: int) -> sp.csr_matrix:
    """The `keep` largest entries of every row, by column; of equal ones those of lower column."""
    matrix.sort_indices()  # always: sums over the entries must not depend on who shares the batch
    if np.diff(matrix.indptr).max(initial=0) <= keep:
        return matrix
    rows = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    order = np.lexsort((matrix.indices, -matrix.data, rows))
    place = np.arange(len(rows)) - matrix.indptr[rows]  # within its row, since `order` keeps rows together
    kept = np.sort(order[place < keep])
    indptr = np.concatenate([[0], np.cumsum(np.minimum(np.diff(matrix.indptr), keep))])
    return sp.csr_matrix((matrix.data[kept], matrix.indices[kept], indptr), shape=matrix.shape)
