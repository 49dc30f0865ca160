"""Residual encoding: the nearest code level by level (greedy), or the best of a beam of partial IDs.

The bounds of `kernels.pruned` do not pay here: what a level leaves has a flat spectrum, so that the leading
directions say little of it, and there is no earlier pass to take a guess from.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qbrec.quantizer.kmeans.chunks import parallel
from qbrec.quantizer.kmeans.kernels.gemm import Gemm, native_loops, row_argmax, tile_rows

Levels = Sequence[Tensor]  # codebooks float32 [K_l, D]


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


def descend(residual: Tensor, codebook: Tensor, codes: Tensor | None = None) -> None:
    """Take from each row the vector of its code, in place.

    Args:
        residual: float32 [n, D].
        codebook: float32 [K, D].
        codes: int64 [n], where known; else of the nearest.
    """
    native_loops(len(residual))  # loaded where the rows are many
    size = tile_rows(residual.device)

    def body(tiles: range) -> None:
        gemm = Gemm(codebook)
        for t in tiles:
            rows = residual[t * size : (t + 1) * size]
            known = None if codes is None else codes[t * size : (t + 1) * size]
            take_off(rows, codebook, gemm.nearest(rows) if known is None else known)

    parallel(-(-len(residual) // size), body, device=residual.device)


class Beam:
    """Codes of tiles of rows: so many partial IDs are kept per level, the best whole one wins.

    It owns buffers: one object per thread.

    Args:
        levels: Codebooks float32 [K_l, D].
        beam: Partial IDs kept per level.
    """

    def __init__(self, levels: Levels, *, beam: int) -> None:
        self.levels, self.beam = levels, beam
        self.gemms = [Gemm(level, rows=self.tile_rows(levels[0].device)) for level in levels]
        # Inner products between the codes of every two levels: a beam never touches a residual.
        self.inner = {(i, j): levels[i] @ levels[j].t() for j in range(len(levels)) for i in range(j)}

    @staticmethod
    def tile_rows(device: torch.device) -> int:
        """Rows of a tile: the scores of all partial IDs stay in the cache."""
        return tile_rows(device) // 2

    def __call__(self, x: Tensor) -> Tensor:
        """float32 [b, D] -> int64 [b, L]."""
        # |x - sum_l c_l|^2 = |x|^2 - 2 s with s = sum_l (x.c_l - |c_l|^2 / 2) - sum_{i<j} c_i.c_j: maximise
        # s.
        best = torch.zeros(len(x), 1, dtype=torch.float32, device=x.device)
        codes = torch.empty(len(x), 1, 0, dtype=torch.int64, device=x.device)
        for j, gemm in enumerate(self.gemms):
            scores = best[:, :, None] + gemm.scores(x)[:, None, :]  # [b, beam, K]
            for i in range(j):
                scores -= self.inner[i, j][codes[:, :, i]]
            flat = scores.flatten(1)
            picks, values = [], []
            for _ in range(min(self.beam, flat.shape[1])):
                pick = row_argmax(flat)[:, None]
                picks.append(pick)
                values.append(flat.gather(1, pick))
                flat.scatter_(1, pick, -torch.inf)
            pick, best = torch.cat(picks, 1), torch.cat(values, 1)
            size = len(self.levels[j])
            parent = (pick // size)[:, :, None].expand(-1, -1, j)
            codes = torch.cat([codes.gather(1, parent), (pick % size)[:, :, None]], 2)
        return codes[:, 0]


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
