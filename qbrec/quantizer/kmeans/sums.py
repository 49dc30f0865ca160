"""Sums over rows that know no order: per cluster, of squares; and distances to the centroid of a code."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qbrec.quantizer.kmeans.chunks import Collective, FixedPoint, Shard, parallel, sum_of
from qbrec.quantizer.kmeans.kernels.gemm import TILE, native_loops


def add_by_code(x: Tensor, codes: Tensor, num_codes: int, fixed: FixedPoint) -> Tensor:
    """Fixed-point sums of rows per code and their numbers.

    Every row is made integers first, so the order in which threads, ranks or a GPU add does not matter.

    Args:
        x: float32 [b, D].
        codes: int64 [b]; -1: in no sum.
        num_codes: K.
        fixed: Scale.

    Returns:
        int64 [K, D + 1]; the last column counts.
    """
    out = torch.zeros(num_codes, x.shape[1] + 1, dtype=torch.int64, device=x.device)
    add_rows(out, x, codes, fixed)
    return out


def add_rows(total: Tensor, x: Tensor, codes: Tensor, fixed: FixedPoint) -> None:
    """`add_by_code` into sums that are there, in place: int64 [K, D + 1]."""
    move_rows(total, x, torch.full_like(codes, -1, dtype=torch.int32), codes, fixed)


def move_rows(total: Tensor, x: Tensor, old: Tensor, new: Tensor, fixed: FixedPoint) -> None:
    """Take rows out of the sums of their old codes and add them to those of their new ones, in place.

    Args:
        total: int64 [K, D + 1] as `add_by_code` returns.
        x: float32 [b, D].
        old: int32 [b], codes so far, -1: in no sum; becomes `new`.
        new: int64 [b].
        fixed: Scale.
    """
    native = native_loops(len(x)) if x.device.type == "cpu" else None
    if native is not None:
        scale = math.ldexp(1.0, fixed.shift)
        native.move_rows(x.numpy(), old.numpy(), new.numpy(), scale, total.numpy())
        return
    moved = (old != new).nonzero().squeeze(1)
    left, right = old[moved].long(), new[moved]
    values = torch.ones(len(moved), x.shape[1] + 1, dtype=torch.int64, device=x.device)
    values[:, :-1] = fixed.encode(x[moved])
    total.index_add_(0, right[right >= 0], values[right >= 0])
    total.index_add_(0, left[left >= 0], values[left >= 0], alpha=-1)
    old.copy_(new)


def sum_of_squares(shard: Shard, comm: Collective, *, bound: float) -> float:
    """Sum of |x|² over all ranks' rows that a fit may see; `bound`: largest magnitude."""
    fixed = FixedPoint.of(shard.total, bound * bound * shard.x.shape[1])

    def body(grains: range) -> Tensor:
        out = torch.zeros(1, dtype=torch.int64, device=shard.x.device)
        for g in grains:
            rows = shard.grain(g)
            squares = torch.linalg.vector_norm(shard.x[rows], dim=1, dtype=torch.float64) ** 2
            out += fixed.encode((squares if shard.train is None else squares * shard.train[rows]).sum())
        return out

    total = sum_of(parallel(shard.num_grains, body, device=shard.x.device))
    comm.all_reduce(total)
    return float(fixed.decode(total))


def distances(x: Tensor, codes: Tensor, centroids: Tensor) -> Tensor:
    """Squared distance of each row to the centroid of its code, float32 [n]."""
    out = torch.zeros(len(x), dtype=torch.float32, device=x.device)

    def body(tiles: range) -> None:
        for t in tiles:
            rows = slice(t * TILE, (t + 1) * TILE)
            left = x[rows] - centroids[codes[rows]]
            out[rows] = (left * left).sum(1)

    parallel(-(-len(x) // TILE), body, device=x.device)
    return out
