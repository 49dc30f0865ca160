"""The reference kernel: float32 scores by GEMM, arg-max, float64 where two codes are too near to call."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

TILE = 2048  # rows of one GEMM on a CPU: scores of 256 codes stay in the L2 cache
GPU_TILE = 16_384  # on a GPU, which needs more of them to be busy
NATIVE_ROWS = 100_000  # from here on compiled loops are worth being loaded
EXACT_NUMBERS = 2**20  # float64 numbers of one temporary
UNIT = 2.0**-24  # half the spacing of float32 at 1: what one rounding costs


def native_loops(rows: int) -> ModuleType | None:
    """The loops compiled by numba, where it is installed; a few rows alone are not worth loading it."""
    loaded = sys.modules.get(f"{__package__}.native")
    if loaded is not None or rows < NATIVE_ROWS or not _has_numba():
        return loaded
    from qbrec.quantizer.kmeans.kernels import native

    return native


@cache
def _has_numba() -> bool:
    return importlib.util.find_spec("numba") is not None


def tile_rows(device: torch.device) -> int:
    """Rows of one GEMM."""
    return TILE if device.type == "cpu" else GPU_TILE


class Nearest(Protocol):
    """Nearest centroids of rows of one matrix. It owns buffers: one object per thread."""

    def __call__(self, rows: slice) -> Tensor:
        """Codes int64 [b] of consecutive rows."""
        ...


class Kernel(Protocol):
    """One way to find nearest centroids of the rows of one matrix, again and again as the centroids move."""

    @property
    def name(self) -> str:
        """Short name for logs."""
        ...

    def bind(self, centroids: Tensor) -> Callable[[], Nearest]:
        """Prepare for centroids float32 [K, D]; call the result once in every thread."""
        ...


class Gemm:
    """Scores x·c - |c|²/2 of tiles, and the nearest code of their rows.

    Args:
        centroids: float32 [K, D].
        rows: Rows of a tile; None: `tile_rows`.
    """

    def __init__(self, centroids: Tensor, *, rows: int | None = None) -> None:
        self.centroids = centroids
        self.columns = centroids.t().contiguous()
        half = 0.5 * (centroids.double() ** 2).sum(1)
        self.minus_half_norms = (-half).float()
        self.largest = float((2 * half.max()).sqrt()) if len(half) else 0.0
        size = rows or tile_rows(centroids.device)
        self._tile = torch.zeros(size, centroids.shape[1], dtype=torch.float32, device=centroids.device)
        self._scores = torch.empty(size, len(centroids), dtype=torch.float32, device=centroids.device)

    def scores(self, x: Tensor) -> Tensor:
        """Scores float32 [b, K] of a tile of rows float32 [b, D]; overwritten by the next call."""
        rows = len(x)
        if rows < len(self._tile):
            # The same shape for every GEMM: a kernel for a short tail may round differently.
            self._tile[:rows] = x
            self._tile[rows:] = 0
            x = self._tile
        torch.addmm(self.minus_half_norms, x, self.columns, out=self._scores)
        return self._scores[:rows]

    def nearest(self, x: Tensor, norms: Tensor | None = None) -> Tensor:
        """Codes int64 [b] of a tile of rows.

        Args:
            x: float32 [b, D].
            norms: Their lengths float32 [b], where known.
        """
        norms = torch.linalg.vector_norm(x, dim=1) if norms is None else norms
        return decide(self.scores(x), x, self.centroids, slack=self.slack(norms))

    def slack(self, norms: Tensor) -> Tensor:
        """How far below the best score a code may come out and still be the nearest, float32 [b].

        Each of two scores is off by at most (D + 4) roundings of |x| |c| + |c|²/2 (Higham 2002, 3.1).
        """
        width = self.centroids.shape[1]
        return (norms + 0.5 * self.largest) * (2 * (width + 4) * UNIT * self.largest)


def decide(scores: Tensor, x: Tensor, centroids: Tensor, *, slack: Tensor) -> Tensor:
    """Code of the best exact score of each row; `scores` is used up.

    Args:
        scores: Approximate scores float [b, K].
        x: float32 [b, D].
        centroids: float32 [K, D].
        slack: Twice the largest error of a score, per row [b].

    Returns:
        int64 [b].
    """
    codes = row_argmax(scores)
    native = native_loops(len(x)) if x.device.type == "cpu" else None
    if native is not None:
        native.decide(scores.numpy(), x.numpy(), slack.numpy(), centroids.numpy(), codes.numpy())
        return codes
    best = scores.gather(1, codes[:, None]).squeeze(1)
    scores.scatter_(1, codes[:, None], -torch.inf)
    close = (scores.amax(1) >= best - slack).nonzero().squeeze(1)
    if len(close):
        near = scores[close] >= (best[close] - slack[close])[:, None]
        near[torch.arange(len(close), device=near.device), codes[close]] = True
        codes[close] = exact_nearest(x[close], centroids, near)
    return codes


def exact_nearest(x: Tensor, centroids: Tensor, allowed: Tensor) -> Tensor:
    """The nearest of some centroids in float64, the lowest on ties.

    Args:
        x: float32 [b, D].
        centroids: float32 [K, D].
        allowed: bool [b, K], at least one per row.

    Returns:
        int64 [b].
    """
    row, code = allowed.nonzero(as_tuple=True)
    exact = torch.empty(len(row), dtype=torch.float64, device=x.device)
    size = max(1, EXACT_NUMBERS // x.shape[1])  # where all codes are equal, every pair is here
    for start in range(0, len(row), size):
        pairs = slice(start, start + size)
        c = centroids[code[pairs]].double()
        # A product and a sum, not a GEMM: equal centroids must give equal scores.
        exact[pairs] = (c * (x[row[pairs]].double() - 0.5 * c)).sum(1)
    best = torch.full((len(x),), -torch.inf, dtype=torch.float64, device=x.device)
    best.scatter_reduce_(0, row, exact, "amax")
    wins = exact == best[row]
    out = torch.full((len(x),), len(centroids), dtype=torch.int64, device=x.device)
    return out.scatter_reduce_(0, row[wins], code[wins], "amin")


def row_argmax(scores: Tensor) -> Tensor:
    """Index of the largest value per row, int64 [b]; the lowest index on ties."""
    if scores.device.type == "cpu":
        # numpy's arg-max along rows is vectorised; torch's is 10 times slower than the GEMM's share allows.
        return torch.from_numpy(scores.numpy().argmax(1))
    return scores.argmax(1)


class Float32:
    """`Gemm` over the rows of a matrix.

    Args:
        x: float32 [n, D].
        norms: Lengths of its rows float32 [n].
    """

    name = "float32"

    def __init__(self, x: Tensor, norms: Tensor) -> None:
        self.x, self.norms = x, norms

    def bind(self, centroids: Tensor) -> Callable[[], Nearest]:
        """See `Kernel`."""

        def make() -> Nearest:
            gemm = Gemm(centroids)

            def tile(rows: slice) -> Tensor:
                return gemm.nearest(self.x[rows], self.norms[rows])

            return lambda rows: by_tiles(rows, tile, size=tile_rows(centroids.device))

        return make


def by_tiles(rows: slice, nearest: Callable[[slice], Tensor], *, size: int = TILE) -> Tensor:
    """Codes of consecutive rows, at most `size` of them at a time."""
    parts = [
        nearest(slice(first, min(first + size, rows.stop))) for first in range(rows.start, rows.stop, size)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
