"""Greedy residual encoding: the nearest code level by level, by GEMM or by bounds (`kernels.pruned`)."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qbrec.quantizer.kmeans.kernels.gemm import Gemm, native_loops, row_argmax, tile_rows
from qbrec.quantizer.kmeans.kernels.pruned import length_outside, principal_directions

WORTH = 100_000  # rows from which choosing an encoder by measurement pays
PROBE = 4  # tiles of one measurement
Levels = Sequence[Tensor]  # codebooks float32 [K_l, D]
Encode = Callable[[Tensor], Tensor]  # a tile float32 [b, D] -> codes int64 [b, L]


class Greedy:
    """Codes of tiles of rows (`tile_rows`) by full GEMMs; it owns buffers: one object per thread."""

    def __init__(self, levels: Levels) -> None:
        self.levels = levels
        self.gemms = [Gemm(level) for level in levels]

    def __call__(self, x: Tensor) -> Tensor:
        """float32 [b, D] -> int64 [b, L]."""
        residual, norms = x.clone(), None
        out = torch.empty(len(x), len(self.gemms), dtype=torch.int64, device=x.device)
        for level, gemm in enumerate(self.gemms):
            codes = gemm.nearest(residual, norms)
            out[:, level] = codes
            if level + 1 < len(self.gemms):
                norms = take_off(residual, self.levels[level], codes)
        return out


class PrunedGreedy:
    """The same codes by scores of a few directions and bounds for the rest.

    Rows are projected once; what is left of them after a level is projected by taking the projected code off.

    Args:
        levels: Codebooks float32 [K_l, D].
        directions: Orthonormal columns float32 [D, d₁].
    """

    def __init__(self, levels: Levels, directions: Tensor) -> None:
        from qbrec.quantizer.kmeans.kernels import native

        self._native, self.directions = native, directions
        self.levels, self.gemms = levels, [Gemm(level) for level in levels]
        self.heads = [level @ directions for level in levels]
        self.columns = [head.t().contiguous() for head in self.heads]
        self.half = [(-gemm.minus_half_norms).numpy() for gemm in self.gemms]
        self.tails = [
            length_outside(torch.linalg.vector_norm(level, dim=1), head, width=len(directions)).numpy()
            for level, head in zip(levels, self.heads, strict=True)
        ]

    def __call__(self, x: Tensor) -> Tensor:
        """float32 [b, D] -> int64 [b, L]."""
        residual, head, norms = x.clone(), x @ self.directions, torch.linalg.vector_norm(x, dim=1)
        out = torch.empty(len(x), len(self.gemms), dtype=torch.int64)
        width = len(self.directions)
        for level, gemm in enumerate(self.gemms):
            partial = torch.addmm(gemm.minus_half_norms, head, self.columns[level])
            codes = row_argmax(partial).int()
            tail = length_outside(norms, head, width=width)
            self._native.settle(
                partial.numpy(), residual.numpy(), tail.numpy(), gemm.slack(norms).numpy(),
                self.levels[level].numpy(), self.half[level], self.tails[level], codes.numpy(),
            )  # fmt: skip
            out[:, level] = codes
            if level + 1 < len(self.gemms):
                taken = out[:, level].contiguous()
                self._native.subtract(
                    residual.numpy(), self.levels[level].numpy(), taken.numpy(), norms.numpy()
                )
                head -= self.heads[level][taken]
        return out


def take_off(residual: Tensor, codebook: Tensor, codes: Tensor) -> Tensor | None:
    """Take from each row the vector of its code, in place.

    Args:
        residual: float32 [b, D].
        codebook: float32 [K, D].
        codes: int64 [b].

    Returns:
        Lengths of what is left float32 [b], where they came for free.
    """
    native = native_loops(len(residual)) if residual.device.type == "cpu" else None
    if native is None:
        residual -= codebook[codes]
        return None
    norms = torch.empty(len(residual), dtype=torch.float32)
    native.subtract(residual.numpy(), codebook.numpy(), codes.contiguous().numpy(), norms.numpy())
    return norms


def fastest_greedy(x: Tensor, levels: Levels) -> Callable[[], Encode]:
    """A maker of encoders, one per thread: those that encode the first rows at hand fastest.

    Args:
        x: Rows to encode, float32 [n, D].
        levels: Codebooks float32 [K_l, D].
    """
    plain: Callable[[], Encode] = lambda: Greedy(levels)  # noqa: E731
    if x.device.type != "cpu" or len(x) < WORTH or importlib.util.find_spec("numba") is None:
        return plain
    directions = principal_directions(x[:: max(1, len(x) // 16_384)])
    if directions is None:
        return plain
    pruned: Callable[[], Encode] = lambda: PrunedGreedy(levels, directions)  # noqa: E731
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tiles = x[: PROBE * tile_rows(x.device)].split(tile_rows(x.device))
    seconds = [_seconds(make(), tiles) for make in (plain, pruned)]
    torch.set_num_threads(threads)
    return pruned if seconds[1] < seconds[0] else plain


def _seconds(encode: Encode, tiles: Sequence[Tensor]) -> float:
    """Shortest time for some tiles; the first round compiles."""
    times = []
    for _ in range(3):
        began = time.thread_time()
        for tile in tiles:
            encode(tile)
        times.append(time.thread_time() - began)
    return min(times[1:])
