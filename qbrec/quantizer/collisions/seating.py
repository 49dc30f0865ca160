"""Seats among the last codes of a prefix: units take them one after the other, the first in line first.

Prefixes have nothing to do with each other, so one vectorised round serves the next unit of every prefix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qbrec.quantizer.kmeans.chunks import parallel
from qbrec.quantizer.kmeans.kernels.gemm import TILE
from qbrec.quantizer.packing import lex_order, runs, sort_keys

Ints = NDArray[np.int64]

TABLE_AT_ONCE = 1 << 23  # (prefix, code) and (unit, code) pairs that one thread holds

# Scores of some units for all last codes, the larger the better. Given are the units [n], the slot of each
# one's prefix in the penalties, and those, float32 [P, K]: -inf where a code is full, else 0. What comes back
# yields the scores [b, K] of consecutive units, which the caller uses up before it asks for the next ones.
Table = Callable[[slice], NDArray[np.floating[Any]]]
Scores = Callable[[Ints, Ints, NDArray[np.float32]], Table]


@dataclass(frozen=True)
class Taken:
    """Units that stay where they are: IDs ascending, int64 [B], and the units on each, int64 [B]."""

    id: Ints
    count: Ints

    @classmethod
    def nothing(cls) -> Taken:
        """All room is free."""
        return cls(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))

    def on(self, ids: Ints) -> Ints:
        """Units on each of some packed IDs, int64 [n]."""
        if not len(self.id):
            return np.zeros(len(ids), dtype=np.int64)
        place = np.minimum(np.searchsorted(self.id, ids), len(self.id) - 1)
        return np.where(self.id[place] == ids, self.count[place], 0)

    def beside(self, other: Taken) -> Taken:
        """What both take together."""
        if not len(self.id):
            return other
        ids, order = sort_keys(np.concatenate([self.id, other.id]))
        start, _ = runs(ids)
        count = np.concatenate([self.count, other.count])[order]
        return Taken(ids[start], np.add.reduceat(count, start) if len(start) else count)


def seat(
    prefix: Ints,
    priority: Ints,
    *,
    bits: int,
    num_codes: int,
    capacity: int,
    taken: Taken,
    scores: Scores,
    device: torch.device,
) -> Ints:
    """Give each unit the best last code of its prefix that has room when its turn comes.

    Args:
        prefix: Packed prefix of each unit, int64 [u].
        priority: Smaller goes first, int64 [u].
        bits: Of a last code in a packed ID.
        num_codes: K, last codes.
        capacity: Units per ID.
        taken: Room that is gone from the start.
        scores: Called, by several threads, with places in `prefix`: as many units of a prefix at once as it
            has codes with room.
        device: Where scores are computed.

    Returns:
        Last codes int64 [u]; -1 where the prefix had no room left.
    """
    chosen = np.full(len(prefix), -1, dtype=np.int64)
    order = lex_order(priority, prefix)
    start, size = runs(prefix[order])
    # Large prefixes beside large ones: a part takes as many rounds as its largest prefix has units.
    by_size = lex_order(-size)
    parts = cut((np.minimum(size[by_size], num_codes) + 1) * num_codes, TABLE_AT_ONCE)

    def body(mine: range) -> None:
        for part in (by_size[parts[index]] for index in mine):
            room = _Room.of(prefix[order[start[part]]], bits, num_codes, capacity, taken)
            _seat_part(order, start[part], size[part], room, scores, chosen)

    parallel(len(parts), body, device=device)
    return chosen


def cut(need: Ints, limit: int) -> list[slice]:
    """Cut a list into parts that need at most `limit` together; at least one element each."""
    total = np.cumsum(need)
    cuts = [0]
    while cuts[-1] < len(need):
        before = total[cuts[-1] - 1] if cuts[-1] else 0
        cuts.append(max(cuts[-1] + 1, int(np.searchsorted(total, before + limit, side="right"))))
    return [slice(a, b) for a, b in pairwise(cuts)]


@dataclass(frozen=True)
class _Room:
    """Seats of some prefixes: units on each ID [P, K], 0 or -inf float32 [P, K], codes and seats left [P]."""

    used: NDArray[np.int32]
    penalty: NDArray[np.float32]
    codes: Ints
    seats: Ints
    capacity: int

    @classmethod
    def of(cls, prefixes: Ints, bits: int, num_codes: int, capacity: int, taken: Taken) -> _Room:
        # Few IDs of a prefix are taken at first: only those are touched.
        low = np.searchsorted(taken.id, prefixes << bits)
        count = np.searchsorted(taken.id, (prefixes << bits) | ((1 << bits) - 1), side="right") - low
        slot = np.repeat(np.arange(len(prefixes)), count)
        near = low[slot] + np.arange(len(slot)) - np.repeat(np.cumsum(count) - count, count)
        code = taken.id[near] & ((1 << bits) - 1)
        units = np.minimum(taken.count[near], capacity)
        used = np.zeros((len(prefixes), num_codes), dtype=np.int32)
        used[slot, code] = units
        seats = num_codes * capacity - np.bincount(slot, weights=units, minlength=len(prefixes)).astype(
            np.int64
        )
        penalty = np.zeros(used.shape, dtype=np.float32)
        room = cls(used, penalty, np.full(len(prefixes), num_codes), seats, capacity)
        room._close(slot, code)
        return room

    def take(self, slot: Ints, code: Ints) -> None:
        """One unit each on codes of different prefixes."""
        self.used[slot, code] += 1
        self.seats[slot] -= 1
        self._close(slot, code)

    def _close(self, slot: Ints, code: Ints) -> None:
        full = self.used[slot, code] >= self.capacity
        self.penalty[slot[full], code[full]] = -np.inf
        np.subtract.at(self.codes, slot[full], 1)


def _seat_part(order: Ints, start: Ints, size: Ints, room: _Room, scores: Scores, chosen: Ints) -> None:
    """Seat the units of some prefixes, which begin at `start` in `order`; the last ones may find no room."""
    seated, done = np.minimum(size, room.seats), np.zeros(len(start), dtype=np.int64)
    while (done < seated).any():
        # As many units as there are codes with room: what a balanced assignment can spread.
        now = np.minimum(seated - done, room.codes)
        slot = np.repeat(np.arange(len(start)), now)
        turn = np.arange(len(slot)) - np.repeat(np.cumsum(now) - now, now)
        in_turn = np.argsort(turn, kind="stable")
        slot, turn = slot[in_turn], turn[in_turn]
        units = order[start[slot] + done[slot] + turn]
        table = scores(units, slot, room.penalty)
        for tile in range(0, len(units), TILE):
            held = table(slice(tile, tile + TILE))
            # Units of one turn are of different prefixes: none competes with another.
            begin, count = runs(turn[tile : tile + TILE])
            for row, end in zip(begin.tolist(), (begin + count).tolist(), strict=True):
                here = slot[tile + row : tile + end]
                code = (held[row:end] + room.penalty[here]).argmax(1)
                chosen[units[tile + row : tile + end]] = code
                room.take(here, code)
        done += now
