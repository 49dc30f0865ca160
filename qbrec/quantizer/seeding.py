"""k-means++ seeding (Arthur & Vassilvitskii 2007), greedy, in at most `ROUNDS` rounds for any K."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from qbrec.quantizer.chunks import parallel

ROUNDS = 256


def plus_plus(points: Tensor, num_codes: int, *, seed: int) -> Tensor:
    """Choose starting centroids far apart: each drawn with probability proportional to its squared distance.

    Up to `ROUNDS` codes are drawn one by one, each the best of 2 + ln K draws (greedy); more codes are drawn
    in equal batches per round, as in k-means|| (Bahmani et al. 2012) but without oversampling.

    Args:
        points: float32 [n, D], n >= 1.
        num_codes: K. Where fewer different points exist, some come twice.
        seed: Seeds the draws.

    Returns:
        float32 [K, D], the same for any number of threads.
    """
    # One worker: the sums that decide a draw are taken in one order, whatever the number of threads.
    (rows,) = parallel(1, lambda _: _draw(points, num_codes, seed=seed), device=points.device)
    return points[rows].clone()


def _draw(points: Tensor, num_codes: int, *, seed: int) -> Tensor:
    rng = np.random.Generator(np.random.PCG64(seed))
    norms = (points * points).sum(1)

    def gaps_to(rows: np.ndarray) -> Tensor:
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
        mass = np.cumsum(gaps.cpu().numpy(), dtype=np.float64)
        if mass[-1] <= 0:  # every different point is taken
            return torch.from_numpy(
                np.append(chosen, rng.integers(len(points), size=num_codes - len(chosen)))
            )
        draws = np.searchsorted(mass, rng.random(want * trials) * mass[-1], side="right")
        candidates = np.unique(draws.clip(max=len(points) - 1))
        nearer = torch.minimum(gaps_to(candidates), gaps[:, None])
        if trials > 1:
            best = int(nearer.sum(0, dtype=torch.float64).argmin())
            candidates, nearer = candidates[best : best + 1], nearer[:, best : best + 1]
        gaps = nearer.amin(1)
        gaps[torch.from_numpy(candidates).to(points.device)] = 0
        chosen = np.append(chosen, candidates)
    return torch.from_numpy(chosen)
