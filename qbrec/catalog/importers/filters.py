"""Filters that need all interactions at once, on 64-bit hashes in files: repeats, and the k-core."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from qbrec.catalog.importers.ids import Hashes, HashSet
from qbrec.storage.diskfull import writing
from qbrec.storage.hashing import combine64, rows_of

CHUNK = 1 << 22  # interactions in memory at a time
_BUCKET = 1 << 21  # interactions a bucket of pairs aims at
_PAIR = np.dtype([("pair", "<u8"), ("time", "<i8"), ("row", "<i8")])
Number = TypeVar("Number", np.uint64, np.int64)


class Spool:
    """Hashes and times of all interactions, in the order of rows, in three files.

    Args:
        folder: Where they are written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.rows = folder, 0
        self._files = {name: open(folder / name, "wb") for name in ("user", "item", "time")}  # noqa: SIM115

    def append(self, *, user: Hashes, item: Hashes, time: NDArray[np.int64]) -> None:
        """Add interactions: hashes of users and items, uint64 [n]; times, int64 [n]."""
        for name, values in (("user", user), ("item", item), ("time", time)):
            with writing(self.folder / name):
                self._files[name].write(np.ascontiguousarray(values).data)
        self.rows += len(user)

    def close(self) -> None:
        """End the writing; reading follows."""
        for name, file in self._files.items():
            with writing(self.folder / name):
                file.close()

    def chunks(self) -> Iterator[tuple[slice, Hashes, Hashes, NDArray[np.int64]]]:
        """Rows in order: which, and their user hashes, item hashes and times."""
        for begin in range(0, self.rows, CHUNK):
            rows = slice(begin, min(begin + CHUNK, self.rows))
            user, item = self._part("user", np.uint64, rows), self._part("item", np.uint64, rows)
            yield rows, user, item, self._part("time", np.int64, rows)

    def _part(self, name: str, kind: type[Number], rows: slice) -> NDArray[Number]:
        path, count = self.folder / name, rows.stop - rows.start
        return np.fromfile(path, dtype=kind, count=count, offset=rows.start * np.dtype(kind).itemsize)


def new_mask(spool: Spool) -> NDArray[np.bool_]:
    """A mask over all rows, in a file, all True."""
    mask = _mapped(spool.folder / "keep", np.bool_, spool.rows)
    mask[:] = True
    return mask


def drop_repeats(spool: Spool, keep: NDArray[np.bool_]) -> int:
    """Of the interactions of a user with an item, keep the earliest.

    Args:
        spool: All interactions.
        keep: bool [n]; repeats become False.

    Returns:
        How many were dropped.
    """
    bits = max(0, int(np.ceil(np.log2(max(spool.rows, 1) / _BUCKET))))
    shift = np.uint64(64 - bits)

    def bucket_of(pair: Hashes) -> NDArray[np.int64]:
        # Shifting a 64-bit number by 64 is undefined.
        return (pair >> shift).astype(np.int64) if bits else np.zeros(len(pair), dtype=np.int64)

    sizes = np.zeros(1 << bits, dtype=np.int64)
    for _, user, item, _ in spool.chunks():
        sizes += np.bincount(bucket_of(combine64(user, item)), minlength=len(sizes))
    ends = np.cumsum(sizes)
    free = ends - sizes
    pairs = _mapped(spool.folder / "pairs", _PAIR, spool.rows)
    for rows, user, item, time in spool.chunks():
        pair = combine64(user, item)
        bucket = bucket_of(pair)
        order = np.argsort(bucket, kind="stable")
        counts = np.bincount(bucket, minlength=len(sizes))
        place = np.arange(len(pair)) + np.repeat(free - (np.cumsum(counts) - counts), counts)
        for name, values in (("pair", pair), ("time", time), ("row", np.arange(rows.start, rows.stop))):
            pairs[name][place] = values[order]
        free += counts
    dropped = 0
    for begin, end in zip(ends - sizes, ends, strict=True):
        part = np.array(pairs[begin:end])
        part = part[np.lexsort((part["row"], part["time"], part["pair"]))]
        repeats = part["row"][1:][part["pair"][1:] == part["pair"][:-1]]
        keep[repeats] = False
        dropped += len(repeats)
    return dropped


def keep_core(spool: Spool, keep: NDArray[np.bool_], *, k: int) -> int:
    """Keep the k-core: the largest set in which every user and every item has k interactions.

    Args:
        spool: All interactions.
        keep: bool [n], rows to start from; those outside the core become False.
        k: Interactions a user and an item need.

    Returns:
        How many were dropped.
    """
    user_set, item_set = HashSet(), HashSet()
    for rows, user, item, _ in spool.chunks():
        user_set.add(user[keep[rows]])
        item_set.add(item[keep[rows]])
    users, items = user_set.sorted(), item_set.sorted()
    del user_set, item_set
    edges = _mapped(spool.folder / "edges", np.dtype("<u4"), 2 * spool.rows).reshape(-1, 2)
    left = 0
    for rows, user, item, _ in spool.chunks():
        fine = keep[rows]
        end = left + int(fine.sum())
        edges[left:end, 0] = rows_of(users, user[fine])
        edges[left:end, 1] = rows_of(items, item[fine])
        left = end
    while True:
        user_count = np.zeros(len(users), dtype=np.int64)
        item_count = np.zeros(len(items), dtype=np.int64)
        for begin in range(0, left, CHUNK):
            part = np.array(edges[begin : min(begin + CHUNK, left)])
            np.add.at(user_count, part[:, 0], 1)
            np.add.at(item_count, part[:, 1], 1)
        user_fine, item_fine = user_count >= k, item_count >= k
        before, left = left, 0
        for begin in range(0, before, CHUNK):
            part = np.array(edges[begin : min(begin + CHUNK, before)])
            part = part[user_fine[part[:, 0]] & item_fine[part[:, 1]]]
            # The survivors close up in place: they never overtake what is still to be read.
            edges[left : left + len(part)] = part
            left += len(part)
        if left == before:
            break
    users, items = users[user_fine], items[item_fine]
    dropped = 0
    for rows, user, item, _ in spool.chunks():
        fine = (rows_of(users, user) >= 0) & (rows_of(items, item) >= 0)
        dropped += int((keep[rows] & ~fine).sum())
        keep[rows] &= fine
    return dropped


def _mapped(path: Path, kind: Any, length: int) -> NDArray[Any]:
    """An array in a file, so that the system may write it out where memory is short."""
    with writing(path), open(path, "wb") as file:
        # Blocks are taken now: a full disk would otherwise end the process at some later page.
        os.posix_fallocate(file.fileno(), 0, max(length, 1) * np.dtype(kind).itemsize)
    return np.memmap(path, dtype=kind, mode="r+", shape=(length,)) if length else np.zeros(0, dtype=kind)
