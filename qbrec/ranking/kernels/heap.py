"""The k best items so far of one user: a binary heap whose root is the worst of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qbrec.ranking.kernels.lanes import compiled

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

LOWEST = np.float32(np.finfo(np.float32).min)  # -inf is a score like any other, and ties with this one


@compiled
def _worse(score: Any, tie: Any, other: Any, other_tie: Any) -> Any:
    a, b = max(score, LOWEST), max(other, LOWEST)
    return a < b or (a == b and tie > other_tie)


@compiled
def push(scores: Floats, ties: Ints, rows: Ints, size: int, score: Any, tie: Any, row: Any) -> int:
    """Take an item in if it is among the k = len(scores) best so far; the new size."""
    k = len(scores)
    if size < k:
        i = size
        while i > 0:  # up from the end
            above = (i - 1) >> 1
            if not _worse(score, tie, scores[above], ties[above]):
                break
            scores[i], ties[i], rows[i] = scores[above], ties[above], rows[above]
            i = above
        scores[i], ties[i], rows[i] = score, tie, row
        return size + 1
    if _worse(scores[0], ties[0], score, tie):
        _sink(scores, ties, rows, k, score, tie, row)
    return size


@compiled
def _sink(scores: Floats, ties: Ints, rows: Ints, size: int, score: Any, tie: Any, row: Any) -> None:
    """Put an item in the root's place and let it down to where it belongs."""
    i = 0
    while True:
        below = 2 * i + 1
        if below >= size:
            break
        if below + 1 < size and _worse(scores[below + 1], ties[below + 1], scores[below], ties[below]):
            below += 1
        if not _worse(scores[below], ties[below], score, tie):
            break
        scores[i], ties[i], rows[i] = scores[below], ties[below], rows[below]
        i = below
    scores[i], ties[i], rows[i] = score, tie, row


@compiled
def threshold(scores: Floats, size: int, floor: Any) -> Any:
    """The score that an item must reach to be taken in, at least `floor`; -inf: any."""
    if size < len(scores):
        return floor
    worst = scores[0] if scores[0] > LOWEST else np.float32(-np.inf)
    return max(worst, floor)


@compiled
def finish(scores: Floats, ties: Ints, rows: Ints, size: int) -> None:
    """Sort a heap, the best first; places beyond its size become row -1 and score -inf."""
    for end in range(size - 1, 0, -1):
        score, tie, row = scores[end], ties[end], rows[end]
        scores[end], ties[end], rows[end] = scores[0], ties[0], rows[0]
        _sink(scores, ties, rows, end, score, tie, row)
    for i in range(size, len(scores)):
        scores[i] = np.float32(-np.inf)
        rows[i] = -1


@compiled
def holds_row(ascending: Ints, begin: int, end: int, value: Any) -> bool:
    """Whether `ascending[begin:end]` holds a value."""
    stop = end
    while begin < end:
        middle = (begin + end) >> 1
        if ascending[middle] < value:
            begin = middle + 1
        else:
            end = middle
    return bool(begin < stop and ascending[begin] == value)


@compiled
def offer(
    trie: Any, leaf: int, score: Any, seen: Ints, first: int, last: int,
    scores: Floats, ties: Ints, rows: Ints, size: int,
) -> int:  # fmt: skip
    """Push the items of a leaf that are not among `seen[first:last]`; the new size."""
    begin, end = leaf, leaf + 1
    if len(trie.buckets) > 0:
        begin, end = trie.buckets[leaf], trie.buckets[leaf + 1]
    for place in range(begin, end):
        row = np.int64(trie.rows[place])
        tie = trie.ties[row]
        if size == len(scores) and not _worse(scores[0], ties[0], score, tie):
            break  # the later ones of a bucket tie lower still
        if first < last and holds_row(seen, first, last, row):
            continue
        size = push(scores, ties, rows, size, score, tie, row)
    return size
