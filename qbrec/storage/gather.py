"""Gathering samples out of mapped blocks: which samples lie where, and rows copied whole."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class BlockPart:
    """The samples that a request takes from one block.

    Attributes:
        block: The block.
        places: Where in the answer each of them goes, int64 [n].
        rows: Which of the block's samples they are, ascending: a slice where they follow one another without
            a gap or a repetition (then nothing is copied to pick them), else int64 [n].
    """

    block: int
    places: NDArray[np.int64]
    rows: slice | NDArray[np.int64]


def by_block(samples: NDArray[np.int64], starts: NDArray[np.int64]) -> list[BlockPart]:
    """Split sample numbers by the blocks they lie in; of no samples, an empty part of the first block.

    Args:
        samples: Sample numbers, int64 [B], in any order.
        starts: Sample at which each block begins and, last, the number of samples, int64 [num_blocks + 1].
    """
    if not len(samples):
        return [BlockPart(0, np.zeros(0, np.int64), slice(0, 0))]
    order = np.argsort(samples)
    ordered = samples[order]
    assert 0 <= ordered[0] <= ordered[-1] < starts[-1], "a sample number outside the blocks"
    blocks = np.searchsorted(starts, ordered, side="right") - 1
    edges = [0, *(np.flatnonzero(np.diff(blocks)) + 1).tolist(), len(samples)]
    return [
        BlockPart(block := int(blocks[low]), order[low:high], _rows(ordered[low:high] - starts[block]))
        for low, high in pairwise(edges)
    ]


def _rows(rows: NDArray[np.int64]) -> slice | NDArray[np.int64]:
    first, last = int(rows[0]), int(rows[-1])
    if last - first == len(rows) - 1 and bool((np.diff(rows) == 1).all()):
        return slice(first, last + 1)
    return rows


def whole_rows(array: NDArray[Any]) -> NDArray[Any]:
    """A view with one element per row, so that indexing moves rows in one piece (two to five times faster).

    Args:
        array: C-contiguous, not empty, [n, …].
    """
    if array.ndim == 1:
        return array
    size = array.itemsize * math.prod(array.shape[1:])
    rows: NDArray[Any] = array.reshape(len(array), -1).view(np.dtype((np.void, size)))[:, 0]
    return rows


def spans(begins: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """`begins[i] … begins[i] + lengths[i] - 1` of all i, one after the other, int64 [Σ lengths]."""
    before = np.cumsum(lengths) - lengths
    index: NDArray[np.int64] = np.arange(int(lengths.sum()), dtype=np.int64)
    index += np.repeat(begins - before, lengths)
    return index
