"""Distributed k-means: seeds, a first approximation, then passes over every row."""

from __future__ import annotations

from typing import Literal, TypedDict, Unpack

import numpy as np
import torch
from torch import Tensor

from qbrec.quantizer.kmeans.chunks import (
    GRAIN,
    Collective,
    FixedPoint,
    Shard,
    batches,
    gather_rows,
    max_abs,
    parallel,
    split_rows,
    stratified,
    sum_of,
)
from qbrec.quantizer.kmeans.kernels.choose import choose
from qbrec.quantizer.kmeans.kernels.gemm import Gemm
from qbrec.quantizer.kmeans.lloyd import KMeans, lloyd
from qbrec.quantizer.kmeans.seeding import Seeding, seeds_of
from qbrec.quantizer.kmeans.sums import add_by_code

Warmup = Literal["sample", "mini_batch"]

SMALL = 131_072  # rows up to which no sample is taken
SAMPLE_PER_CODE = 128  # rows per centroid on which Lloyd starts
SEED_ROWS_PER_CODE = 16  # rows per centroid that seeding sees of a sample, within the limits below
MIN_SEED_ROWS, MAX_SEED_ROWS = 4096, 131_072
TOLERANCE = 2e-3  # Lloyd on the sample stops when an iteration gains less than this share of the inertia


class KMeansOptions(TypedDict, total=False):
    """How long and how a fit goes; what is left out has its default.

    Attributes:
        seeding: How the first centroids are drawn, see `seeding`; `plus_plus`.
        warmup: `sample`: Lloyd on the sample. `mini_batch`: one pass of mini-batches over all rows instead.
        iterations: Lloyd iterations on the sample, at most (see `TOLERANCE`); 20. With 0 and no full passes
            the seeds stay as they are.
        full_passes: Lloyd iterations over all rows after the sample or the mini-batches; 1.
        max_sample: Upper limit of the sample, in rows over all ranks; 2^20.
    """

    seeding: Seeding
    warmup: Warmup
    iterations: int
    full_passes: int
    max_sample: int


def fit_kmeans(
    shard: Shard,
    num_codes: int,
    *,
    comm: Collective,
    seed: int,
    **options: Unpack[KMeansOptions],
) -> KMeans:
    """Seed on a sample, run Lloyd on a sample of 128 rows per code, finish with passes over all rows.

    A catalogue of at most `SMALL` rows, or no larger than the sample, gets its `iterations` on all rows.

    Args:
        shard: This rank's rows; together the ranks hold the whole matrix.
        num_codes: K.
        comm: Process group.
        seed: Seeds sampling, seeding and the order of mini-batches.
        **options: See `KMeansOptions`.
    """
    seeding, warmup = options.get("seeding", "plus_plus"), options.get("warmup", "sample")
    iterations, full_passes = options.get("iterations", 20), options.get("full_passes", 1)
    max_sample = options.get("max_sample", 1_048_576)
    train = train_rows(shard, comm)
    bound = max_abs(shard, comm)
    small = len(train) <= min(max_sample, SMALL)
    size = len(train) if small else min(max_sample, SAMPLE_PER_CODE * num_codes)
    chosen = train[stratified(len(train), size, seed=seed)]
    few = max(SEED_ROWS_PER_CODE * num_codes, MIN_SEED_ROWS) if len(chosen) < len(train) else MAX_SEED_ROWS
    count = min(few, MAX_SEED_ROWS, len(chosen))
    pool = gather_rows(shard, chosen[stratified(len(chosen), count, seed=seed + 1)], comm)
    centroids = pool[:1].expand(num_codes, -1).clone()
    if comm.rank == 0:
        centroids = seeds_of(pool, num_codes, method=seeding, seed=seed + 2)
    comm.broadcast(centroids)
    if warmup == "mini_batch":
        centroids = mini_batches(shard, centroids, comm=comm, seed=seed + 3, bound=bound)
        first = KMeans(centroids, float("nan"), 1, 0)
    elif len(chosen) == len(train):
        full_passes = max(iterations, full_passes)
        first = KMeans(centroids, float("nan"), 0, 0)
    elif iterations:
        sample = gather_rows(shard, chosen, comm)
        start, stop = split_rows(len(sample), rank=comm.rank, world=comm.world)
        part = Shard(sample[start:stop].clone(), start, len(sample))
        kernel = choose(part.x, centroids, passes=iterations, sample=pool)
        first = lloyd(
            part,
            centroids,
            comm=comm,
            iterations=iterations,
            bound=bound,
            kernel=kernel,
            tolerance=TOLERANCE if full_passes else 0.0,
        )
    else:
        first = KMeans(centroids, float("nan"), 0, 0)
    if full_passes == 0:
        return first
    kernel = choose(shard.x, first.centroids, passes=full_passes, sample=pool)
    last = lloyd(shard, first.centroids, comm=comm, iterations=full_passes, bound=bound, kernel=kernel)
    iterations, reseeded = first.iterations + last.iterations, first.reseeded + last.reseeded
    return KMeans(last.centroids, last.inertia, iterations, reseeded)


def mini_batches(shard: Shard, centroids: Tensor, *, comm: Collective, seed: int, bound: float) -> Tensor:
    """One pass of mini-batch k-means (Sculley 2010): every centroid is the mean of what it has been given.

    Batches are the same for any number of ranks (`chunks.batches`).

    Args:
        shard: This rank's rows.
        centroids: Where to start, float32 [K, D]; each counts as one row.
        comm: Process group.
        seed: Seeds the order of the batches.
        bound: Largest magnitude in the global matrix.

    Returns:
        float32 [K, D], the same on every rank.
    """
    num_codes, width = centroids.shape
    fixed = FixedPoint.of(shard.total, bound)
    sums, counts = centroids.double(), torch.ones(num_codes, dtype=torch.float64, device=centroids.device)
    first = shard.start // GRAIN

    for batch in batches(-(-shard.total // GRAIN), seed=seed):
        local = [int(g) - first for g in batch if first <= g < first + shard.num_grains]

        def body(indices: range, now: Tensor = centroids, local: list[int] = local) -> Tensor:
            gemm = Gemm(now, rows=GRAIN)
            acc = torch.zeros(num_codes, width + 1, dtype=torch.int64, device=now.device)
            for i in indices:
                rows = shard.grain(local[i])
                x = shard.x[rows] if shard.train is None else shard.x[rows][shard.train[rows]]
                acc += add_by_code(x, gemm.nearest(x), num_codes, fixed)
            return acc

        total = sum_of(parallel(len(local), body, device=shard.x.device))
        comm.all_reduce(total)
        sums += fixed.decode(total[:, :width])
        counts += total[:, width]
        centroids = (sums / counts[:, None]).float()
    return centroids


def train_rows(shard: Shard, comm: Collective) -> np.ndarray:
    """Global rows that a fit may see, int64, sorted, on every rank."""
    if shard.train is None:
        return np.arange(shard.total, dtype=np.int64)
    flags = torch.zeros(shard.total, dtype=torch.uint8, device=shard.x.device)
    flags[shard.start : shard.start + len(shard.x)] = shard.train.to(torch.uint8)
    comm.all_reduce(flags)
    return np.flatnonzero(flags.cpu().numpy())
