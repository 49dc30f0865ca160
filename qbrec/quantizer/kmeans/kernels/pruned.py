"""GEMM on the leading principal directions; exact dot products only for codes that can still win.

With x₁, c₁ the parts of x and c along d₁ directions and x₂, c₂ the rest,

    x·c - |c|²/2  <=  x₁·c₁ - |c|²/2 + |x₂| |c₂|          (Cauchy-Schwarz)

so a code whose right side is below the exact score of some other code is out. A good guess (the row's code
before the centroids moved) leaves a handful of codes per row, and most of the GEMM is never done. The idea of
bounding by a prefix of rotated dimensions is that of ADSampling (Gao & Long 2023); here the bound is certain,
so the codes are those of the full GEMM.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from qbrec.quantizer.kmeans.kernels.gemm import TILE, UNIT, Gemm, Nearest, by_tiles, row_argmax

SHARE = 0.35  # of the dimensions, at most this many directions: beyond it there is too little to save
STEP = 8  # directions come in whole vectors


class Pruned:
    """Nearest centroids by bounds, on a CPU.

    Args:
        x: float32 [n, D].
        norms: Lengths of its rows float32 [n].
        directions: Orthonormal columns, best first, float32 [D, d₁].
    """

    name = "pruned"

    def __init__(self, x: Tensor, norms: Tensor, directions: Tensor) -> None:
        assert x.device.type == "cpu"
        self.x, self.norms, self.directions = x, norms, directions
        self.head = torch.empty(len(x), directions.shape[1], dtype=torch.float32)
        self.tail = torch.empty(len(x), dtype=torch.float32)
        self.guess = torch.full((len(x),), -1, dtype=torch.int32)
        for start in range(0, len(x), TILE):
            rows = slice(start, start + TILE)
            torch.mm(x[rows], directions, out=self.head[rows])
            self.tail[rows] = length_outside(norms[rows], self.head[rows], width=x.shape[1])

    def bind(self, centroids: Tensor) -> Callable[[], Nearest]:
        """See `Kernel`."""
        from qbrec.quantizer.kmeans.kernels.native import settle

        gemm = Gemm(centroids)
        head = centroids @ self.directions
        columns = head.t().contiguous()
        tail = length_outside(
            torch.linalg.vector_norm(centroids, dim=1), head, width=centroids.shape[1]
        ).numpy()
        half = (-gemm.minus_half_norms).numpy()
        slack = gemm.slack(self.norms)

        def make() -> Nearest:
            partial = torch.empty(TILE, len(centroids), dtype=torch.float32)

            def bounded(rows: slice) -> Tensor:
                scores, codes = partial[: rows.stop - rows.start], self.guess[rows]
                torch.addmm(gemm.minus_half_norms, self.head[rows], columns, out=scores)
                if len(codes) and codes[0] < 0:  # the first pass over these rows
                    codes.copy_(row_argmax(scores))
                settle(
                    scores.numpy(), self.x[rows].numpy(), self.tail[rows].numpy(), slack[rows].numpy(),
                    centroids.numpy(), half, tail, codes.numpy(),
                )  # fmt: skip
                return codes.long()

            def full(rows: slice) -> Tensor:
                codes = mine.nearest(self.x[rows], self.norms[rows])
                self.guess[rows] = codes
                return codes

            # Bounds are loose while centroids are far from where they will be: each thread tries both ways
            # on its first rows of a pass.
            mine, ways = Gemm(centroids), [bounded, full]

            def tile(rows: slice) -> Tensor:
                if len(ways) > 1 and rows.stop - rows.start == TILE:
                    times = []
                    for way in (full, bounded):
                        began = time.thread_time()  # not the time that other threads take
                        codes = way(rows)
                        times.append(time.thread_time() - began)
                    ways[:] = [full if times[0] < times[1] else bounded]
                    return codes
                return ways[0](rows)

            return lambda rows: by_tiles(rows, tile)

        return make


def length_outside(norms: Tensor, head: Tensor, *, width: int) -> Tensor:
    """Upper bound of the length outside the directions, float32 [n]: the rounding of it all is added.

    Args:
        norms: Lengths float32 [n].
        head: Coordinates along the directions float32 [n, d₁].
        width: D.
    """
    square = norms * norms
    outside = square - torch.linalg.vector_norm(head, dim=1).square_()
    bound: Tensor = outside.clamp_(min=0).add_(square, alpha=8 * width * UNIT).sqrt_()
    return bound


def principal_directions(sample: Tensor, *, share: float = SHARE) -> Tensor | None:
    """Leading principal directions (about the origin) of a sample, float32 [D, d₁]; None: D is too small.

    Args:
        sample: float32 [m, D].
        share: d₁ / D, rounded up to whole vectors.
    """
    width = sample.shape[1]
    count = -(-int(width * share) // STEP) * STEP
    if not 0 < count < width:
        return None
    _, vectors = torch.linalg.eigh((sample.double().t() @ sample.double()).cpu())
    leading: Tensor = vectors.flip(1)[:, :count]
    return leading.float().contiguous()
