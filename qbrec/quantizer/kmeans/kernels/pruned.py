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

from qbrec.quantizer.kmeans.chunks import parallel
from qbrec.quantizer.kmeans.kernels.gemm import TILE, UNIT, Gemm, Nearest, by_tiles, row_argmax

STEP = 8  # directions come in whole vectors
DOT = 4  # what a multiplication costs in a dot product beside one in a GEMM
WORTHWHILE = 0.85  # of the full GEMM's cost: what bounds may cost at most
PROBED = 2**17  # scores looked at when directions are counted


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

        def body(tiles: range) -> None:
            for t in tiles:
                rows = slice(t * TILE, (t + 1) * TILE)
                torch.mm(x[rows], directions, out=self.head[rows])
                self.tail[rows] = length_outside(norms[rows], self.head[rows], width=x.shape[1])

        parallel(-(-len(x) // TILE), body, device=x.device)

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


def leading_directions(sample: Tensor, centroids: Tensor) -> Tensor | None:
    """Principal directions (about the origin) of a sample, as many as are worth a GEMM.

    Args:
        sample: float32 [m, D].
        centroids: float32 [K, D], about as they will be.

    Returns:
        Orthonormal columns, best first, float32 [D, d₁]; None: bounds would save nothing.
    """
    width = sample.shape[1]
    _, vectors = torch.linalg.eigh((sample.double().t() @ sample.double()).cpu())
    vectors = vectors.flip(1).float().contiguous()
    rows = sample[:: max(1, len(sample) * len(centroids) // PROBED)]
    count = _cheapest(rows @ vectors, centroids @ vectors)
    return vectors[:, :count].contiguous() if count < width else None


def _cheapest(rows: Tensor, codes: Tensor) -> int:
    """Leading dimensions of the GEMM that make it and the dot products left over the cheapest.

    Args:
        rows: float32 [m, D] along the principal directions.
        codes: float32 [K, D] likewise.

    Returns:
        From `STEP` up, or D: the full GEMM is cheaper.
    """
    num_codes, width = codes.shape
    minus_half = -0.5 * (codes * codes).sum(1)
    best = torch.addmm(minus_half, rows, codes.t()).amax(1)
    scores = minus_half.repeat(len(rows), 1)
    row_rest, code_rest = (rows * rows).sum(1), (codes * codes).sum(1)
    cost, count = WORTHWHILE * width * num_codes, width
    for d in range(STEP, width, STEP):
        if d * num_codes >= cost:
            break
        part = slice(d - STEP, d)
        scores.addmm_(rows[:, part], codes[:, part].t())
        row_rest = (row_rest - (rows[:, part] ** 2).sum(1)).clamp(min=0)
        code_rest = (code_rest - (codes[:, part] ** 2).sum(1)).clamp(min=0)
        bounds = torch.addr(scores, row_rest.sqrt(), code_rest.sqrt())
        left = float((bounds >= best[:, None]).sum()) / len(rows)
        if d * num_codes + DOT * width * left < cost:
            cost, count = d * num_codes + DOT * width * left, d
    return count
