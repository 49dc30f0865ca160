"""The compiled searches under one name; importing this needs numba."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qbrec.ranking.kernels.beams import beam_items, step_beams
from qbrec.ranking.kernels.best_first import best_first
from qbrec.ranking.kernels.lanes import WIDTH, compiled
from qbrec.ranking.kernels.together import count_together, top_together

__all__ = ["WIDTH", "beam_items", "best_first", "count_together", "step_beams", "thin", "top_together"]


def thin(starts: NDArray[np.int32], keep: NDArray[np.bool_]) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Starts of what is left when only some continuations are kept, and which prefixes have any left."""
    left = np.empty(len(starts) - 1, np.bool_)
    out = np.empty(len(starts), np.int32)
    return out[: _thin(starts, keep, left, out)].copy(), left


@compiled
def _thin(
    starts: NDArray[np.int32],
    keep: NDArray[np.bool_],
    left: NDArray[np.bool_],
    out: NDArray[np.int32],
) -> int:
    count, total = 0, 0
    out[0] = 0
    for node in range(len(left)):
        before = total
        for child in range(starts[node], starts[node + 1]):
            total += keep[child]
        left[node] = total > before
        count += total > before
        out[count] = total
    return count + 1
