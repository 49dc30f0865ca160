"""Collisions resolved by the nearest last code that has room, within a catalogue or beside published IDs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from qbrec.quantizer.collisions.seating import Table, Taken, seat
from qbrec.quantizer.collisions.units import Buckets, Resolution, Units, contents_per_id, live_buckets
from qbrec.quantizer.kmeans.kernels.gemm import Gemm
from qbrec.quantizer.packing import code_bits, code_dtype, pack

Ints = NDArray[np.int64]
Residuals = Callable[[Ints], Tensor]


def next_nearest(
    codes: NDArray[Any],
    sizes: Sequence[int],
    *,
    group: Ints,
    popularity: Ints,
    capacity: int,
    last_level: Tensor,
    residuals: Residuals,
    retired: NDArray[np.bool_] | None = None,
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
        retired: Items that keep their raw ID and take no room, bool [N]; None: there are none.
    """
    out = codes.astype(code_dtype(sizes))
    stuck = _move(
        out,
        live_buckets(codes, sizes, retired),
        sizes,
        group=group,
        popularity=popularity,
        taken=Taken.nothing(),
        capacity=capacity,
        last_level=last_level,
        residuals=residuals,
    )
    return Resolution(out, tuple(sizes), int((out[:, -1] != codes[:, -1]).sum()), stuck)


def next_nearest_beside(
    codes_new: NDArray[Any],
    sizes: Sequence[int],
    *,
    taken_codes: NDArray[Any],
    group_new: Ints,
    group_taken: Ints,
    popularity_new: Ints,
    capacity: int,
    last_level: Tensor,
    residuals: Residuals,
) -> Resolution:
    """`next_nearest` for items that are added: only they move, published IDs never do.

    A new item of the content of a published one takes that one's ID, whatever its own raw codes say; of
    several published ones, that of the lowest row. Room on an ID is what published contents leave; they may
    be above the capacity themselves.

    Args:
        codes_new: Raw codes of the new items [n, L].
        sizes: Codes per level.
        taken_codes: Published IDs [N, L] (without those of retired items, should their room be free again).
        group_new: Content group per new item int64 [n].
        group_taken: Content group per published item int64 [N], of the same numbering.
        popularity_new: Interactions per new item int64 [n].
        capacity: Units of different content per ID.
        last_level: Codebook of the last level float32 [K, D].
        residuals: Rows of `codes_new` int64 [u] -> what the levels above leave of them, float32 [u, D].

    Returns:
        IDs of the new items; `moved` counts those that differ from the raw codes.
    """
    out = codes_new.astype(code_dtype(sizes))
    twin = first_of_content(group_new, group_taken)
    joins = twin >= 0
    out[joins] = taken_codes[twin[joins]]
    rest = np.flatnonzero(~joins)
    bits = code_bits(sizes)[-1]
    buckets = Buckets.of(pack(codes_new[rest], sizes), rest)
    published = pack(taken_codes, sizes)
    near = np.flatnonzero(_among(np.unique(buckets.id >> bits), published >> bits) >= 0)
    stuck = _move(
        out,
        buckets,
        sizes,
        group=group_new,
        popularity=popularity_new,
        taken=Taken(*contents_per_id(published[near], group_taken[near])),
        capacity=capacity,
        last_level=last_level,
        residuals=residuals,
    )
    return Resolution(out, tuple(sizes), int((out != codes_new).any(1).sum()), stuck)


def first_of_content(group_new: Ints, group_taken: Ints) -> Ints:
    """For each new item the first published one of its content, int64 [n]; -1 where there is none."""
    wanted, inverse = np.unique(group_new, return_inverse=True)
    place = _among(wanted, group_taken)
    found = np.full(len(wanted), len(group_taken), dtype=np.int64)
    rows = np.flatnonzero(place >= 0)
    np.minimum.at(found, place[rows], rows)
    return np.where(found < len(group_taken), found, -1)[inverse]


def _among(ascending: Ints, values: Ints) -> Ints:
    """Place of each value in an ascending array, int64 [n]; -1 where it is not in it."""
    if not len(ascending):
        return np.full(len(values), -1, dtype=np.int64)
    place = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
    return np.where(ascending[place] == values, place, -1)


def _move(
    out: NDArray[Any],
    buckets: Buckets,
    sizes: Sequence[int],
    *,
    group: Ints,
    popularity: Ints,
    taken: Taken,
    capacity: int,
    last_level: Tensor,
    residuals: Residuals,
) -> int:
    """Write last codes of units above the capacity into `out`; number of items that found no room."""
    bits = code_bits(sizes)[-1]
    seats = np.maximum(capacity - taken.on(buckets.id), 0)
    # An item alone on its ID is a unit, and where it can stay nothing else needs to be known about it.
    shared = np.flatnonzero((buckets.size > 1) | (seats == 0))
    units = Units.of(buckets, shared, group=group, popularity=popularity)
    pending = np.flatnonzero(units.place >= seats[shared][units.bucket])
    stay = np.ones(len(buckets.id), dtype=np.int64)
    stay[shared] = np.minimum(units.per_bucket(len(shared)), seats[shared])
    one_reader = Lock()

    def scores(some: Ints, slot: Ints, penalty: NDArray[np.float32]) -> Table:
        with one_reader:
            left = residuals(units.row[pending[some]])
        gemm = Gemm(last_level)
        return lambda rows: gemm.scores(left[rows]).cpu().numpy()

    chosen = seat(
        buckets.id[shared[units.bucket[pending]]] >> bits,
        units.priority[pending],
        bits=bits,
        num_codes=len(last_level),
        capacity=capacity,
        taken=taken.beside(Taken(buckets.id, stay)),
        scores=scores,
        device=last_level.device,
    )
    return units.write(out, pending, chosen)
