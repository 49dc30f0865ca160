"""Which contents stand on which ID: sorts and run lengths over packed IDs, dear work for shared ones only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qbrec.quantizer.packing import dense_ranks, lex_order, pack, runs, sort_keys

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Resolution:
    """What became of collisions.

    Attributes:
        codes: Final IDs, the smallest unsigned type [N, L], or [N, L + 1] with a digit.
        sizes: Codes per level of the final IDs.
        moved: Items whose codes were changed.
        unresolved: Items left above the capacity, because their prefix had no room.
    """

    codes: NDArray[Any]
    sizes: tuple[int, ...]
    moved: int
    unresolved: int


@dataclass(frozen=True)
class Buckets:
    """Rows by ID.

    Attributes:
        id: Packed IDs that some row has, ascending, int64 [B].
        size: Rows on each, int64 [B].
        start: Where they begin in `order`, int64 [B].
        order: Rows sorted by (ID, row), int64 [n].
    """

    id: Ints
    size: Ints
    start: Ints
    order: Ints

    @classmethod
    def of(cls, packed: Ints, rows: Ints | None = None) -> Buckets:
        """Sort packed IDs int64 [n].

        Args:
            packed: Packed IDs int64 [n].
            rows: What to call them, ascending int64 [n]; None: 0 … n - 1.
        """
        ids, order = sort_keys(packed)
        start, size = runs(ids)
        return cls(ids[start], size, start, order if rows is None else rows[order])

    def rows(self, chosen: Ints) -> tuple[Ints, Ints]:
        """Rows of some buckets, and for each of them the place of its bucket in `chosen`; int64 [m] each."""
        size = self.size[chosen]
        owner = np.repeat(np.arange(len(chosen)), size)
        inside = np.arange(len(owner)) - np.repeat(np.cumsum(size) - size, size)
        return self.order[self.start[chosen][owner] + inside], owner


@dataclass(frozen=True)
class Units:
    """Contents on some buckets: a unit is the items of one content on one ID.

    Units are sorted by (ID, priority): the one with the most popular item comes first, then the lowest row.

    Attributes:
        bucket: Place of the unit's bucket among those asked for, int64 [U].
        place: Units of higher priority on the same ID, int64 [U].
        row: The item that speaks for the unit: its most popular one, then the lowest row; int64 [U].
        priority: Smaller goes first, over all units; int64 [U].
        weight: Items, int64 [U].
        member: All items of all units, int64 [m].
        of_member: Unit of each, int64 [m].
    """

    bucket: Ints
    place: Ints
    row: Ints
    priority: Ints
    weight: Ints
    member: Ints
    of_member: Ints

    @classmethod
    def of(cls, buckets: Buckets, chosen: Ints, *, group: Ints, popularity: Ints) -> Units:
        """Units of some buckets.

        Args:
            buckets: All buckets.
            chosen: Those that matter, ascending int64 [b].
            group: Content group of every row; equal content, equal group.
            popularity: Interactions of every row.
        """
        member, owner = buckets.rows(chosen)
        first = lex_order(member, -popularity[member])
        member, owner = member[first], owner[first]  # from here on an item's place is its priority
        content, count = dense_ranks(group[member])
        # Sorts are stable: within a unit, and of units within an ID, the highest priority comes first.
        kinds, order = sort_keys(owner * count + content)
        start, weight = runs(kinds)
        head = order[start]
        rank = lex_order(head, owner[head])
        head = head[rank]
        unit = np.empty(len(rank), dtype=np.int64)
        unit[rank] = np.arange(len(rank))
        of_member = np.empty(len(member), dtype=np.int64)
        of_member[order] = np.repeat(unit, weight)
        bucket = owner[head]
        begin, size = runs(bucket)
        place = np.arange(len(bucket)) - np.repeat(begin, size)
        return cls(bucket, place, member[head], head, weight[rank], member, of_member)

    def per_bucket(self, count: int) -> Ints:
        """Units on each of the `count` buckets that were asked for, int64 [b]."""
        return np.bincount(self.bucket, minlength=count)

    def write(self, out: NDArray[Any], some: Ints, last: Ints) -> int:
        """Write last codes of some units into the codes of their items.

        Args:
            out: Codes of all rows [N, L].
            some: Units int64 [u].
            last: Their last codes int64 [u]; -1: they stay as they are.

        Returns:
            Number of items that stay.
        """
        new = np.full(len(self.row), -1, dtype=np.int64)
        new[some] = last
        code = new[self.of_member]
        out[self.member[code >= 0], -1] = code[code >= 0]
        return int(self.weight[some][last < 0].sum())


def live_buckets(codes: NDArray[Any], sizes: Sequence[int], retired: NDArray[np.bool_] | None) -> Buckets:
    """Buckets of the rows that are not retired (None: of all rows)."""
    if retired is None or not retired.any():
        return Buckets.of(pack(codes, sizes))
    rows = np.flatnonzero(~retired)
    return Buckets.of(pack(codes[rows], sizes), rows)


def contents_per_id(packed: Ints, group: Ints) -> tuple[Ints, Ints]:
    """IDs ascending, int64 [B], and the different contents on each, int64 [B].

    Args:
        packed: Packed IDs int64 [n].
        group: Content groups int64 [n].
    """
    ids, order = sort_keys(packed)
    start, size = runs(ids)
    content, count = dense_ranks(group[order])
    pairs, _ = sort_keys(np.repeat(np.arange(len(start)), size) * count + content)
    first, _ = runs(pairs)
    return ids[start], np.bincount(pairs[first] // max(count, 1), minlength=len(start))
