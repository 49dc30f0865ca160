"""Semantic IDs of a catalogue as a sorted trie in flat arrays: what exact search, ranks and beams walk over.

The IDs are packed into int64 keys and sorted, so that all items below a prefix are neighbours. What is kept
is not the keys but, level by level, the distinct prefixes in that order: the last code of each (1, 2 or 4
bytes) and where its continuations begin (4 bytes). Ten million items of 4 x 256 codes take 11 bytes each,
their rows (4 bytes) included.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from qbrec.ranking.kernels import native_kernels
from qbrec.ranking.scorer import CodeTable

MAX_BITS = 63  # of packed codes: an int64 that is never negative
MIN_DEPTH = 3  # the searches look at the three last levels at once; shorter IDs get constant levels in front
MAX_ITEMS = 2**31 - 1


class Trie(NamedTuple):
    """The arrays of an index as the kernels take them.

    `D` levels (at least `MIN_DEPTH`), `n_d` prefixes of d codes, n_0 = 1. A *leaf* is a whole ID.

    Attributes:
        codes: Last code of every prefix, depth 1 to D one after the other, unsigned or int32 [Σ n_d].
        starts: First continuation of every prefix, depth 0 to D - 1, each with its end, int32 [Σ (n_d + 1)].
        code_at: Where the prefixes of depth d + 1 begin in `codes`, int64 [D].
        start_at: Where those of depth d begin in `starts`, int64 [D].
        buckets: First item of every leaf and the end, int32 [n_D + 1]; empty: each leaf is one item.
        tail: Code of every leaf at the last level but one, [n_D].
        rows: Item rows, leaf by leaf and in the order of ties within, int32 [n].
        ties: Order of equal scores by item row, int64 [N].
    """

    codes: NDArray[Any]
    starts: NDArray[np.int32]
    code_at: NDArray[np.int64]
    start_at: NDArray[np.int64]
    buckets: NDArray[np.int32]
    tail: NDArray[Any]
    rows: NDArray[np.int32]
    ties: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class CodeIndex:
    """Sorted semantic IDs of all items, or of those that a filter allows (`only`).

    Attributes:
        semantic_ids: Codes of all items [N, L], kept as they came (they may be mapped from disk).
        trie: The arrays.
        allowed: Items in it, bool [N]; None: all.
    """

    semantic_ids: NDArray[Any]
    trie: Trie
    allowed: NDArray[np.bool_] | None = None

    @classmethod
    def build(cls, semantic_ids: NDArray[Any], *, tie_rank: NDArray[np.int64]) -> CodeIndex:
        """Sort a catalogue.

        Args:
            semantic_ids: Any integer type [N, L].
            tie_rank: Order of equal scores, a permutation [N]; items of equal ID are read in it.
        """
        num_items, levels = semantic_ids.shape
        assert levels >= 1
        assert len(tie_rank) == num_items <= MAX_ITEMS
        ties = np.asarray(tie_rank, np.int64)
        order = np.empty(num_items, np.int64)  # items of equal ID in the order of ties: the sort is stable
        order[ties] = np.arange(num_items)
        widths = [int(semantic_ids[:, level].max(initial=0)).bit_length() for level in range(levels)]
        for group in reversed(_groups(widths)):
            keys = np.zeros(num_items, np.int64)
            for level in group:
                keys <<= widths[level]
                keys |= semantic_ids[:, level]
            order = order[torch.from_numpy(keys[order]).sort(stable=True).indices.numpy()]
        return cls(semantic_ids, _trie(semantic_ids, order.astype(np.int32), ties))

    @property
    def num_items(self) -> int:
        """Items of the whole catalogue, N."""
        return len(self.semantic_ids)

    @property
    def num_ranked(self) -> int:
        """Items in this index, n."""
        return len(self.trie.rows)

    @property
    def levels(self) -> int:
        """L."""
        return int(self.semantic_ids.shape[1])

    @property
    def depth(self) -> int:
        """Levels of the trie, D: L, or `MIN_DEPTH` with constant levels in front."""
        return len(self.trie.code_at)

    @property
    def nbytes(self) -> int:
        """Bytes of the index, without the tables it was built from."""
        return sum(array.nbytes for name, array in self.trie._asdict().items() if name != "ties")

    def num_prefixes(self, length: int) -> int:
        """Distinct prefixes of `length` codes, 0 to L."""
        return self._count(length + self.depth - self.levels)

    def last_codes(self, length: int) -> NDArray[Any]:
        """Last code of each prefix of `length` ≥ 1 codes, in their order."""
        depth = length + self.depth - self.levels
        begin = int(self.trie.code_at[depth - 1])
        return self.trie.codes[begin : begin + self._count(depth)]

    def continuations(self, length: int) -> NDArray[np.int32]:
        """Where the continuations of each prefix of `length` codes begin and, last, end; prefixes by number.

        For `length` = L these are places in `rows`.
        """
        depth = length + self.depth - self.levels
        if depth == self.depth:
            buckets = self.trie.buckets
            return buckets if len(buckets) else np.arange(self.num_ranked + 1, dtype=np.int32)
        begin = int(self.trie.start_at[depth])
        return self.trie.starts[begin : begin + self._count(depth) + 1]

    @cached_property
    def used(self) -> tuple[NDArray[np.int64], ...]:
        """Codes that occur, ascending, for each of the L levels."""
        found = []
        for length in range(1, self.levels + 1):
            codes = self.last_codes(length)
            found.append(np.flatnonzero(np.bincount(codes)) if len(codes) else np.empty(0, np.int64))
        return tuple(found)

    @property
    def widest(self) -> int:
        """Codes that a model must know at least: the largest code that occurs, plus 1."""
        return 1 + max((int(codes[-1]) for codes in self.used if len(codes)), default=-1)

    @cached_property
    def dense(self) -> CodeTable:
        """Dense scores of the whole catalogue, for devices and installations without the searches."""
        return CodeTable(self.semantic_ids)

    def only(self, allowed: NDArray[np.bool_]) -> CodeIndex:
        """The index of those of its items that a filter allows.

        One pass over the trie; a filter that is asked often (a category, what is in stock) is better kept.

        Args:
            allowed: bool [N].
        """
        assert allowed.shape == (self.num_items,)
        both = allowed if self.allowed is None else allowed & self.allowed
        trie, kernels = self.trie, native_kernels(self.num_items)
        keep = both[trie.rows]
        rows = trie.rows[keep]
        thin = _thin if kernels is None else kernels.thin
        buckets = trie.buckets
        if len(buckets):
            buckets, keep = thin(buckets, keep)
            if len(buckets) == len(rows) + 1:
                buckets = buckets[:0]
        tail, codes, starts = trie.tail[keep], [], []
        for depth in range(self.depth - 1, -1, -1):
            begin = int(trie.code_at[depth])
            codes.append(trie.codes[begin : begin + len(keep)][keep])
            begin = int(trie.start_at[depth])
            above, keep = thin(trie.starts[begin : begin + self._count(depth) + 1], keep)
            starts.append(above)
        codes.reverse()
        starts.reverse()
        if not len(rows):  # the root and the constant levels stay, without continuations
            front = self.depth - self.levels
            codes[:front] = [np.zeros(1, trie.codes.dtype)] * front
            starts[:front] = [np.array([0, 1], np.int32)] * front
            starts[front] = np.zeros(2, np.int32)
        return CodeIndex(self.semantic_ids, _assembled(codes, starts, buckets, tail, rows, trie.ties), both)

    def _count(self, depth: int) -> int:
        """Prefixes of `depth` levels of the trie."""
        at = self.trie.start_at
        if depth == self.depth:
            return len(self.trie.tail)
        end = int(at[depth + 1]) if depth + 1 < self.depth else len(self.trie.starts)
        return end - int(at[depth]) - 1


def _groups(widths: list[int]) -> list[list[int]]:
    """Consecutive levels whose bits fit one int64; nearly always a single group."""
    groups: list[list[int]] = [[]]
    for level, width in enumerate(widths):
        if sum(widths[other] for other in groups[-1]) + width > MAX_BITS:
            groups.append([])
        groups[-1].append(level)
    return groups


def _trie(semantic_ids: NDArray[Any], rows: NDArray[np.int32], ties: NDArray[np.int64]) -> Trie:
    """From item rows in the order of their IDs."""
    num_items, levels = semantic_ids.shape
    largest = int(semantic_ids.max(initial=0))
    dtype = np.dtype(np.uint8 if largest < 1 << 8 else np.uint16 if largest < 1 << 16 else np.int32)
    codes, starts = [], []
    fresh = np.zeros(num_items, bool)  # whether an item is the first of its prefix
    fresh[0] = True
    first = np.zeros(1, np.int64)  # places of those
    column = np.zeros(num_items, dtype)
    for level in range(levels):
        parent, parents = column, first
        column = semantic_ids[:, level].astype(dtype)[rows]
        fresh[1:] |= column[1:] != column[:-1]
        first = np.flatnonzero(fresh)
        codes.append(column[first])
        starts.append(_ends(np.searchsorted(first, parents), len(first)))
    buckets = _ends(first, num_items) if len(first) < num_items else np.empty(0, np.int32)
    tail = parent[first]
    front = max(MIN_DEPTH - levels, 0)
    codes = [np.zeros(1, dtype)] * front + codes
    starts = [np.array([0, 1], np.int32)] * front + starts
    return _assembled(codes, starts, buckets, tail, rows, ties)


def _assembled(
    codes: list[NDArray[Any]],
    starts: list[NDArray[np.int32]],
    buckets: NDArray[np.int32],
    tail: NDArray[Any],
    rows: NDArray[np.int32],
    ties: NDArray[np.int64],
) -> Trie:
    code_at = np.cumsum([0, *(len(part) for part in codes[:-1])], dtype=np.int64)
    start_at = np.cumsum([0, *(len(part) for part in starts[:-1])], dtype=np.int64)
    return Trie(np.concatenate(codes), np.concatenate(starts), code_at, start_at, buckets, tail, rows, ties)


def _ends(begin: NDArray[np.int64], total: int) -> NDArray[np.int32]:
    return np.append(begin, total).astype(np.int32)


def _thin(starts: NDArray[np.int32], keep: NDArray[np.bool_]) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Starts of what is left when only some continuations are kept, and which prefixes have any left."""
    before = np.zeros(len(keep) + 1, np.int32)
    np.cumsum(keep, out=before[1:])
    counts = before[starts[1:]] - before[starts[:-1]]
    left = counts > 0
    out = np.zeros(int(left.sum()) + 1, np.int32)
    np.cumsum(counts[left], out=out[1:])
    return out, left
