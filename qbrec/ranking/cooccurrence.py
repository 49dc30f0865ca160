"""Which items follow which: decayed co-occurrence in training histories, and what a history still remembers.

`FOLLOWS`: co(i, j) sums, over training histories of length n and over their pairs at a distance d ≤ 10, 1 /
(d · log(2 + n)) when j comes after i and half of that when it comes before. `NEXT` counts the very next item
alone, `TOGETHER` every pair within 50 positions alike, whatever the order.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from qbrec.storage.ragged import Ragged

LAST = 20
CHUNK_PAIRS = 1 << 25  # counted at once


@dataclass(frozen=True)
class Counting:
    """What a pair of items in a history counts.

    Attributes:
        window: Largest distance that counts.
        backward: Weight of a pair in the opposite direction.
        discounted: Whether distant pairs and long histories count for less.
    """

    window: int
    backward: float
    discounted: bool = True


FOLLOWS = Counting(window=10, backward=0.5)
NEXT = Counting(window=1, backward=0.0)
TOGETHER = Counting(window=50, backward=1.0, discounted=False)


def co_occurrence(histories: Ragged, *, num_items: int, counting: Counting = FOLLOWS) -> sp.csr_matrix:
    """co(i, j) of training histories, as in the head of this module.

    Args:
        histories: Training histories, U ragged rows of item rows.
        num_items: N.
        counting: What a pair counts.

    Returns:
        float32 CSR [N, N]. The diagonal is dropped: an item is no reason to recommend itself.
    """
    total = sp.csr_matrix((num_items, num_items), dtype=np.float64)
    # The pairs of a part are twice the window times its interactions, at most.
    marks = np.arange(0, histories.offsets[-1], max(1, CHUNK_PAIRS // (2 * counting.window)))
    cuts = np.searchsorted(histories.offsets, marks, side="right") - 1
    for begin, end in itertools.pairwise(np.unique(np.append(cuts, len(histories)))):
        part = histories.slice(int(begin), int(end))
        total = total + _pairs(part, counting, num_items=num_items)
    return total.astype(np.float32)


def _pairs(histories: Ragged, counting: Counting, *, num_items: int) -> sp.csr_matrix:
    items, user = histories.values.astype(np.int64), histories.row_ids
    weight = (1 / np.log(2.0 + histories.lengths))[user]
    longest = int(histories.lengths.max(initial=0))
    rows, columns, data = [], [], []
    for distance in range(1, min(counting.window, max(longest - 1, 1)) + 1):
        same = user[distance:] == user[:-distance]
        early, late = items[:-distance][same], items[distance:][same]
        forward = weight[distance:][same] / distance if counting.discounted else np.ones(len(early))
        other = early != late
        early, late, forward = early[other], late[other], forward[other]
        rows.append(early)
        columns.append(late)
        data.append(forward)
        if counting.backward:
            rows.append(late)
            columns.append(early)
            data.append(counting.backward * forward)
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
    kept = last.where(known)
    data = (decay ** age[known]).astype(np.float32)
    return sp.csr_matrix((data, kept.values.astype(np.int64), kept.offsets), shape=(len(last), num_items))
