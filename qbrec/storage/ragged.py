"""Variable-length rows as one flat array and offsets: histories, feature tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Ragged:
    """`B` rows of different lengths.

    Attributes:
        values: All rows one after the other, [Σ] or [Σ, D], any dtype.
        offsets: Row `i` is `values[offsets[i]:offsets[i + 1]]`; int64 [B + 1], starting at 0.
    """

    values: NDArray[Any]
    offsets: NDArray[np.int64]

    def __post_init__(self) -> None:
        assert self.offsets.ndim == 1
        assert self.offsets[0] == 0
        assert self.offsets[-1] == len(self.values)

    @classmethod
    def from_lists(cls, rows: Sequence[Sequence[Any]], *, dtype: Any = np.int64) -> Ragged:
        """Build from nested sequences (tests and small requests)."""
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        flat = [value for row in rows for value in row]
        return cls(np.asarray(flat, dtype=dtype), offsets)

    @classmethod
    def from_lengths(cls, values: NDArray[Any], lengths: NDArray[Any]) -> Ragged:
        """Build from flat values and the length of each row."""
        offsets = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        return cls(values, offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Length of each row, int64 [B]."""
        return np.diff(self.offsets)

    @property
    def row_ids(self) -> NDArray[np.int64]:
        """For each value the row it belongs to, int64 [Σ]."""
        return np.repeat(np.arange(len(self), dtype=np.int64), self.lengths)

    def row(self, index: int) -> NDArray[Any]:
        """Values of one row, a view."""
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    def slice(self, begin: int, end: int) -> Ragged:
        """Rows `begin` to `end` as views."""
        offsets = self.offsets[begin : end + 1]
        return Ragged(self.values[offsets[0] : offsets[-1]], offsets - offsets[0])

    def take(self, index: NDArray[Any]) -> Ragged:
        """Rows in the order of `index`, repeated where `index` repeats."""
        return self._windows(self.offsets[:-1][index], self.lengths[index])

    def last(self, n: int) -> Ragged:
        """The last `n` values of every row (all of a shorter one)."""
        lengths = np.minimum(self.lengths, n)
        return self._windows(self.offsets[1:] - lengths, lengths)

    def prefix(self, lengths: NDArray[Any]) -> Ragged:
        """The first `lengths[i]` values of row `i`; never more than it has."""
        return self._windows(self.offsets[:-1], np.minimum(self.lengths, lengths))

    def where(self, mask: NDArray[np.bool_]) -> Ragged:
        """The values for which `mask`, bool [Σ], holds; every row stays, if empty."""
        before = np.concatenate([[0], np.cumsum(mask)])
        return Ragged(self.values[mask], before[self.offsets])

    def followed_by(self, value: Any) -> Ragged:
        """Every row with `value` after its last one."""
        return Ragged(
            np.insert(self.values, self.offsets[1:], value), self.offsets + np.arange(len(self.offsets))
        )

    def _windows(self, begins: NDArray[np.int64], lengths: NDArray[np.int64]) -> Ragged:
        offsets = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        index = np.arange(offsets[-1], dtype=np.int64) + np.repeat(begins - offsets[:-1], lengths)
        return Ragged(self.values[index], offsets)
