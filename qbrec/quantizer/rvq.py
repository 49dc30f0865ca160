"""Residual vector quantizer: codebooks fitted level by level, encoding (greedy or beam), decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qbrec.quantizer.encoders import Beam, Greedy, descend
from qbrec.quantizer.kmeans.chunks import Collective, FixedPoint, Shard, max_abs, parallel, sum_of
from qbrec.quantizer.kmeans.fit import KMeansOptions, fit_kmeans
from qbrec.quantizer.kmeans.kernels.gemm import native_loops, tile_rows
from qbrec.quantizer.kmeans.lloyd import KMeans


@dataclass(frozen=True)
class Codebooks:
    """Codebooks of all levels: `levels[l]` is float32 [K_l, D]; levels may differ in size."""

    levels: tuple[Tensor, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Codes per level."""
        return tuple(len(level) for level in self.levels)

    @property
    def magnitude(self) -> float:
        """Upper bound on the magnitude of a decoded component."""
        return sum(float(level.abs().max()) for level in self.levels)


def encode(x: Tensor, books: Codebooks, *, beam: int = 1) -> Tensor:
    """Codes of every row.

    Args:
        x: float32 [n, D], standardised as for the fit.
        books: Codebooks.
        beam: Partial codes kept per level; 1: greedy.

    Returns:
        int64 [n, L]; the same for any number of threads, the lowest code on ties.
    """
    out = torch.empty(len(x), len(books.levels), dtype=torch.int64, device=x.device)

    size = Beam.tile_rows(x.device) if beam > 1 else tile_rows(x.device)
    native_loops(len(x))  # loaded where the rows are many

    def body(tiles: range) -> None:
        encoder = Beam(books.levels, beam=beam) if beam > 1 else Greedy(books.levels)
        for t in tiles:
            rows = slice(t * size, (t + 1) * size)
            out[rows] = encoder(x[rows])

    parallel(-(-len(x) // size), body, device=x.device)
    return out


def decode(codes: Tensor, books: Codebooks) -> Tensor:
    """Vectors of codes: int64 [n, <= L] -> float32 [n, D]; fewer columns decode a prefix."""
    out = books.levels[0][codes[:, 0]].clone()
    for level in range(1, codes.shape[1]):
        out += books.levels[level][codes[:, level]]
    return out


def residual_before(level: int, x: Tensor, codes: NDArray[Any], books: Codebooks) -> Tensor:
    """What the levels above one leave of rows: float32 [n, D]; `x` is used up.

    Args:
        level: The level that is not taken off, 0 to L.
        x: float32 [n, D], standardised as for the fit.
        codes: Of those rows, any unsigned type [n, L].
        books: Codebooks.
    """
    for upper in range(level):
        x -= books.levels[upper][torch.from_numpy(codes[:, upper].astype(np.int64)).to(x.device)]
    return x


def fit_levels(
    shard: Shard,
    sizes: Sequence[int],
    *,
    comm: Collective,
    seed: int,
    finished: Sequence[Tensor] = (),
    on_level: Callable[[int, KMeans], None] = lambda level, result: None,
    **options: Unpack[KMeansOptions],
) -> Codebooks:
    """Residual k-means (`rq_kmeans`): k-means on the vectors, then on what is left of them, and so on.

    Args:
        shard: This rank's standardised rows.
        sizes: Codes per level.
        comm: Process group.
        seed: Level l draws from `seed + 10 l`.
        finished: Codebooks of the first levels from an interrupted fit; the rest comes out bit for bit the
            same.
        on_level: Called on every rank with (level, result) after each fitted level.
        **options: See `KMeansOptions`.
    """
    residual = shard.x.clone()
    levels: list[Tensor] = []
    for level, size in enumerate(sizes):
        if level < len(finished):
            codebook = finished[level]
        else:
            part = Shard(residual, shard.start, shard.total, shard.train)
            result = fit_kmeans(part, size, comm=comm, seed=seed + 10 * level, **options)
            codebook = result.centroids
            on_level(level, result)
        levels.append(codebook)
        if level + 1 < len(sizes):
            descend(residual, codebook)
    return Codebooks(tuple(levels))


def prefix_errors(
    shard: Shard, codes: Tensor, books: Codebooks, *, comm: Collective, held_out: bool
) -> tuple[Tensor, int]:
    """Squared error summed over rows after 0, 1, ... L levels.

    Args:
        shard: This rank's standardised rows.
        codes: int64 [n, L] of those rows.
        books: Codebooks.
        comm: Process group.
        held_out: Only the rows a fit did not see; all rows where none were held out.

    Returns:
        float64 [L + 1] sums (the first is the sum of squares) and the number of rows; same bits on any
        partition.
    """
    depth = len(books.levels)
    fixed = FixedPoint.of(shard.total, _square_bound(shard, books, comm))
    chosen = torch.ones(len(shard.x), dtype=torch.bool, device=shard.x.device)
    if held_out and shard.train is not None:
        chosen = ~shard.train

    def body(grains: range) -> Tensor:
        acc = torch.zeros(depth + 2, dtype=torch.int64, device=shard.x.device)
        for g in grains:
            rows = shard.grain(g)
            pick = chosen[rows]
            residual = shard.x[rows][pick]
            code = codes[rows][pick]
            acc[depth + 1] += len(residual)
            for level in range(depth + 1):
                acc[level] += fixed.encode((residual.double() ** 2).sum())
                if level < depth:
                    residual -= books.levels[level][code[:, level]]
        return acc

    acc = sum_of(parallel(shard.num_grains, body, device=shard.x.device))
    comm.all_reduce(acc)
    return fixed.decode(acc[: depth + 1]), int(acc[depth + 1])


def _square_bound(shard: Shard, books: Codebooks, comm: Collective) -> float:
    return float((max_abs(shard, comm) + books.magnitude) ** 2 * shard.x.shape[1])
