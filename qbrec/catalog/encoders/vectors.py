"""Columns of ready vectors (`<name>_embedding`) as float16."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

_EXPONENT = np.uint16(0x7C00)  # all bits of it are set in NaN and infinity


def as_vectors(
    column: pa.ChunkedArray, width: int
) -> tuple[NDArray[np.float16], NDArray[np.bool_], NDArray[np.uint8]]:
    """An embedding column of n items as float16.

    Returns:
        Vectors [n, width] (zeros where there is none), present bool [n], and the kind of fault uint8 [n]:
        0 none, 1 wrong length, 2 NaN or beyond float16.
    """
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    array = array.cast(pa.large_list(array.type.value_type))
    n = len(array)
    present = array.is_valid().to_numpy(zero_copy_only=False)
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
    fault = np.where(present & (lengths != width), 1, 0).astype(np.uint8)
    good = present & (fault == 0)
    whole = bool(good.all())
    flat = _flat(array if whole else array.filter(pa.array(good)))
    with np.errstate(over="ignore", invalid="ignore"):
        narrow = flat.reshape(-1, width).astype(np.float16, copy=False)
    # The bits: numpy's isfinite takes ten times as long on float16.
    infinite = ((narrow.view(np.uint16) & _EXPONENT) == _EXPONENT).any(axis=1)
    fault[np.flatnonzero(good)[infinite]] = 2
    if whole:
        return narrow, present, fault
    vectors = np.zeros((n, width), dtype=np.float16)
    vectors[good] = narrow
    return vectors, present, fault


def _flat(array: pa.Array) -> NDArray[Any]:
    """All numbers of a list array without null lists; a null number is NaN."""
    values = array.flatten()
    if values.null_count:
        # Arrow fills float16 with nothing; through float32 a null becomes NaN.
        values = values.cast(pa.float32())
    return np.asarray(values.to_numpy(zero_copy_only=False))
