"""Starting centroids far apart, drawn from a sample."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qbrec.quantizer.kmeans.chunks import parallel
from qbrec.quantizer.kmeans.kernels.gemm import TILE
from qbrec.quantizer.kmeans.lloyd import assign

Seeding = Literal["parallel", "plus_plus", "random"]

ROUNDS = 256  # of k-means++, for any number of codes
OVERSAMPLE, OVERSAMPLING_ROUNDS = 2.0, 5  # of k-means||: points drawn per code and round


def seeds_of(points: Tensor, num_codes: int, *, method: Seeding, seed: int) -> Tensor:
    """Starting centroids.

    Args:
        points: float32 [n, D], n >= 1.
        num_codes: K. Where fewer different points exist, some come twice.
        method: `parallel`: k-means||; `plus_plus`: greedy k-means++; `random`: points as they come.
        seed: Seeds the draws.

    Returns:
        float32 [K, D], the same for any number of threads.
    """
    if method == "parallel":
        return k_means_parallel(points, num_codes, seed=seed)
    if method == "plus_plus":
        return plus_plus(points, num_codes, seed=seed)
    rng = np.random.Generator(np.random.PCG64(seed))
    return points[
        torch.from_numpy(rng.choice(len(points), num_codes, replace=num_codes > len(points)))
    ].clone()


def k_means_parallel(points: Tensor, num_codes: int, *, seed: int) -> Tensor:
    """k-means|| (Bahmani et al. 2012): a few rounds of many draws each, then k-means++ on what was drawn.

    In every round a point is drawn with a probability proportional to its squared distance, about
    `OVERSAMPLE` K of them; a drawn point weighs as many points as are nearest to it.

    Args:
        points: float32 [n, D], n >= 1.
        num_codes: K.
        seed: Seeds the draws.

    Returns:
        float32 [K, D].
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    chosen = rng.integers(len(points), size=1)
    gaps = torch.full((len(points),), torch.inf, device=points.device)
    fresh = chosen
    for _ in range(OVERSAMPLING_ROUNDS):
        if not len(fresh):
            continue  # the last round drew nothing; this one may
        _nearer(gaps, points, points[torch.from_numpy(fresh).to(points.device)])
        gaps[torch.from_numpy(fresh).to(points.device)] = 0
        mass = gaps.cpu().numpy().astype(np.float64)
        if mass.sum() <= 0:
            break
        fresh = np.flatnonzero(rng.random(len(points)) * mass.sum() < OVERSAMPLE * num_codes * mass)
        chosen = np.append(chosen, fresh)
    drawn = points[torch.from_numpy(chosen).to(points.device)]
    weights = torch.bincount(assign(points, drawn), minlength=len(drawn)).cpu().numpy()
    return plus_plus(drawn, num_codes, seed=seed + 1, weights=weights)


def _nearer(gaps: Tensor, points: Tensor, centres: Tensor) -> None:
    """Lower `gaps` float32 [n] to the squared distance to the nearest of some more centres [m, D]."""
    squares = (centres * centres).sum(1)

    def body(tiles: range) -> None:
        for t in tiles:
            rows = slice(t * TILE, (t + 1) * TILE)
            x = points[rows]
            nearest = torch.addmm(squares, x, centres.t(), alpha=-2).amin(1)
            torch.minimum(gaps[rows], (nearest + (x * x).sum(1)).clamp_(min=0), out=gaps[rows])

    parallel(-(-len(points) // TILE), body, device=points.device)


def plus_plus(
    points: Tensor, num_codes: int, *, seed: int, weights: NDArray[np.int64] | None = None
) -> Tensor:
    """k-means++ (Arthur & Vassilvitskii 2007): each drawn with probability proportional to squared distance.

    Up to `ROUNDS` codes are drawn one by one, each the best of 2 + ln K draws (greedy); more codes are drawn
    in equal batches per round.

    Args:
        points: float32 [n, D], n >= 1.
        num_codes: K. Where fewer different points exist, some come twice.
        seed: Seeds the draws.
        weights: How many points each stands for, int64 [n]; None: one.

    Returns:
        float32 [K, D], the same for any number of threads.
    """
    mass = np.ones(len(points)) if weights is None else weights.astype(np.float64)
    # One worker: the sums that decide a draw are taken in one order, whatever the number of threads.
    (rows,) = parallel(1, lambda _: _draw(points, num_codes, mass, seed=seed), device=points.device)
    return points[rows].clone()


def _draw(points: Tensor, num_codes: int, weights: NDArray[np.float64], *, seed: int) -> Tensor:
    rng = np.random.Generator(np.random.PCG64(seed))
    norms = (points * points).sum(1)
    heavy = torch.from_numpy(weights).float().to(points.device)

    def gaps_to(rows: NDArray[np.int64]) -> Tensor:
        centres = points[torch.from_numpy(rows).to(points.device)]
        gaps = torch.addmm(norms[:, None], points, centres.t(), alpha=-2)
        return gaps.add_((centres * centres).sum(1)).clamp_(min=0)

    chosen = rng.integers(len(points), size=1)
    gaps = gaps_to(chosen).squeeze(1)
    gaps[int(chosen[0])] = 0
    per_round = -(-num_codes // ROUNDS)
    trials = 2 + int(math.log(num_codes)) if per_round == 1 else 1
    while len(chosen) < num_codes:
        want = min(per_round, num_codes - len(chosen))
        mass = np.cumsum(gaps.cpu().numpy() * weights)
        if mass[-1] <= 0:  # every different point is taken
            more = rng.integers(len(points), size=num_codes - len(chosen))
            return torch.from_numpy(np.append(chosen, more))
        draws = np.searchsorted(mass, rng.random(want * trials) * mass[-1], side="right")
        candidates = np.unique(draws.clip(max=len(points) - 1))
        nearer = torch.minimum(gaps_to(candidates), gaps[:, None])
        if trials > 1:
            best = int((heavy @ nearer).argmin())
            candidates, nearer = candidates[best : best + 1], nearer[:, best : best + 1]
        gaps = nearer.amin(1)
        gaps[torch.from_numpy(candidates).to(points.device)] = 0
        chosen = np.append(chosen, candidates)
    return torch.from_numpy(chosen)
