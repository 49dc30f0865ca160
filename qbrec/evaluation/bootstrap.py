"""Bootstrap over users: intervals of means and of paired differences, as one matrix product."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qbrec.engine.threads import one_blas_thread

CONFIDENCE = 0.95
# Above this many users, random groups of users are resampled instead: the same variance at a bounded cost.
MAX_UNITS = 65_536
_CHUNK_DRAWS = 1 << 23

Cell = dict[str, float]


class UserSums:
    """Sums of per-user values by resampling unit (a user, or a random group of users).

    Args:
        num_users: Users.
        seed: Of the groups.
        max_units: Users up to which each is a unit of its own.
    """

    def __init__(self, num_users: int, *, seed: int, max_units: int = MAX_UNITS) -> None:
        self.num_units = min(num_users, max_units)
        units = np.arange(num_users) % self.num_units
        self._unit = units if num_users <= max_units else np.random.default_rng(seed).permutation(units)
        self._columns: list[NDArray[np.float64]] = []

    def add(self, values: NDArray[np.float64]) -> slice:
        """Add columns [B, C] of per-user values; returns their places."""
        begin = len(self._columns)
        for column in np.asarray(values, np.float64).T:
            sums = np.bincount(self._unit, weights=column, minlength=self.num_units)
            self._columns.append(sums.astype(np.float64))
        return slice(begin, len(self._columns))

    def totals(self) -> NDArray[np.float64]:
        """Sum of every column over all users, float64 [C]."""
        return np.array([column.sum() for column in self._columns])

    @one_blas_thread()
    def resampled(self, *, resamples: int, seed: int) -> NDArray[np.float64]:
        """Sum of every column in every resample, float64 [R, C]; the same resamples for all columns.

        Each resample draws as many units as there are, with replacement. All columns share the draws, so the
        difference of two columns is their paired bootstrap.
        """
        table = np.stack(self._columns, axis=1).astype(np.float32)
        generator = np.random.default_rng(seed)
        out = np.empty((resamples, table.shape[1]))
        step = max(1, _CHUNK_DRAWS // self.num_units)
        for begin in range(0, resamples, step):
            rows = min(step, resamples - begin)
            draws = generator.integers(0, self.num_units, size=(rows, self.num_units))
            draws += np.arange(rows)[:, None] * self.num_units
            weights = np.bincount(draws.ravel(), minlength=rows * self.num_units)
            out[begin : begin + rows] = weights.reshape(rows, self.num_units).astype(np.float32) @ table
        return out


def interval(replicates: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Percentile interval of each column of [R, C], leaving out NaN (a slice without users)."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(replicates, [tail, 1 - tail], axis=0)
    return low, high
