"""Ids as 64-bit hashes, so that millions of them need no Python objects."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from qbrec.storage.hashing import combine64, mix64, rows_of

Hashes = NDArray[np.uint64]
_WAITING = 1 << 18  # hashes


def hash_ids(column: pa.ChunkedArray | pa.Array) -> Hashes:
    """Hash of every id, by eight bytes at a time over the whole column.

    Good for counting and for membership (two of 10⁸ ids share a hash with probability 3 · 10⁻⁴), never
    written: the order of item rows and users is that of `qbrec.storage.hashing.hash64`.

    Args:
        column: n strings without nulls.

    Returns:
        Hashes, uint64 [n].
    """
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    column = column.cast(pa.large_binary())
    n = len(column)
    offsets = np.frombuffer(column.buffers()[1], dtype=np.int64)[column.offset : column.offset + n + 1]
    start, lengths = offsets[:-1] - offsets[0], np.diff(offsets)
    raw = np.frombuffer(column.buffers()[2] or b"", dtype=np.uint8)[offsets[0] : offsets[-1]]
    # The last word of the last id reads past its end.
    words = np.lib.stride_tricks.sliding_window_view(np.concatenate([raw, np.zeros(8, np.uint8)]), 8)
    hashes = mix64(lengths.astype(np.uint64))
    for begin in range(0, int(lengths.max(initial=0)), 8):
        at = np.flatnonzero(lengths > begin)
        word = np.ascontiguousarray(words[start[at] + begin]).view("<u8").ravel()
        spare = np.maximum(8 - (lengths[at] - begin), 0).astype(np.uint64) * np.uint64(8)
        word = word & (np.uint64(0xFFFFFFFFFFFFFFFF) >> spare)
        hashes[at] = combine64(hashes[at], word)
    return hashes


class HashSet:
    """A growing set of hashes: sorted arrays, each at least twice as long as the next; 8 bytes an element."""

    def __init__(self) -> None:
        self._levels: list[Hashes] = []
        self._waiting: list[Hashes] = []

    def __len__(self) -> int:
        self._take()
        return sum(map(len, self._levels))

    def update(self, hashes: Hashes) -> None:
        """Add hashes, many at a time: searching the whole set for each small batch costs far more."""
        self._waiting.append(hashes)
        if sum(map(len, self._waiting)) >= _WAITING:
            self._take()

    def _take(self) -> None:
        if self._waiting:
            hashes, self._waiting = np.concatenate(self._waiting), []
            self.add(hashes)

    def add(self, hashes: Hashes) -> NDArray[np.bool_]:
        """Add hashes; True for the first of each that was not there before, bool [n]."""
        self._take()
        unique, first = np.unique(hashes, return_index=True)
        fresh = ~self.contains(unique)
        if fresh.any():
            self._levels.append(unique[fresh])
        while len(self._levels) > 1 and len(self._levels[-2]) < 2 * len(self._levels[-1]):
            merged = np.concatenate([self._levels.pop(), self._levels.pop()])
            merged.sort()
            self._levels.append(merged)
        out = np.zeros(len(hashes), dtype=np.bool_)
        out[first[fresh]] = True
        return out

    def contains(self, hashes: Hashes) -> NDArray[np.bool_]:
        """Membership, bool [n]."""
        self._take()
        found = np.zeros(len(hashes), dtype=np.bool_)
        for level in self._levels:
            found |= rows_of(level, hashes) >= 0
        return found

    def sorted(self) -> Hashes:
        """All of them in order, uint64 [n]."""
        self._take()
        values = np.concatenate(self._levels) if self._levels else np.zeros(0, dtype=np.uint64)
        values.sort()
        return values
