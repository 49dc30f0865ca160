"""Scores and arg-max in one Triton kernel on CUDA: the [n, K] scores are never written to memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qbrec.quantizer.kmeans.kernels.gemm import UNIT as FLOAT32_UNIT
from qbrec.quantizer.kmeans.kernels.gemm import Gemm, Nearest, tile_rows

ROWS, CODES, DIMS = 128, 64, 32  # of one tile in registers
UNIT = 2.0**-11  # what rounding a factor to TF32 costs, relatively


@triton.jit  # type: ignore[untyped-decorator]
def _nearest(
    x: Any, centroids: Any, half: Any, codes: Any, gaps: Any, n: Any, num_codes: Any, width: Any,
    ROWS: tl.constexpr, CODES: tl.constexpr, DIMS: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """One program takes ROWS rows through all codes and keeps the best score, its code and the second best.

    codes int64 [n]; gaps float32 [n]: the best score less the second best.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < n
    best = tl.full([ROWS], float("-inf"), tl.float32)
    second = tl.full([ROWS], float("-inf"), tl.float32)
    code = tl.zeros([ROWS], tl.int64)
    for first in range(0, num_codes, CODES):
        columns = first + tl.arange(0, CODES)
        column_mask = columns < num_codes
        scores = tl.zeros([ROWS, CODES], tl.float32)
        for start in range(0, width, DIMS):
            dims = start + tl.arange(0, DIMS)
            dim_mask = dims < width
            left = tl.load(
                x + rows[:, None].to(tl.int64) * width + dims[None, :],
                mask=row_mask[:, None] & dim_mask[None, :], other=0.0,
            )  # fmt: skip
            right = tl.load(
                centroids + columns[None, :] * width + dims[:, None],
                mask=column_mask[None, :] & dim_mask[:, None], other=0.0,
            )  # fmt: skip
            scores = tl.dot(left, right, scores, input_precision=PRECISION)
        scores -= tl.load(half + columns, mask=column_mask, other=float("inf"))[None, :]
        top = tl.max(scores, axis=1)
        place = tl.argmax(scores, axis=1, tie_break_left=True)
        rest = tl.max(tl.where(tl.arange(0, CODES)[None, :] == place[:, None], float("-inf"), scores), axis=1)
        second = tl.maximum(tl.maximum(second, rest), tl.minimum(best, top))
        code = tl.where(top > best, first + place.to(tl.int64), code)
        best = tl.maximum(best, top)
    tl.store(codes + rows, code, mask=row_mask)
    tl.store(gaps + rows, best - second, mask=row_mask)


class Fused:
    """Nearest centroids by one kernel in TF32, and in float32 for the rows that it cannot decide.

    Args:
        x: float32 [n, D], contiguous.
        norms: Lengths of its rows float32 [n].
    """

    name = "fused"

    def __init__(self, x: Tensor, norms: Tensor, *, precision: str = "tf32") -> None:
        assert x.is_contiguous()
        self.x, self.norms, self.precision = x, norms, precision

    def bind(self, centroids: Tensor) -> Callable[[], Nearest]:
        """See `Kernel`."""
        gemm = Gemm(centroids)
        table, half = centroids.contiguous(), -gemm.minus_half_norms
        num_codes, width = table.shape
        # Two roundings of |x| |c| for each of two scores, and what the float32 sums lose.
        scale = (4 * UNIT + 4 * (width + 4) * FLOAT32_UNIT) * gemm.largest

        def nearest(rows: slice) -> Tensor:
            x, norms = self.x[rows], self.norms[rows]
            codes = torch.empty(len(x), dtype=torch.int64, device=x.device)
            gaps = torch.empty(len(x), dtype=torch.float32, device=x.device)
            grid = (triton.cdiv(len(x), ROWS),)
            _nearest[grid](
                x, table, half, codes, gaps, len(x), num_codes, width, ROWS, CODES, DIMS, self.precision
            )
            unsure = (gaps <= norms * scale + gemm.slack(norms)).nonzero().squeeze(1)
            for part in unsure.split(tile_rows(x.device)):
                codes[part] = gemm.nearest(x[part], norms[part])
            return codes

        return lambda: nearest
