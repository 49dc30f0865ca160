"""Collisions resolved by one more code that counts the contents on an ID (TIGER, arXiv 2305.05065)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qbrec.errors import ConfigError
from qbrec.quantizer.collisions.units import Resolution, Units, live_buckets
from qbrec.quantizer.packing import MAX_BITS, bits_of, code_dtype

Ints = NDArray[np.int64]


def digit(
    codes: NDArray[Any],
    sizes: Sequence[int],
    *,
    group: Ints,
    popularity: Ints,
    retired: NDArray[np.bool_] | None = None,
    spare: int = 0,
) -> Resolution:
    """Add a level whose code is the place of the item's content on its raw ID, the most popular one first.

    Contents are in the order of their most popular items, ties by row. The level has as many codes as the
    fullest ID has contents, and `spare` more.

    Args:
        codes: Raw codes [N, L].
        sizes: Codes per level.
        group: Content group per item int64 [N]; items of equal content on one ID share the digit.
        popularity: Interactions per item int64 [N].
        retired: Items that are not counted and get the digit 0, bool [N]; None: there are none.
        spare: Codes that nobody has yet, for items appended later.

    Raises:
        ConfigError: With the digit an ID does not fit into 63 bits.
    """
    buckets = live_buckets(codes, sizes, retired)
    shared = np.flatnonzero(buckets.size > 1)
    units = Units.of(buckets, shared, group=group, popularity=popularity)
    final = (*sizes, int(units.place.max(initial=0)) + 1 + spare)
    if bits_of(final) > MAX_BITS:
        raise ConfigError(
            f"{final[-1] - spare} contents share one ID: with a digit for each an ID of levels {final} takes "
            f"{bits_of(final)} bits; at most {MAX_BITS} fit",
            where="quantizer.collisions = digit",
            fix="use fewer or smaller quantizer.levels, or quantizer.collisions=next_nearest",
        )
    out = np.zeros((len(codes), len(final)), dtype=code_dtype(final))
    out[:, :-1] = codes
    out[units.member, -1] = units.place[units.of_member]
    return Resolution(out, final, 0, 0)
