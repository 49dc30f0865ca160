"""Lloyd's algorithm over the rows of all ranks: the same centroids, bit for bit, on any number of them.

Rows are assigned by a kernel (`kernels`); sums are int64 fixed point, kept up as rows move, all-reduced as
int64 (`sums`, `chunks`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qbrec.quantizer.kmeans.chunks import (
    Collective,
    FixedPoint,
    Shard,
    parallel,
    sum_of,
)
from qbrec.quantizer.kmeans.kernels.choose import row_norms
from qbrec.quantizer.kmeans.kernels.gemm import Float32, Kernel, native_loops, tile_rows
from qbrec.quantizer.kmeans.sums import distances, move_rows, sum_of_squares

SPARE = 256  # candidates beyond the clusters to be re-seeded: equal rows are chosen once
EXTRA = 8  # further iterations while re-seeded clusters still have to find their members


@dataclass(frozen=True)
class KMeans:
    """Result of a fit: centroids float32 [K, D], mean squared distance before the last update, work done."""

    centroids: Tensor
    inertia: float
    iterations: int
    reseeded: int


def assign(x: Tensor, centroids: Tensor, *, kernel: Kernel | None = None) -> Tensor:
    """Nearest centroid of each row, lowest index on ties (see `kernels`).

    Args:
        x: float32 [n, D].
        centroids: float32 [K, D].
        kernel: Over the same rows; None: float32.

    Returns:
        int64 [n].
    """
    codes = torch.empty(len(x), dtype=torch.int64, device=x.device)
    bound = (kernel or Float32(x, row_norms(x))).bind(centroids)
    size = tile_rows(x.device)
    native_loops(len(x))  # loaded where the rows are many

    def body(tiles: range) -> None:
        nearest = bound()
        for t in tiles:
            rows = slice(t * size, min((t + 1) * size, len(x)))
            codes[rows] = nearest(rows)

    parallel(-(-len(x) // size), body, device=x.device)
    return codes


class Clusters:
    """The clusters of all ranks' rows while the centroids move: who is where, and the sums.

    Sums are integers, so a row that has not moved need not be added again.

    Args:
        shard: This rank's rows.
        num_codes: K.
        comm: Process group.
        bound: Largest magnitude in the global matrix.
    """

    def __init__(self, shard: Shard, num_codes: int, *, comm: Collective, bound: float) -> None:
        width, device = shard.x.shape[1], shard.x.device
        self.shard, self.comm, self.fixed = shard, comm, FixedPoint.of(shard.total, bound)
        self.codes = torch.full((len(shard.x),), -1, dtype=torch.int32, device=device)
        self._total = torch.zeros(num_codes, width + 1, dtype=torch.int64, device=device)

    def update(self, kernel: Kernel, centroids: Tensor) -> tuple[Tensor, Tensor]:
        """Assign every row to its nearest centroid.

        Args:
            kernel: Over the shard's rows.
            centroids: float32 [K, D], the same on every rank.

        Returns:
            Of all ranks' rows that a fit may see: sums float64 [K, D] and counts int64 [K].
        """
        native_loops(len(self.shard.x))  # loaded where the rows are many
        ready, train, pieces = kernel.bind(centroids), self.shard.train, self.shard.pieces()

        def body(indices: range) -> Tensor:
            nearest, change = ready(), torch.zeros_like(self._total)
            for i in indices:
                rows = pieces[i]
                codes = nearest(rows)
                if train is not None:
                    codes = torch.where(train[rows], codes, -1)
                move_rows(change, self.shard.x[rows], self.codes[rows], codes, self.fixed)
            return change

        self._total += sum_of(parallel(len(pieces), body, device=self.shard.x.device))
        everywhere = self.comm.all_reduce(self._total.clone())
        return self.fixed.decode(everywhere[:, :-1]), everywhere[:, -1].clone()


def lloyd(
    shard: Shard,
    centroids: Tensor,
    *,
    comm: Collective,
    iterations: int,
    bound: float,
    kernel: Kernel | None = None,
    tolerance: float = 0.0,
) -> KMeans:
    """Lloyd iterations from given centroids; an empty cluster moves to the row farthest from its centroid.

    Stops early when nothing moves; goes on for up to `EXTRA` iterations while clusters are still empty.

    Args:
        shard: This rank's rows.
        centroids: float32 [K, D], the same on every rank.
        comm: Process group.
        iterations: Passes over all rows.
        bound: Largest magnitude in the global matrix.
        kernel: Over the shard's rows; None: float32.
        tolerance: Stop when an iteration lowers the inertia by less than this share of it.

    Returns:
        The same result, bit for bit, on every rank, for every partition of the rows and every kernel.
    """
    kernel = kernel or Float32(shard.x, row_norms(shard.x))
    clusters = Clusters(shard, len(centroids), comm=comm, bound=bound)
    squares = sum_of_squares(shard, comm, bound=bound)
    reseeded, inertia, done = 0, float("inf"), 0
    for done in range(1, iterations + EXTRA + 1):
        sums, counts = clusters.update(kernel, centroids)
        before, inertia = inertia, _inertia(squares, sums, counts, centroids)
        means = (sums / counts.clamp(min=1)[:, None]).float()
        empty = (counts == 0).nonzero().squeeze(1)
        updated = torch.where((counts > 0)[:, None], means, centroids)
        if len(empty):
            gaps = distances(shard.x, assign(shard.x, centroids, kernel=kernel), centroids)
            if shard.train is not None:
                gaps *= shard.train
            seeds = farthest_rows(shard.rows(), shard.x, gaps, count=len(empty), comm=comm)
            updated[empty[: len(seeds)]] = seeds
            reseeded += len(seeds)
            empty = empty[: len(seeds)]
        still = torch.equal(updated, centroids)
        centroids = updated
        enough = done >= iterations or before - inertia < tolerance * inertia
        if still or (enough and len(empty) == 0):
            break
    return KMeans(centroids, inertia, done, reseeded)


def _inertia(squares: float, sums: Tensor, counts: Tensor, centroids: Tensor) -> float:
    """Mean squared distance to the centroid, from what is known of the clusters."""

    def away_from(_: range) -> float:
        c = centroids.double()
        return squares - 2 * float((sums * c).sum()) + float((counts * (c * c).sum(1)).sum())

    # One worker: the order of the sums does not depend on the number of threads.
    (away,) = parallel(1, away_from, device=centroids.device)
    return max(away, 0.0) / max(int(counts.sum()), 1)


def farthest_rows(
    rows: Tensor, vectors: Tensor, distances: Tensor, *, count: int, comm: Collective
) -> Tensor:
    """Vectors of the rows with the largest distances, all different; ties by row.

    Args:
        rows: int64 [n] global rows of this rank.
        vectors: float32 [n, D] of those rows.
        distances: float32 [n]; rows at distance 0 are never chosen.
        count: How many are wanted.
        comm: Process group.

    Returns:
        float32 [<= count, D], the same on every rank; fewer when there are not so many different ones.
    """
    want = count + SPARE
    far, at = distances.cpu().numpy(), rows.cpu().numpy()
    local = np.lexsort((at, -far))[:want]
    local = local[far[local] > 0]
    slot = slice(comm.rank * want, comm.rank * want + len(local))
    gap = torch.zeros(comm.world * want, dtype=torch.float32, device=vectors.device)
    row = torch.zeros(comm.world * want, dtype=torch.int64, device=vectors.device)
    vector = torch.zeros(comm.world * want, vectors.shape[1], dtype=torch.float32, device=vectors.device)
    index = torch.from_numpy(local).to(vectors.device)
    gap[slot], row[slot], vector[slot] = distances[index], rows[index], vectors[index] + 0.0
    for part in (gap, row, vector):
        comm.all_reduce(part)
    far = gap.cpu().numpy()
    order = np.lexsort((row.cpu().numpy(), -far))[:want]
    order = order[far[order] > 0]
    candidates = vector[torch.from_numpy(order).to(vector.device)]
    _, first = np.unique(candidates.cpu().numpy(), axis=0, return_index=True)
    return candidates[torch.from_numpy(np.sort(first)[:count]).to(vector.device)]
