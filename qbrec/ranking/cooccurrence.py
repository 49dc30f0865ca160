"""Which items follow which: decayed co-occurrence in training histories, and what a history still remembers.

`FOLLOWS`: co(i, j) sums, over training histories of length n and over their pairs at a distance d ≤ 10, 1 /
(d · log(2 + n)) when j comes after i and half of that when it comes before. `NEXT` counts the very next item
alone, `TOGETHER` every pair within 50 positions alike, whatever the order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from operator import add

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


class Occurrences:
    """Where some of the items occur in training histories, item by item, to count what stands around them.

    What is counted of an item does not depend on the other items: ranks may share them as they like.

    Args:
        histories: Training histories, U ragged rows of item rows.
        items: Rows of the items, without a gap.
        num_items: N, of all.
    """

    def __init__(self, histories: Ragged, items: range, *, num_items: int) -> None:
        self._histories, self._first, self._num_items = histories, items.start, num_items
        values, offsets = histories.values, histories.offsets
        places = np.flatnonzero((values >= items.start) & (values < items.stop))
        # 4 bytes each: there are as many as interactions.
        own = (values[places] - items.start).astype(np.int32)
        users = (np.searchsorted(offsets, places, side="right") - 1).astype(np.int32)
        order = np.argsort(own, kind="stable")
        self._own, self._places, self._users = own[order], places[order], users[order]
        # Occurrences before each item; those of all, last.
        self._ends = np.concatenate([[0], np.cumsum(np.bincount(own, minlength=len(items)))])
        self._weights = 1 / np.log(2.0 + histories.lengths)

    def counted(self, counting: Counting) -> Iterator[sp.csr_matrix]:
        """Rows of co(i, j) of the items, in their order, as many at once as memory allows.

        Args:
            counting: What a pair counts.

        Yields:
            float32 CSR [n, N]; the n are those of all items together. The diagonal is dropped: an item is no
            reason to recommend itself.
        """
        # An occurrence is in twice the window pairs, at most.
        most = max(1, CHUNK_PAIRS // (2 * counting.window))
        ends, first = self._ends, 0
        while first < len(ends) - 1:
            last = max(first + 1, int(np.searchsorted(ends, ends[first] + most, side="right")) - 1)
            begin, end = int(ends[first]), int(ends[last])
            # Several where one item alone has too many.
            starts = range(begin, max(end, begin + 1), most)
            parts = (self._part(range(first, last), s, min(s + most, end), counting) for s in starts)
            yield reduce(add, parts).astype(np.float32)
            first = last

    def _part(self, items: range, begin: int, end: int, counting: Counting) -> sp.csr_matrix:
        """What some occurrences of some items (numbered from our first) count, float64 CSR [n, N]."""
        own, places, users = (x[begin:end] for x in (self._own, self._places, self._users))
        values, offsets = self._histories.values, self._histories.offsets
        late = early = np.arange(len(own))  # those that have another one so far after them, before them
        rows, columns, data = [own[:0]], [own[:0]], [np.zeros(0)]
        for distance in range(1, counting.window + 1):
            late = late[places[late] + distance < offsets[users[late] + 1]]
            early = early[places[early] - distance >= offsets[users[early]]]
            if not len(late) and not len(early):
                break
            for at, step, factor in ((late, distance, 1.0), (early, -distance, counting.backward)):
                if not factor:
                    continue
                others = values[places[at] + step].astype(np.int64, copy=False)
                kept = others != own[at] + self._first
                at = at[kept]
                weight = self._weights[users[at]] / distance if counting.discounted else np.ones(len(at))
                rows.append(own[at])
                columns.append(others[kept])
                data.append(factor * weight)
        pairs = np.concatenate(data), (np.concatenate(rows) - items.start, np.concatenate(columns))
        return sp.csr_matrix(pairs, shape=(len(items), self._num_items))


def co_occurrence(histories: Ragged, *, num_items: int, counting: Counting = FOLLOWS) -> sp.csr_matrix:
    """co(i, j) of training histories, as in the head of this module.

    Args:
        histories: Training histories, U ragged rows of item rows.
        num_items: N.
        counting: What a pair counts.

    Returns:
        float32 CSR [N, N], see `Occurrences.counted`.
    """
    occurrences = Occurrences(histories, range(num_items), num_items=num_items)
    return sp.vstack(list(occurrences.counted(counting)), "csr")


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
