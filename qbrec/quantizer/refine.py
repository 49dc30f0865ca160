"""From residual k-means to RVQ: all codebooks together, by moving averages and by least squares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations, pairwise

import numpy as np
import torch
from torch import Tensor

from qbrec.quantizer.encoders import descend, take_off
from qbrec.quantizer.kmeans.chunks import (
    GRAIN,
    Collective,
    FixedPoint,
    Shard,
    batches,
    max_abs,
    parallel,
    sum_of,
)
from qbrec.quantizer.kmeans.kernels.gemm import Gemm, native_loops
from qbrec.quantizer.kmeans.lloyd import assign, farthest_rows
from qbrec.quantizer.kmeans.sums import add_rows, distances
from qbrec.quantizer.rvq import Codebooks, decode, encode

DECAY = 0.9  # of the moving averages, per batch
COUNTED = 8  # batches that tell how often each code is used at the start
DEAD = 1 / 16  # of the average count: below this a code is restarted
RESTART_EVERY = 8  # batches: a code that has just restarted needs some time to find its members
RIDGE = 1.0  # of the least squares, in rows per code: rare codes stay near where they were
CG_ITERATIONS = 16
REVIVALS = 4  # rounds per level: moving a code can empty another


class MovingAverages:
    """Joint moving averages of all codebooks (van den Oord et al. 2017, A.1), with dead-code restart.

    Every batch is encoded greedily with the codebooks as they stand; counts and sums per code, all-reduced
    exactly, move all levels at once. A code whose average count falls below `DEAD` of the mean restarts on
    the hardest residual of the batch.

    Args:
        shard: This rank's standardised rows.
        books: Where to start.
        comm: Process group.
        seed: Seeds the order of the batches.
    """

    def __init__(self, shard: Shard, books: Codebooks, *, comm: Collective, seed: int) -> None:
        self.shard, self.comm, self.seed = shard, comm, seed
        self.levels = [level.clone() for level in books.levels]
        self.bound = max_abs(shard, comm)
        grains = -(-shard.total // GRAIN)
        # Start from what one average batch would have counted, by a few of them.
        some = batches(grains, seed=seed)[:COUNTED]
        counts = self._pass(np.sort(np.concatenate(some)))[1]
        self.counts = [c.double() / len(some) for c in counts]
        self.sums = [level.double() * n[:, None] for level, n in zip(self.levels, self.counts, strict=True)]

    def epoch(self, epoch: int) -> None:
        """Move the codebooks once through all rows."""
        grains = -(-self.shard.total // GRAIN)
        for step, batch in enumerate(batches(grains, seed=self.seed + epoch)):
            sums, counts = self._pass(batch)
            for level in range(len(self.levels)):
                self.counts[level].mul_(DECAY).add_(counts[level].double() * (1 - DECAY))
                self.sums[level].mul_(DECAY).add_(sums[level] * (1 - DECAY))
                alive = self.counts[level] > 0
                mean = self.sums[level] / self.counts[level].clamp(min=1e-12)[:, None]
                self.levels[level] = torch.where(alive[:, None], mean.float(), self.levels[level])
            if step % RESTART_EVERY == 0:
                for level in range(len(self.levels)):
                    self._restart(level, batch)

    @property
    def books(self) -> Codebooks:
        """The codebooks as they stand."""
        return Codebooks(tuple(level.clone() for level in self.levels))

    def _local(self, batch: np.ndarray) -> list[int]:
        first = self.shard.start // GRAIN
        return [int(g) - first for g in batch if first <= g < first + self.shard.num_grains]

    def _pass(self, batch: np.ndarray) -> tuple[list[Tensor], list[Tensor]]:
        """Sums float64 [K_l, D] and counts int64 [K_l] of the residuals entering each level, over a batch."""
        width, device = self.shard.x.shape[1], self.shard.x.device
        books = Codebooks(tuple(self.levels))
        fixed = FixedPoint.of(len(batch) * GRAIN, self.bound + books.magnitude)
        local = self._local(batch)
        edges = np.cumsum([0, *books.sizes])

        def body(indices: range) -> Tensor:
            nearest = [Gemm(level, rows=GRAIN) for level in self.levels]
            acc = torch.zeros(int(edges[-1]), width + 1, dtype=torch.int64, device=device)
            for i in indices:
                rows = self.shard.grain(local[i])
                residual = self.shard.x[rows].clone()
                for level, codebook in enumerate(self.levels):
                    codes = nearest[level].nearest(residual)
                    seen = codes if self.shard.train is None else codes.where(self.shard.train[rows], -1)
                    add_rows(acc[edges[level] : edges[level + 1]], residual, seen, fixed)
                    take_off(residual, codebook, codes)
            return acc

        native_loops(len(self.shard.x))  # loaded where the rows are many
        acc = sum_of(parallel(len(local), body, device=device))
        self.comm.all_reduce(acc)
        parts = [acc[a:b] for a, b in pairwise(edges)]
        return [fixed.decode(p[:, :width]) for p in parts], [p[:, width].clone() for p in parts]

    def _train_rows(self, grain: int) -> tuple[Tensor, Tensor]:
        rows = self.shard.grain(grain)
        at = torch.arange(rows.start, rows.stop, device=self.shard.x.device) + self.shard.start
        if self.shard.train is None:
            return at, self.shard.x[rows].clone()
        kept = self.shard.train[rows]
        return at[kept], self.shard.x[rows][kept]

    def _restart(self, level: int, batch: np.ndarray) -> None:
        floor = float(self.counts[level].sum()) / len(self.counts[level]) * DEAD
        dead = (self.counts[level] < floor).nonzero().squeeze(1)
        if not len(dead):
            return
        local, width, device = self._local(batch), self.shard.x.shape[1], self.shard.x.device

        def body(indices: range) -> list[tuple[int, Tensor, Tensor, Tensor]]:
            nearest = [Gemm(codebook, rows=GRAIN) for codebook in self.levels[: level + 1]]
            out = []
            for i in indices:
                at, residual = self._train_rows(local[i])
                for upper in range(level):
                    residual -= self.levels[upper][nearest[upper].nearest(residual)]
                left = residual - self.levels[level][nearest[level].nearest(residual)]
                out.append((i, at, residual, (left * left).sum(1)))
            return out

        found = sorted(
            (g for part in parallel(len(local), body, device=device) for g in part), key=lambda g: g[0]
        )
        rows = torch.cat([torch.empty(0, dtype=torch.int64, device=device), *(g[1] for g in found)])
        vectors = torch.cat([torch.empty(0, width, device=device), *(g[2] for g in found)])
        gaps = torch.cat([torch.empty(0, device=device), *(g[3] for g in found)])
        seeds = farthest_rows(rows, vectors, gaps, count=len(dead), comm=self.comm)
        dead = dead[: len(seeds)]
        self.levels[level][dead] = seeds
        self.counts[level][dead] = 2 * floor
        self.sums[level][dead] = seeds.double() * 2 * floor


def least_squares(shard: Shard, books: Codebooks, *, comm: Collective, beam: int = 1) -> Codebooks:
    """All codebooks at once, given the codes: the additive-quantizer update (Babenko & Lempitsky 2014).

    Minimises sum_i |x_i - sum_l C_l[c_il]|^2 + RIDGE |C - C_old|^2 by conjugate gradients. The normal matrix
    is made of the counts of pairs of codes, K_i × K_j per pair of levels: exact integers over all ranks, as
    the right side is.

    Args:
        shard: This rank's standardised rows.
        books: Codebooks that give the codes and the starting point.
        comm: Process group.
        beam: As in `encode`.

    Returns:
        New codebooks, the same on every rank.
    """
    codes = encode(shard.x, books, beam=beam)
    kept = codes if shard.train is None else codes.masked_fill(~shard.train[:, None], -1)
    errors, counts = _errors_by_code(shard, codes, kept, books, comm)
    pairs = _pairs(kept, books.sizes, comm)
    edges = np.cumsum([0, *books.sizes]).tolist()
    spans = [slice(a, b) for a, b in pairwise(edges)]
    diagonal = counts.double()[:, None] + RIDGE

    def normal(v: Tensor) -> Tensor:
        out = diagonal * v
        for (i, j), table in pairs.items():
            out[spans[i]] += table @ v[spans[j]]
            out[spans[j]] += table.t() @ v[spans[i]]
        return out

    # One worker: the order of float64 sums does not depend on the number of threads.
    (step,) = parallel(1, lambda _: _conjugate_gradients(normal, errors, diagonal), device=shard.x.device)
    moved = [book + step[span].float() for book, span in zip(books.levels, spans, strict=True)]
    return Codebooks(tuple(moved))


def _errors_by_code(
    shard: Shard, codes: Tensor, kept: Tensor, books: Codebooks, comm: Collective
) -> tuple[Tensor, Tensor]:
    """Sum per code of what the codebooks leave of its rows, float64 [sum K, D], and rows per code [sum K]."""
    fixed = FixedPoint.of(shard.total, max_abs(shard, comm) + books.magnitude)
    edges = np.cumsum([0, *books.sizes]).tolist()
    shape = (edges[-1], shard.x.shape[1] + 1)

    def body(grains: range) -> Tensor:
        acc = torch.zeros(shape, dtype=torch.int64, device=shard.x.device)
        for g in grains:
            rows = shard.grain(g)
            left = shard.x[rows] - decode(codes[rows], books)
            for level in range(len(books.levels)):
                add_rows(acc[edges[level] : edges[level + 1]], left, kept[rows, level].contiguous(), fixed)
        return acc

    acc = sum_of(parallel(shard.num_grains, body, device=shard.x.device))
    comm.all_reduce(acc)
    return fixed.decode(acc[:, :-1]), acc[:, -1]


def _pairs(kept: Tensor, sizes: Sequence[int], comm: Collective) -> dict[tuple[int, int], Tensor]:
    """How many rows have code a at level i and code b at level j, float64 [K_i, K_j] for i < j."""
    rows = kept[kept[:, 0] >= 0]
    found = {}
    for i, j in combinations(range(len(sizes)), 2):
        table = torch.bincount(rows[:, i] * sizes[j] + rows[:, j], minlength=sizes[i] * sizes[j])
        found[i, j] = comm.all_reduce(table).view(sizes[i], sizes[j]).double()
    return found


def _conjugate_gradients(normal: Callable[[Tensor], Tensor], residual: Tensor, diagonal: Tensor) -> Tensor:
    """Solve normal(step) = residual from step 0, every column for itself, with a diagonal preconditioner."""
    step = torch.zeros_like(residual)
    scaled = residual / diagonal
    direction, rho = scaled, (residual * scaled).sum(0)
    start = float(rho.sum())
    for _ in range(CG_ITERATIONS):
        if start == 0 or float(rho.sum()) <= 1e-10 * start:
            break
        image = normal(direction)
        alpha = rho / (direction * image).sum(0).clamp(min=1e-300)
        step, residual = step + alpha * direction, residual - alpha * image
        scaled = residual / diagonal
        rho, old = (residual * scaled).sum(0), rho
        direction = scaled + rho / old.clamp(min=1e-300) * direction
    return step


def revive(shard: Shard, books: Codebooks, *, comm: Collective) -> Codebooks:
    """Move codes that no row uses to the hardest residuals of their level, so that every code says something.

    Args:
        shard: This rank's standardised rows.
        books: Codebooks, read greedily.
        comm: Process group.

    Returns:
        New codebooks; codes stay unused only where a level has fewer different residuals than codes.
    """
    ids = encode(shard.x, books)
    unused = _unused(shard, ids, books.sizes, comm)
    first = next((level for level, codes in enumerate(unused) if len(codes)), len(unused))
    if first == len(unused):
        return books
    residual, levels = shard.x.clone(), list(books.levels)
    for level in range(len(levels)):
        codes = ids[:, level] if level <= first else assign(residual, levels[level])
        for _ in range(REVIVALS):
            (dead,) = _unused(shard, codes[:, None], (len(levels[level]),), comm)
            if not len(dead):
                break
            gaps = distances(residual, codes, levels[level])
            if shard.train is not None:
                gaps *= shard.train
            seeds = farthest_rows(shard.rows(), residual, gaps, count=len(dead), comm=comm)
            levels[level] = levels[level].clone()
            levels[level][dead[: len(seeds)]] = seeds
            codes = assign(residual, levels[level])
        descend(residual, levels[level], codes)
    return Codebooks(tuple(levels))


def _unused(shard: Shard, codes: Tensor, sizes: Sequence[int], comm: Collective) -> list[Tensor]:
    """Codes of each level that no row of any rank has: int64 [n, L] -> L times int64."""
    kept = codes if shard.train is None else codes[shard.train]
    counts = [torch.bincount(kept[:, level], minlength=size) for level, size in enumerate(sizes)]
    return [(comm.all_reduce(count) == 0).nonzero().squeeze(1) for count in counts]
