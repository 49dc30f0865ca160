"""From residual k-means to RVQ: all codebooks together, by moving averages and by least squares."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from qbrec.quantizer.chunks import GRAIN, TILE, Collective, FixedPoint, Shard, max_abs, parallel, sum_of
from qbrec.quantizer.kmeans import Assigner, add_by_code, assign, farthest_rows
from qbrec.quantizer.rvq import Codebooks, decode, encode

DECAY = 0.9  # of the moving averages, per batch
DEAD = 1 / 16  # of the average count: below this a code is restarted
RIDGE = 1.0  # of the least squares, in rows per code: rare codes stay near where they were
CG_ITERATIONS = 8
REVIVALS = 4  # rounds per level: moving a code can empty another


def batches(num_grains: int, *, seed: int) -> list[np.ndarray]:
    """One epoch's batches of global grains: each takes one grain from every stratum of the row range.

    So a batch holds about as many grains of every rank, while the batches do not depend on the number of
    ranks.
    """
    strata = min(max(4, num_grains // 64), max(1, num_grains // 8))
    rng = np.random.Generator(np.random.PCG64(seed))
    edges = np.arange(strata + 1) * num_grains // strata
    drawn = [rng.permutation(np.arange(a, b)) for a, b in pairwise(edges)]
    longest = max(len(d) for d in drawn)
    return [np.array([d[i] for d in drawn if i < len(d)], dtype=np.int64) for i in range(longest)]


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
        steps = len(batches(grains, seed=0))
        counts = self._pass(np.arange(grains))[1]
        # Start from what one average batch would have counted.
        self.counts = [c.double() / steps for c in counts]
        self.sums = [level.double() * n[:, None] for level, n in zip(self.levels, self.counts, strict=True)]

    def epoch(self, epoch: int) -> None:
        """Move the codebooks once through all rows."""
        grains = -(-self.shard.total // GRAIN)
        for batch in batches(grains, seed=self.seed + epoch):
            sums, counts = self._pass(batch)
            for level in range(len(self.levels)):
                self.counts[level].mul_(DECAY).add_(counts[level].double() * (1 - DECAY))
                self.sums[level].mul_(DECAY).add_(sums[level] * (1 - DECAY))
                alive = self.counts[level] > 0
                mean = self.sums[level] / self.counts[level].clamp(min=1e-12)[:, None]
                self.levels[level] = torch.where(alive[:, None], mean.float(), self.levels[level])
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
            nearest = [Assigner(level) for level in self.levels]
            acc = torch.zeros(int(edges[-1]), width + 1, dtype=torch.int64, device=device)
            for i in indices:
                residual = self._train_rows(local[i])[1]
                for level, codebook in enumerate(self.levels):
                    codes = _assign_grain(nearest[level], residual)
                    part = acc[edges[level] : edges[level + 1]]
                    part[:, :width] += add_by_code(residual, codes, len(codebook), fixed)
                    part[:, width] += torch.bincount(codes, minlength=len(codebook))
                    residual -= codebook[codes]
            return acc

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
            nearest = [Assigner(codebook) for codebook in self.levels[: level + 1]]
            out = []
            for i in indices:
                at, residual = self._train_rows(local[i])
                for upper in range(level):
                    residual -= self.levels[upper][_assign_grain(nearest[upper], residual)]
                left = residual - self.levels[level][_assign_grain(nearest[level], residual)]
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


def _assign_grain(nearest: Assigner, x: Tensor) -> Tensor:
    return torch.cat([nearest(tile)[0] for tile in x.split(TILE)])


def least_squares(shard: Shard, books: Codebooks, *, comm: Collective, beam: int = 1) -> Codebooks:
    """All codebooks at once, given the codes: the additive-quantizer update (Babenko & Lempitsky 2014).

    Minimises sum_i |x_i - sum_l C_l[c_il]|^2 + RIDGE |C - C_old|^2 by conjugate gradients, without forming
    the normal matrix: one iteration is one decode and one sum per code, so it takes any codebook size, and
    the sums are exact over ranks.

    Args:
        shard: This rank's standardised rows.
        books: Codebooks that give the codes and the starting point.
        comm: Process group.
        beam: As in `encode`.

    Returns:
        New codebooks, the same on every rank.
    """
    codes = encode(shard.x, books, beam=beam)
    bound = max_abs(shard, comm) + books.magnitude
    edges = np.cumsum([0, *books.sizes])

    def sums(source: Codebooks, limit: float, *, of_error: bool) -> np.ndarray:
        """Sum per code of what `source` decodes to, or of what it leaves of the rows: float64 [sum K, D]."""
        fixed = FixedPoint.of(shard.total, limit)
        width = shard.x.shape[1]

        def body(grains: range) -> Tensor:
            acc = torch.zeros(int(edges[-1]), width, dtype=torch.int64, device=shard.x.device)
            for g in grains:
                rows = shard.grain(g)
                x, code = shard.x[rows], codes[rows]
                if shard.train is not None:
                    x, code = x[shard.train[rows]], code[shard.train[rows]]
                value = x - decode(code, source) if of_error else decode(code, source)
                for level, size in enumerate(source.sizes):
                    acc[edges[level] : edges[level + 1]] += add_by_code(value, code[:, level], size, fixed)
            return acc

        acc = sum_of(parallel(shard.num_grains, body, device=shard.x.device))
        comm.all_reduce(acc)
        return fixed.decode(acc).cpu().numpy()

    def split(flat: np.ndarray) -> Codebooks:
        tensor = torch.from_numpy(flat).to(shard.x.device, torch.float32)
        return Codebooks(tuple(tensor[a:b] for a, b in pairwise(edges)))

    def normal(v: np.ndarray) -> np.ndarray:
        top = len(books.levels) * float(np.abs(v).max())
        return sums(split(v), top, of_error=False) + RIDGE * v

    diagonal = _counts(shard, codes, books, comm)[:, None] + RIDGE
    residual = sums(books, bound, of_error=True)
    step = np.zeros_like(residual)
    scaled = residual / diagonal
    direction, rho = scaled, (residual * scaled).sum(0)
    start = rho.sum()
    for _ in range(CG_ITERATIONS):
        if rho.sum() <= 1e-10 * start or start == 0:
            break
        image = normal(direction)
        alpha = rho / np.maximum((direction * image).sum(0), 1e-300)
        step, residual = step + alpha * direction, residual - alpha * image
        scaled = residual / diagonal
        rho, old = (residual * scaled).sum(0), rho
        direction = scaled + rho / np.maximum(old, 1e-300) * direction
    moved = split(step)
    return Codebooks(tuple(a + b for a, b in zip(books.levels, moved.levels, strict=True)))


def _counts(shard: Shard, codes: Tensor, books: Codebooks, comm: Collective) -> np.ndarray:
    kept = codes if shard.train is None else codes[shard.train]
    counts = [torch.bincount(kept[:, level], minlength=size) for level, size in enumerate(books.sizes)]
    flat = torch.cat(counts)
    comm.all_reduce(flat)
    return flat.cpu().numpy().astype(np.float64)


def revive(shard: Shard, books: Codebooks, *, comm: Collective) -> Codebooks:
    """Move codes that no row uses to the hardest residuals of their level, so that every code says something.

    Args:
        shard: This rank's standardised rows.
        books: Codebooks, read greedily.
        comm: Process group.

    Returns:
        New codebooks; codes stay unused only where a level has fewer different residuals than codes.
    """
    residual, levels = shard.x.clone(), list(books.levels)
    for level in range(len(levels)):
        for _ in range(REVIVALS):
            codes = assign(residual, levels[level])
            kept = codes if shard.train is None else codes[shard.train]
            counts = torch.bincount(kept, minlength=len(levels[level]))
            comm.all_reduce(counts)
            dead = (counts == 0).nonzero().squeeze(1)
            if not len(dead):
                break
            gaps = _gaps(residual, codes, levels[level])
            if shard.train is not None:
                gaps *= shard.train
            seeds = farthest_rows(shard.rows(), residual, gaps, count=len(dead), comm=comm)
            levels[level] = levels[level].clone()
            levels[level][dead[: len(seeds)]] = seeds
        residual -= levels[level][assign(residual, levels[level])]
    return Codebooks(tuple(levels))


def _gaps(residual: Tensor, codes: Tensor, codebook: Tensor) -> Tensor:
    out = torch.zeros(len(residual), dtype=torch.float32, device=residual.device)

    def body(tiles: range) -> None:
        for t in tiles:
            rows = slice(t * TILE, (t + 1) * TILE)
            left = residual[rows] - codebook[codes[rows]]
            out[rows] = (left * left).sum(1)

    parallel(-(-len(residual) // TILE), body, device=residual.device)
    return out
