"""Items of different content on one ID: found by sorting packed IDs, moved to the nearest free last code.

All of it is a table job: sorts and run lengths over int64, one vectorised round per item that has to move
within a prefix. Items of equal content are one *unit* and share their ID; nothing forces them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from qbrec.quantizer.chunks import TILE, parallel
from qbrec.quantizer.kmeans import Assigner
from qbrec.quantizer.packing import code_dtype, pack

UNITS_AT_ONCE = 16_384  # units whose distances to all last codes are held at a time


@dataclass(frozen=True)
class Resolution:
    """Codes [N, L], number of items that moved, number left above the capacity (no room in their prefix)."""

    codes: np.ndarray
    moved: int
    unresolved: int


def next_nearest(
    codes: np.ndarray,
    sizes: Sequence[int],
    *,
    group: np.ndarray,
    popularity: np.ndarray,
    capacity: int,
    last_level: Tensor,
    residuals: Callable[[np.ndarray], Tensor],
) -> Resolution:
    """Let at most `capacity` different contents share an ID, by changing only the last code.

    A unit is the set of items with the same raw ID and the same content. Within an ID the `capacity` units of
    the most popular items stay (ties by row); the others, most popular first, each take the nearest last code
    of their prefix that still has room. Where a prefix has no room left, they stay and are counted as
    unresolved.

    Args:
        codes: Raw codes [N, L].
        sizes: Codes per level.
        group: Content group per item int64 [N]; equal content, equal group.
        popularity: Interactions per item int64 [N].
        capacity: Units of different content per ID.
        last_level: Codebook of the last level float32 [K, D].
        residuals: Rows int64 [u] -> what the levels above leave of those items, float32 [u, D].
    """
    units = _Units.of(codes, sizes, group=group, popularity=popularity)
    place = units.place_in_bucket()
    pending = np.flatnonzero(place >= capacity)
    last = units.last.copy()
    stuck = 0
    for part in _by_whole_prefixes(units.prefix[pending]):
        chosen, full = _settle(units, place, pending[part], capacity, last_level, residuals)
        last[pending[part]] = chosen
        stuck += int(units.weight[pending[part]][full].sum())
    out = codes.astype(code_dtype(sizes)).copy()
    out[:, -1] = last[units.of_item]
    return Resolution(out, int((out[:, -1] != codes[:, -1]).sum()), stuck)


@dataclass(frozen=True)
class _Units:
    """Units sorted by (prefix, priority): prefix, last code, first row, number of items, int64 [U]."""

    prefix: np.ndarray
    last: np.ndarray
    row: np.ndarray
    weight: np.ndarray
    of_item: np.ndarray  # unit of each item, [N]

    @classmethod
    def of(
        cls, codes: np.ndarray, sizes: Sequence[int], *, group: np.ndarray, popularity: np.ndarray
    ) -> _Units:
        packed, rows = pack(codes, sizes), np.arange(len(codes))
        # The most popular item of a unit speaks for it: sort so that it comes first, then cut into runs.
        order = np.lexsort((rows, -popularity, group, packed))
        fresh = np.ones(len(order), dtype=bool)
        fresh[1:] = (packed[order][1:] != packed[order][:-1]) | (group[order][1:] != group[order][:-1])
        start = np.flatnonzero(fresh)
        head = order[start]
        weight = np.diff(np.append(start, len(order)))
        prefix = pack(codes[head, :-1], sizes[:-1])
        rank = np.lexsort((head, -popularity[head], prefix))
        inverse = np.empty_like(rank)
        inverse[rank] = np.arange(len(rank))
        of_item = np.empty(len(order), dtype=np.int64)
        of_item[order] = inverse[np.cumsum(fresh) - 1]
        last = codes[head, -1].astype(np.int64)
        return cls(prefix[rank], last[rank], head[rank], weight[rank], of_item)

    def place_in_bucket(self) -> np.ndarray:
        """How many units of higher priority have the same ID, int64 [U]."""
        order = np.lexsort((np.arange(len(self.prefix)), self.last, self.prefix))
        return _place(self.prefix[order], self.last[order])[np.argsort(order)]


def _place(*sorted_keys: np.ndarray) -> np.ndarray:
    """Position of each element in its run of equal keys."""
    count = len(sorted_keys[0])
    fresh = np.ones(count, dtype=bool)
    fresh[1:] = np.any([key[1:] != key[:-1] for key in sorted_keys], axis=0)
    start = np.flatnonzero(fresh)
    return np.arange(count) - np.repeat(start, np.diff(np.append(start, count)))


def _by_whole_prefixes(prefix: np.ndarray) -> list[slice]:
    """Cut sorted prefixes into parts of about `UNITS_AT_ONCE` units, never inside a prefix."""
    cuts = [0]
    while cuts[-1] < len(prefix):
        stop = cuts[-1] + UNITS_AT_ONCE
        end = len(prefix)
        if stop < len(prefix):
            end = int(np.searchsorted(prefix, prefix[stop], side="left"))
            if end == cuts[-1]:
                end = int(np.searchsorted(prefix, prefix[stop], side="right"))
        cuts.append(end)
    return [slice(a, b) for a, b in pairwise(cuts)]


def _settle(
    units: _Units,
    place: np.ndarray,
    pending: np.ndarray,
    capacity: int,
    last_level: Tensor,
    residuals: Callable[[np.ndarray], Tensor],
) -> tuple[np.ndarray, np.ndarray]:
    """Last codes [p] of pending units, and which of them found no room."""
    prefixes, slot = np.unique(units.prefix[pending], return_inverse=True)
    room = np.full((len(prefixes), len(last_level)), capacity, dtype=np.int64)
    # Units that stay take their room first.
    low = np.searchsorted(units.prefix, prefixes[0])
    high = np.searchsorted(units.prefix, prefixes[-1], side="right")
    near = np.arange(low, high)
    near = near[(place[near] < capacity) & np.isin(units.prefix[near], prefixes)]
    np.subtract.at(room, (np.searchsorted(prefixes, units.prefix[near]), units.last[near]), 1)
    turn = _place(slot)
    chosen, full = units.last[pending].copy(), turn >= len(last_level) * capacity
    seated = np.flatnonzero(~full)
    scores = np.empty((len(pending), len(last_level)), dtype=np.float32)
    scores[seated] = _scores(residuals(units.row[pending[seated]]), last_level)
    # Round t seats the t-th pending unit of every prefix: one per prefix, so none competes with another.
    by_turn = seated[np.argsort(turn[seated], kind="stable")]
    for now in np.split(by_turn, np.flatnonzero(np.diff(turn[by_turn])) + 1):
        free = room[slot[now]] > 0
        full[now[~free.any(1)]] = True
        now, free = now[free.any(1)], free[free.any(1)]
        code = np.where(free, scores[now], -np.inf).argmax(1)
        chosen[now] = code
        room[slot[now], code] -= 1
    return chosen, full


def _scores(residuals: Tensor, codebook: Tensor) -> np.ndarray:
    """Higher is nearer: float32 [u, K], tile by tile, so that threads decide nothing."""
    out = torch.empty(len(residuals), len(codebook), dtype=torch.float32)

    def body(tiles: range) -> None:
        nearest = Assigner(codebook)
        for t in tiles:
            rows = slice(t * TILE, (t + 1) * TILE)
            nearest(residuals[rows])
            out[rows] = nearest.scores[: len(out[rows])].cpu()

    parallel(-(-len(residuals) // TILE), body, device=residuals.device)
    return out.numpy()
