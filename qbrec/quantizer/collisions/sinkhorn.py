"""Collisions resolved by assigning the items of a prefix to its last codes all at once.

Entropic optimal transport of residuals to codes with uniform marginals (Cuturi 2013), on the last level and
for items of colliding IDs only: the uniform semantic mapping of LC-Rec (arXiv 2311.09049). It cannot part
residuals that are equal to the last bit by itself, so codes are handed out in turn, by the plan.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qbrec.quantizer.collisions.next_nearest import Residuals
from qbrec.quantizer.collisions.seating import Table, Taken, cut, seat
from qbrec.quantizer.collisions.units import Resolution, Units, live_buckets
from qbrec.quantizer.kmeans.kernels.gemm import TILE, Gemm
from qbrec.quantizer.packing import code_bits, code_dtype, runs, sort_keys

Ints = NDArray[np.int64]

PLAN_AT_ONCE = 1 << 19  # (unit, code) pairs that are solved together
FAR = 100.0  # logarithm of a factor: e^-100 and e^100 leave float64 plenty of room


def sinkhorn(
    codes: NDArray[Any],
    sizes: Sequence[int],
    *,
    group: Ints,
    popularity: Ints,
    capacity: int,
    last_level: Tensor,
    residuals: Residuals,
    epsilon: float,
    iterations: int,
    retired: NDArray[np.bool_] | None = None,
) -> Resolution:
    """Let at most `capacity` different contents share an ID, by changing only the last code.

    Within a prefix all units of IDs above the capacity are assigned anew, most popular first, in batches of
    at most as many units as the prefix has codes with room: a plan is made for the batch, and each of its
    units takes the code that the plan gives most of it to, of those that still have room; of codes with much
    the same share the nearest. Units of other IDs stay. Where a prefix has no room left, units keep their raw
    ID and are counted as unresolved.

    Args:
        codes: Raw codes [N, L].
        sizes: Codes per level.
        group: Content group per item int64 [N]; equal content, equal group.
        popularity: Interactions per item int64 [N].
        capacity: Units of different content per ID.
        last_level: Codebook of the last level float32 [K, D].
        residuals: Rows int64 [u] -> what the levels above leave of those items, float32 [u, D].
        epsilon: Weight of the entropy, on squared distances scaled to [-1, 1] within the batch.
        iterations: Updates of both marginals.
        retired: Items that keep their raw ID and take no room, bool [N]; None: there are none.
    """
    buckets, bits = live_buckets(codes, sizes, retired), code_bits(sizes)[-1]
    shared = np.flatnonzero(buckets.size > 1)
    units = Units.of(buckets, shared, group=group, popularity=popularity)
    count = units.per_bucket(len(shared))
    pending = np.flatnonzero(count[units.bucket] > capacity)
    stay = np.ones(len(buckets.id), dtype=np.int64)
    stay[shared] = np.where(count > capacity, 0, count)

    one_reader = Lock()

    def scores(some: Ints, slot: Ints, penalty: NDArray[np.float32]) -> Table:
        with one_reader:
            left = residuals(units.row[pending[some]])
        is_open = torch.from_numpy(np.isfinite(penalty)).to(left.device)
        plan = balanced(
            _distances(left, last_level), slot, is_open, epsilon=epsilon, iterations=iterations
        ).cpu()
        return lambda rows: plan[rows].numpy()

    chosen = seat(
        buckets.id[shared[units.bucket[pending]]] >> bits,
        units.priority[pending],
        bits=bits,
        num_codes=len(last_level),
        capacity=capacity,
        taken=Taken(buckets.id, stay),
        scores=scores,
        device=last_level.device,
    )
    out = codes.astype(code_dtype(sizes))
    stuck = units.write(out, pending, chosen)
    return Resolution(out, tuple(sizes), int((out[:, -1] != codes[:, -1]).sum()), stuck)


def _distances(x: Tensor, codebook: Tensor) -> Tensor:
    """Squared distances float64 [n, K] of rows float32 [n, D] to codes."""
    gemm = Gemm(codebook)
    inner = torch.cat([gemm.scores(tile).double() for tile in x.split(TILE)])
    return (x.double() ** 2).sum(1, keepdim=True) - 2 * inner


def balanced(distance: Tensor, slot: Ints, is_open: Tensor, *, epsilon: float, iterations: int) -> Tensor:
    """What speaks for each code, by the plans of many transport problems.

    In a problem every row gives the mass 1 and every open code takes 1; what is then missing, a row of slack
    gives at no cost. (If codes shared the mass of a few rows evenly, a row would go to many far codes alike.)
    The logarithm of a plan, rounded to powers of two, decides; distance decides where it is equal: before the
    plan has converged, a row fills several codes, and which is ahead would be a matter of rounding.

    Args:
        distance: Squared distances of rows to codes float64 [n, K].
        slot: Problem of each row int64 [n]; no problem has more rows than open codes.
        is_open: Codes that take part, by problem, bool [P, K].
        epsilon: See `sinkhorn`.
        iterations: See `sinkhorn`.

    Returns:
        float64 [n, K]: 2 round(log2 of the plan) + nearness in [0, 1]; -inf for codes that take no part.
    """
    ascending, order = sort_keys(slot)
    start, size = runs(ascending)
    problem, out = ascending[start], torch.empty_like(distance)
    for part in cut(size * distance.shape[1], PLAN_AT_ONCE):
        inside = np.arange(size[part].max())[None, :]
        real = torch.from_numpy(inside < size[part][:, None]).to(distance.device)
        rows = order[np.minimum(start[part][:, None] + inside, len(order) - 1)]
        at = torch.from_numpy(rows).to(distance.device)
        takes = is_open[torch.from_numpy(problem[part]).to(distance.device)]
        scores = _solve(distance[at], real, takes, epsilon=epsilon, iterations=iterations)
        out[at[real]] = scores[real]
    return out


def _solve(distance: Tensor, exists: Tensor, takes: Tensor, *, epsilon: float, iterations: int) -> Tensor:
    """Scores float64 [p, R, K] of distances [p, R, K], rows that exist [p, R] and open codes [p, K]."""
    closed, nothing = ~takes[:, None, :], ~exists[:, :, None]
    absent = nothing | closed
    low = distance.masked_fill(absent, torch.inf).amin((1, 2), keepdim=True)
    high = distance.masked_fill(absent, -torch.inf).amax((1, 2), keepdim=True)
    spread = (high - low).clamp_min(torch.finfo(torch.float64).tiny)
    nearness = (high - distance).masked_fill(absent, 0) / spread
    # The last row is the slack: its kernel is 1 wherever a code is open.
    log_kernel = torch.cat([(2 * nearness - 1) / epsilon, torch.zeros_like(distance[:, :1])], 1)
    log_kernel[:, :-1].masked_fill_(nothing, -torch.inf)
    log_kernel.masked_fill_(closed, -torch.inf)
    mass = torch.cat([exists, (takes.sum(1) - exists.sum(1))[:, None]], 1).double()[:, :, None]
    rows, codes = _potentials(log_kernel, mass, closed, iterations=iterations)
    return 2 * torch.round((log_kernel + rows + codes)[:, :-1] / math.log(2)) + nearness


def _potentials(
    log_kernel: Tensor, mass: Tensor, closed: Tensor, *, iterations: int
) -> tuple[Tensor, Tensor]:
    """Logarithms of the scalings of rows [p, R, 1] and codes [p, 1, K] that make kernels [p, R, K] plans.

    Updates are made to factors of the plan found so far, by products of matrices and vectors, and in the log
    domain when the factors leave the range in which nothing can overflow (Schmitzer 2019).
    """
    empty = mass == 0
    codes = torch.zeros_like(log_kernel[:, :1]).masked_fill(closed, -torch.inf)
    rows, plan = codes, None
    row_step = code_step = torch.zeros_like(codes)
    for _ in range(iterations):
        if plan is not None:
            a = (mass / (plan @ code_step.exp().mT)).masked_fill(empty, 1)
            b = (1 / (a.mT @ plan)).masked_fill(closed, 1)
            steps = a.log(), b.log()
            if all(bool((step.abs() <= FAR).all()) for step in steps):
                row_step, code_step = steps
                continue
            codes = codes + code_step
        inflow = torch.logsumexp(log_kernel + codes, 2, keepdim=True)
        rows = mass.log() - inflow.masked_fill(inflow == -torch.inf, 0)
        codes = (-torch.logsumexp(log_kernel + rows, 1, keepdim=True)).masked_fill(closed, -torch.inf)
        log_plan = log_kernel + rows + codes
        # Numbers too small to matter would become denormal: arithmetic with those is ten times slower.
        plan = log_plan.exp().masked_fill(log_plan < -5 * FAR, 0)
        row_step, code_step = torch.zeros_like(rows), torch.zeros_like(codes)
    return rows + row_step, codes + code_step
