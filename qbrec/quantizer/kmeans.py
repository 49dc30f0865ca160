"""Distributed k-means whose centroids are the same, bit for bit, on any number of ranks of one device type.

k-means++ seeding on a seeded global sample, Lloyd iterations on a sample, then passes over every row.
Assignment is a GEMM and an arg-max per tile; sums are int64 fixed point per grain, all-reduced as int64
(`chunks`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qbrec.quantizer.chunks import (
    TILE,
    Collective,
    FixedPoint,
    Shard,
    gather_rows,
    max_abs,
    parallel,
    split_rows,
    stratified,
    sum_of,
)
from qbrec.quantizer.seeding import plus_plus

SAMPLE_PER_CODE = 256  # rows per centroid on which Lloyd starts
SEED_ROWS_PER_CODE = 64  # rows per centroid that seeding sees, within the limits below
MIN_SEED_ROWS, MAX_SEED_ROWS = 16_384, 262_144
SPARE = 256  # candidates beyond the clusters to be re-seeded: equal rows are chosen once
EXTRA = 8  # further iterations while re-seeded clusters still have to find their members


@dataclass(frozen=True)
class KMeans:
    """Result of a fit: centroids float32 [K, D], mean squared distance before the last update, work done."""

    centroids: Tensor
    inertia: float
    iterations: int
    reseeded: int


@dataclass(frozen=True)
class Step:
    """What one pass over the rows yields.

    Attributes:
        sums: Of all ranks' rows per code, int64 [K, D] fixed point.
        counts: Of all ranks' rows per code, int64 [K].
        inertia: Mean squared distance to the nearest centroid, over all ranks.
        distances: Squared distances of this rank's rows, float32 [n]; 0 for rows that a fit may not see.
    """

    sums: Tensor
    counts: Tensor
    inertia: float
    distances: Tensor


class Assigner:
    """Nearest centroid of rows: float32 GEMM on tiles of one shape, lowest index on ties.

    Args:
        centroids: float32 [K, D].
    """

    def __init__(self, centroids: Tensor) -> None:
        self.centroids = centroids
        self.columns = centroids.t().contiguous()
        self.minus_half_norms = -0.5 * (centroids * centroids).sum(1)
        shape = (TILE, centroids.shape[1])
        self.tile = torch.zeros(shape, dtype=torch.float32, device=centroids.device)
        self.scores = torch.empty(TILE, len(centroids), dtype=torch.float32, device=centroids.device)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes int64 [b] and scores x·c - |c|²/2 float32 [b] of at most `TILE` rows.

        Not to be shared between threads: the buffers belong to this object.
        """
        rows = len(x)
        if rows < TILE:
            # The same shape for every GEMM: a kernel for a short tail may round differently.
            self.tile[:rows] = x
            self.tile[rows:] = 0
            x = self.tile
        torch.addmm(self.minus_half_norms, x, self.columns, out=self.scores)
        scores = self.scores[:rows]
        codes = row_argmax(scores)
        return codes, scores.gather(1, codes[:, None]).squeeze(1)


def row_argmax(scores: Tensor) -> Tensor:
    """Index of the largest value per row, int64 [b]; the lowest index on ties."""
    if scores.device.type == "cpu":
        # numpy's arg-max along rows is vectorised; torch's is 10 times slower than the GEMM's share allows.
        return torch.from_numpy(scores.numpy().argmax(1))
    return scores.argmax(1)


def assign(x: Tensor, centroids: Tensor) -> Tensor:
    """Nearest centroid of each row in float32, lowest index on ties.

    Args:
        x: float32 [n, D].
        centroids: float32 [K, D].

    Returns:
        int64 [n].
    """
    codes = torch.empty(len(x), dtype=torch.int64, device=x.device)

    def body(tiles: range) -> None:
        nearest = Assigner(centroids)
        for t in tiles:
            codes[t * TILE : (t + 1) * TILE] = nearest(x[t * TILE : (t + 1) * TILE])[0]

    parallel(-(-len(x) // TILE), body, device=x.device)
    return codes


def add_by_code(x: Tensor, codes: Tensor, num_codes: int, fixed: FixedPoint) -> Tensor:
    """Fixed-point sum of the rows of one grain per code, int64 [K, D]."""
    if x.device.type == "cpu":
        # One thread, rows in order: the float32 sum of a grain is a pure function of the grain.
        out = torch.zeros(num_codes, x.shape[1], dtype=torch.float32)
        return fixed.encode(out.index_add_(0, codes, x))
    return add_as_integers(x, codes, num_codes, fixed)


def add_as_integers(x: Tensor, codes: Tensor, num_codes: int, fixed: FixedPoint) -> Tensor:
    """As `add_by_code`, each row made an integer first: a GPU adds in any order, and integers do not care."""
    out = torch.zeros(num_codes, x.shape[1], dtype=torch.int64, device=x.device)
    return out.index_add_(0, codes, fixed.encode(x))


def lloyd_step(shard: Shard, centroids: Tensor, *, comm: Collective, bound: float) -> Step:
    """Assign every row to its nearest centroid and sum up the clusters.

    Args:
        shard: This rank's rows.
        centroids: float32 [K, D], the same on every rank.
        comm: Process group.
        bound: Largest magnitude in the global matrix.
    """
    num_codes, width = centroids.shape
    fixed = FixedPoint.of(shard.total, bound)
    farthest = (bound + float(centroids.abs().max())) ** 2 * width
    loss = FixedPoint.of(shard.total, farthest)
    device = shard.x.device
    distances = torch.zeros(len(shard.x), dtype=torch.float32, device=device)

    def body(grains: range) -> Tensor:
        nearest = Assigner(centroids)
        acc = torch.zeros(num_codes + 1, width + 1, dtype=torch.int64, device=device)
        for g in grains:
            rows = shard.grain(g)
            x = shard.x[rows]
            codes, scores = (torch.cat(p) for p in zip(*(nearest(t) for t in x.split(TILE)), strict=True))
            gap = ((x * x).sum(1) - 2 * scores).clamp_(min=0)
            if shard.train is not None:
                kept = shard.train[rows]
                gap *= kept
                x, codes = x[kept], codes[kept]
            distances[rows] = gap
            acc[:num_codes, :width] += add_by_code(x, codes, num_codes, fixed)
            acc[:num_codes, width] += torch.bincount(codes, minlength=num_codes)
            acc[num_codes, width] += loss.encode(gap.double().sum())
        return acc

    acc = sum_of(parallel(shard.num_grains, body, device=device))
    comm.all_reduce(acc)
    counts = acc[:num_codes, width].clone()
    inertia = float(loss.decode(acc[num_codes, width])) / max(int(counts.sum()), 1)
    return Step(acc[:num_codes, :width], counts, inertia, distances)


def lloyd(shard: Shard, centroids: Tensor, *, comm: Collective, iterations: int, bound: float) -> KMeans:
    """Lloyd iterations from given centroids; an empty cluster moves to the row farthest from its centroid.

    Stops early when nothing moves; goes on for up to `EXTRA` iterations while clusters are still empty.

    Returns:
        The same result, bit for bit, on every rank and for every partition of the rows.
    """
    fixed = FixedPoint.of(shard.total, bound)
    reseeded, inertia, done = 0, 0.0, 0
    for done in range(1, iterations + EXTRA + 1):
        step = lloyd_step(shard, centroids, comm=comm, bound=bound)
        inertia = step.inertia
        means = (fixed.decode(step.sums) / step.counts.clamp(min=1)[:, None]).float()
        empty = (step.counts == 0).nonzero().squeeze(1)
        updated = torch.where((step.counts > 0)[:, None], means, centroids)
        if len(empty):
            seeds = farthest_rows(shard.rows(), shard.x, step.distances, count=len(empty), comm=comm)
            updated[empty[: len(seeds)]] = seeds
            reseeded += len(seeds)
            empty = empty[: len(seeds)]
        still = torch.equal(updated, centroids)
        centroids = updated
        if still or (done >= iterations and len(empty) == 0):
            break
    return KMeans(centroids, inertia, done, reseeded)


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


def fit_kmeans(
    shard: Shard,
    num_codes: int,
    *,
    comm: Collective,
    seed: int,
    iterations: int = 20,
    full_passes: int = 2,
    max_sample: int = 1_048_576,
) -> KMeans:
    """Seed on a sample, run Lloyd on a sample of 256 rows per code, finish with passes over all rows.

    A catalogue no larger than the sample gets its `iterations` on all rows at once.

    Args:
        shard: This rank's rows; together the ranks hold the whole matrix.
        num_codes: K.
        comm: Process group.
        seed: Seeds sampling and k-means++.
        iterations: Lloyd iterations on the sample.
        full_passes: Lloyd iterations over all rows after the sample.
        max_sample: Upper limit of the sample, in rows over all ranks.
    """
    train = train_rows(shard, comm)
    bound = max_abs(shard, comm)
    chosen = train[stratified(len(train), min(max_sample, SAMPLE_PER_CODE * num_codes), seed=seed)]
    seeding = min(max(SEED_ROWS_PER_CODE * num_codes, MIN_SEED_ROWS), MAX_SEED_ROWS, len(chosen))
    pool = gather_rows(shard, chosen[stratified(len(chosen), seeding, seed=seed + 1)], comm)
    centroids = pool[:1].expand(num_codes, -1).clone()
    if comm.rank == 0:
        centroids = plus_plus(pool, num_codes, seed=seed + 2)
    comm.broadcast(centroids)
    if len(chosen) == len(train):
        return lloyd(shard, centroids, comm=comm, iterations=iterations, bound=bound)
    sample = gather_rows(shard, chosen, comm)
    start, stop = split_rows(len(sample), rank=comm.rank, world=comm.world)
    part = Shard(sample[start:stop].clone(), start, len(sample))
    first = lloyd(part, centroids, comm=comm, iterations=iterations, bound=bound)
    if full_passes == 0:
        return first
    last = lloyd(shard, first.centroids, comm=comm, iterations=full_passes, bound=bound)
    iterations, reseeded = first.iterations + last.iterations, first.reseeded + last.reseeded
    return KMeans(last.centroids, last.inertia, iterations, reseeded)


def train_rows(shard: Shard, comm: Collective) -> np.ndarray:
    """Global rows that a fit may see, int64, sorted, on every rank."""
    if shard.train is None:
        return np.arange(shard.total, dtype=np.int64)
    flags = torch.zeros(shard.total, dtype=torch.uint8, device=shard.x.device)
    flags[shard.start : shard.start + len(shard.x)] = shard.train.to(torch.uint8)
    comm.all_reduce(flags)
    return np.flatnonzero(flags.cpu().numpy())
