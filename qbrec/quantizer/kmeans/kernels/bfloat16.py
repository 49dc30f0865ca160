"""A bfloat16 GEMM, and a float32 one for the rows that it cannot decide."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qbrec.quantizer.kmeans.kernels.gemm import Gemm, Nearest, by_tiles, row_argmax, tile_rows

UNIT = 2.0**-9  # what rounding to bfloat16 costs, relatively


class Bfloat16:
    """Nearest centroids where a device multiplies bfloat16 faster than float32 (AMX, AVX512-BF16, CUDA).

    Args:
        x: float32 [n, D].
        norms: Lengths of its rows float32 [n].
    """

    name = "bfloat16"

    def __init__(self, x: Tensor, norms: Tensor) -> None:
        self.x, self.norms, self.half = x, norms, x.bfloat16()

    def bind(self, centroids: Tensor) -> Callable[[], Nearest]:
        """See `Kernel`."""
        columns = centroids.t().bfloat16().contiguous()

        def make() -> Nearest:
            gemm = Gemm(centroids)
            # Rounded factors and a rounded result: 3 roundings of |x| |c| each, for two scores (the last
            # factor covers their products); the slack of the float32 sums comes on top.
            scale = 2 * 3 * UNIT * gemm.largest * 1.01

            def tile(rows: slice) -> Tensor:
                scores = (self.half[rows] @ columns).float()
                scores += gemm.minus_half_norms
                codes = row_argmax(scores)
                best = scores.gather(1, codes[:, None]).squeeze(1)
                scores.scatter_(1, codes[:, None], -torch.inf)
                slack = self.norms[rows] * scale + gemm.slack(self.norms[rows])
                open_rows = (scores.amax(1) >= best - slack).nonzero().squeeze(1)
                if len(open_rows):
                    codes[open_rows] = gemm.nearest(self.x[rows][open_rows], self.norms[rows][open_rows])
                return codes

            return lambda rows: by_tiles(rows, tile, size=tile_rows(centroids.device))

        return make
