"""Items that the same users bought: all pairs whose sets of training users overlap, exactly.

A set-similarity join by prefixes (Bayardo et al. 2007, "Scaling up all pairs similarity search"; Xiao et al.
2008, PPJoin), cut into rounds that each look at one range of items or of users:

    read      histories → (item, user) pairs of the training parts             by range of items
    prefixes  the users of each item, rarest first → the prefix of every set   by user
    join      items that meet in a prefix and pass all bounds                  by range of items
    probe     candidate pairs, once each, with the users of the first item     by range of items
    verify    users in common, counted

If two sets share at least o users, then any o users of one leave out too few to hide the meeting: the first
|x| - o + 1 of one and the first |y| - o + 1 of the other have a user in common, in whatever order users are
put. Ordered from short histories to long ones, the prefixes hold users who bought little, so that few items
meet; users with a single item, who can be in no overlap, come first and are left out. Large sets meet by
chance all the same: prefixes that are longer by l - 1 must meet l times (Wang et al. 2012, AdaptJoin), with l
growing with the set. Whatever is dropped on the way is dropped by a bound, so the result is that of comparing
all pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from qbrec.catalog.exchange import split_by
from qbrec.storage.blocks import BlockSet
from qbrec.storage.hashing import mix64
from qbrec.storage.ragged import Ragged

USER_BITS = 40  # of a key (items in the history, user number): keys put short histories first
USER_MASK = (1 << USER_BITS) - 1
# Users of the smaller set for one more meeting: 50 times fewer candidates from 1e7 interactions.
MEETING_EVERY = 16
MAX_PAIRS = 1 << 22  # pairs looked at in one step of the join, some 100 bytes each
OVERLAPS = pa.schema(
    [("a", pa.int64()), ("b", pa.int64()), ("common", pa.int64()), ("jaccard", pa.float64())]
)

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class OverlapJob:
    """The rounds, each a function of tables alone.

    Attributes:
        directory: The catalogue under construction, its histories written.
        num_items: N.
        partitions: Ranges of item rows, and groups of users.
        min_overlap: Least Jaccard similarity of two sets of users, in (0, 1].
        min_users: Least number of users in common.
    """

    directory: Path
    num_items: int
    partitions: int
    min_overlap: float
    min_users: int

    @property
    def width(self) -> int:
        """Rows of one range."""
        return -(-self.num_items // self.partitions)

    def read(self, blocks: list[tuple[int, int]]) -> tuple[list[pa.Table], int]:
        """Pairs of some ranges of history blocks, by range of items: row and key of the user.

        Returns:
            Tables (row int64, user int64 key) and the number of pairs.
        """
        histories = BlockSet.open(self.directory, "histories")
        parts = []
        for begin, end in blocks:
            for number in range(begin, end):
                block = histories.read(number, ("user", "offset", "row", "cut"))
                training = Ragged(block["row"], block["offset"]).prefix(block["cut"][:, 0])
                parts.append(training_pairs(training, block["user"], num_items=self.num_items))
        row, user = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
        return self.by_row(pa.table({"row": row, "user": user}), row), len(row)

    def prefixes(self, tables: list[pa.Table]) -> list[pa.Table]:
        """Sets of one range of items from its pairs.

        Returns:
            By user, the entries of prefixes (user, row, size of the set, place in it, signature of the set);
            and last one table of whole sets (row, size, users: the list without those of a single item).
        """
        pairs = pa.concat_tables(tables)
        row, user = (np.asarray(pairs[name], dtype=np.int64) for name in ("row", "user"))
        order = np.lexsort((user, row))
        row, user = row[order], user[order]
        begins = np.flatnonzero(np.diff(row, prepend=-1))
        sizes = np.diff(np.append(begins, len(row)))
        place = np.arange(len(row)) - np.repeat(begins, sizes)
        size = np.repeat(sizes, sizes)
        signature = np.repeat(signatures(user, begins), sizes)
        shared = user >> USER_BITS > 1
        used = shared & (place < size - self._least(size, self.min_overlap) + self._met(size))
        entries = pa.table(
            {
                "user": user[used],
                "row": row[used],
                "size": size[used].astype(np.int32),
                "place": place[used].astype(np.int32),
                "signature": signature[used],
            }
        )
        kept = sizes >= self.min_users
        users = Ragged.from_lengths(user[shared & np.repeat(kept, sizes)], _counts(shared, begins)[kept])
        sets = pa.table({"row": row[begins][kept], "size": sizes[kept], "users": _lists(users)})
        return [*split_by(entries, (user[used] & USER_MASK) % self.partitions, self.partitions), sets]

    def join(self, tables: list[pa.Table]) -> list[pa.Table]:
        """Pairs that meet at a user of one group, by range of the item with the smaller set.

        Returns:
            Tables (a, b, met: number of meetings, need: number that a pair which overlaps has in all groups).
        """
        entries = pa.concat_tables(tables)
        user, row, size, place = (
            np.asarray(entries[name], dtype=np.int64) for name in ("user", "row", "size", "place")
        )
        signature = np.asarray(entries["signature"], dtype=np.uint64)
        order = np.lexsort((row, size, user))
        user, row, size, place = user[order], row[order], size[order], place[order]
        signature = signature[order]
        found = [np.zeros((3, 0), np.int64)]
        for x, y in self._meetings(user, size, place):
            total = size[x] + size[y]
            least = np.maximum(_ceil(self.min_overlap / (1 + self.min_overlap) * total), self.min_users)
            before, after = np.minimum(place[x], place[y]), np.minimum(size[x] - place[x], size[y] - place[y])
            differ = np.bitwise_count(signature[x] ^ signature[y])
            passed = (before + after >= least) & (total - differ >= 2 * least)
            x, y = x[passed], y[passed]
            pair, first, met = np.unique(
                row[x] * self.num_items + row[y], return_index=True, return_counts=True
            )
            found.append(np.stack([pair, met, self._met(size[x[first]])]))
        pair, met, need = self._summed(np.concatenate(found, axis=1))
        a, b = np.divmod(pair, self.num_items)
        return self.by_row(pa.table({"a": a, "b": b, "met": met, "need": need}), a)

    def probe(self, sets: pa.Table, tables: list[pa.Table]) -> list[pa.Table]:
        """Candidates of one range of `a` with the set of `a`, by range of `b`: a, b, size, users."""
        pairs = pa.concat_tables(tables)
        a, b, met, need = (np.asarray(pairs[name], dtype=np.int64) for name in ("a", "b", "met", "need"))
        pair, met, need = self._summed(np.stack([a * self.num_items + b, met, need]))
        a, b = np.divmod(pair[met >= need], self.num_items)
        mine = sets.take(pa.array(np.searchsorted(np.asarray(sets["row"]), a)))
        return self.by_row(pa.table({"a": a, "b": b, "size": mine["size"], "users": mine["users"]}), b)

    def verify(self, sets: pa.Table, tables: list[pa.Table]) -> pa.Table:
        """True pairs of one range of `b` (`OVERLAPS`), a < b."""
        pairs = pa.concat_tables(tables)
        a, b, size = (np.asarray(pairs[name], dtype=np.int64) for name in ("a", "b", "size"))
        distinct, theirs = np.unique(b, return_inverse=True)
        mine = sets.take(pa.array(np.searchsorted(np.asarray(sets["row"]), distinct)))
        held, asked = _ragged(mine["users"]), _ragged(pairs["users"])
        assert len(distinct) < 1 << (63 - USER_BITS)
        have = np.sort((held.row_ids << USER_BITS) | (held.values & USER_MASK))
        owner = asked.row_ids
        want = (theirs[owner] << USER_BITS) | (asked.values & USER_MASK)
        order = np.argsort(want)  # sorted queries walk through memory once
        places = np.searchsorted(have, want[order])
        hit = have[np.minimum(places, len(have) - 1)] == want[order]
        common = np.bincount(owner[order][hit], minlength=len(pairs)).astype(np.int64)
        jaccard = common / np.maximum(size + np.asarray(mine["size"], np.int64)[theirs] - common, 1)
        true = (jaccard >= self.min_overlap) & (common >= self.min_users)
        low, high = np.minimum(a, b)[true], np.maximum(a, b)[true]
        columns = {"a": low, "b": high, "common": common[true], "jaccard": jaccard[true]}
        return pa.table(columns, schema=OVERLAPS)

    def by_row(self, table: pa.Table, row: Ints) -> list[pa.Table]:
        """Rows of a table by the range that `row` falls into."""
        return split_by(table, row // self.width, self.partitions)

    @staticmethod
    def _summed(found: Ints) -> tuple[Ints, Ints, Ints]:
        """Pairs once each, their meetings added up, and what they need; from int64 [3, n] of those."""
        pair, first, inverse = np.unique(found[0], return_index=True, return_inverse=True)
        met = np.bincount(inverse, weights=found[1], minlength=len(pair)).astype(np.int64)
        return pair, met, found[2, first]

    @property
    def _share(self) -> float:
        """What two sets must have in common, as a share of the smaller one."""
        return 2 * self.min_overlap / (1 + self.min_overlap)

    def _met(self, size: Ints) -> Ints:
        """How often a pair must meet in prefixes that much longer, by the size of its smaller set."""
        return np.minimum(1 + size // MEETING_EVERY, self._least(size, self._share))

    def _least(self, size: Ints, share: float) -> Ints:
        """Least number of users in common, when it must be `share` of a set of `size`."""
        return np.maximum(_ceil(share * size), self.min_users)

    def _meetings(self, user: Ints, size: Ints, place: Ints) -> Iterator[tuple[Ints, Ints]]:
        """Pairs (x, y) of entries of one user, x before y in the order of sizes, some at a time.

        x must reach `min_overlap` of y's size; and since a larger set needs more in common, x need only be
        looked at in a shorter prefix than y.
        """
        group = np.cumsum(np.diff(user, prepend=-1) != 0)
        shorter = place < size - self._least(size, self._share) + self._met(size)
        indexed = np.flatnonzero(shorter)
        assert int(size.max(initial=0)) < 1 << 32
        keys = (group << 32) | size
        first = np.searchsorted(keys[indexed], (group << 32) | _ceil(self.min_overlap * size))
        num = np.maximum(np.cumsum(shorter) - shorter - first, 0)
        ends = np.cumsum(num)
        begin = 0
        while begin < len(num):
            done = int(ends[begin - 1]) if begin else 0
            end = max(int(np.searchsorted(ends, done + MAX_PAIRS, side="right")), begin + 1)
            y = np.repeat(np.arange(begin, end), num[begin:end])
            offset = np.arange(len(y)) - np.repeat(ends[begin:end] - num[begin:end] - done, num[begin:end])
            yield indexed[first[y] + offset], y
            begin = end


def training_pairs(training: Ragged, users: Ints, *, num_items: int) -> tuple[Ints, Ints]:
    """Every item of every history once.

    Args:
        training: Item rows of the training part of each history.
        users: User number of each history, below 2^40.
        num_items: N.

    Returns:
        Item rows and keys of users: number of different items << 40 | user number; int64 each.
    """
    distinct = np.unique(training.row_ids * num_items + training.values)
    owner, row = np.divmod(distinct, num_items)
    lengths = np.bincount(owner, minlength=len(users))
    assert int(users.max(initial=0)) < 1 << USER_BITS
    assert int(lengths.max(initial=0)) < 1 << (63 - USER_BITS)
    return row, ((lengths.astype(np.int64) << USER_BITS) | users)[owner]


def signatures(user: Ints, begins: Ints) -> NDArray[np.uint64]:
    """64 bits of each set, bit h: whether an odd number of its users hash to h; uint64 [sets].

    Two sets whose signatures differ in d bits differ in d users at least.
    """
    if not len(begins):
        return np.zeros(0, np.uint64)
    bit = mix64((user & USER_MASK).astype(np.uint64)) >> np.uint64(58)
    return np.bitwise_xor.reduceat(np.uint64(1) << bit, begins)


def _ceil(x: Any) -> Ints:
    """Whole numbers not below x, but for what rounding has added: a bound must never be too high."""
    return np.ceil(np.asarray(x) * (1 - 1e-12)).astype(np.int64)


def _counts(mask: NDArray[np.bool_], begins: Ints) -> Ints:
    if not len(begins):
        return np.zeros(0, np.int64)
    return np.add.reduceat(mask.astype(np.int64), begins)


def _lists(users: Ragged) -> pa.Array:
    return pa.LargeListArray.from_arrays(pa.array(users.offsets), pa.array(users.values))


def _ragged(column: pa.ChunkedArray) -> Ragged:
    lists = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], pa.large_list(pa.int64()))
    return Ragged(
        lists.flatten().to_numpy(), lists.offsets.to_numpy() - (lists.offsets[0].as_py() if len(lists) else 0)
    )
