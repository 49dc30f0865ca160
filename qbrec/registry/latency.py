"""How long one recommendation takes here, on real histories, within a bounded time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qbrec.config.sections import LatencyGateConfig
from qbrec.registry.gate import Check
from qbrec.registry.recommend import Recommender
from qbrec.storage.machine import host_name

K = 10  # items asked for
_WARM_UP = 3  # requests that do not count: the first ones build and compile


@dataclass(frozen=True)
class Latency:
    """Wall-clock time of single requests, in milliseconds."""

    p50_ms: float
    p95_ms: float
    num_requests: int


def measure_latency(
    recommender: Recommender, histories: Sequence[Sequence[str]], *, max_seconds: float
) -> Latency:
    """Ask for every history by itself, as a server would.

    Args:
        recommender: The model, opened.
        histories: Item ids; at least one history.
        max_seconds: When to stop, warm-up included; one request at least counts.
    """
    k = min(K, recommender.num_candidates)
    begin = time.perf_counter()
    for history in histories[:_WARM_UP]:
        recommender.recommend([history], k=k)
    taken: list[float] = []
    for history in histories:
        start = time.perf_counter()
        if taken and start - begin > max_seconds:
            break
        recommender.recommend([history], k=k)
        taken.append(1000 * (time.perf_counter() - start))
    p50, p95 = np.quantile(taken, [0.5, 0.95])
    return Latency(float(p50), float(p95), len(taken))


def check_latency(
    recommender: Recommender, histories: Sequence[Sequence[str]], wanted: LatencyGateConfig
) -> Check:
    """Whether the 95th percentile is short enough.

    Args:
        recommender: The model, opened.
        histories: Those that the version carries.
        wanted: Threshold (not None), and how long to measure.
    """
    assert wanted.max_p95_ms is not None
    name = "latency of one recommendation"
    if not histories:
        return Check(
            name,
            False,
            "the version carries no real histories: register its run again with registry.probe_histories "
            "above 0 (the catalogue needs users with a test item)",
        )
    some = histories[: wanted.histories]
    found = measure_latency(recommender, some, max_seconds=wanted.max_seconds)
    sign = "≤" if found.p95_ms <= wanted.max_p95_ms else ">"
    left = len(some) - found.num_requests
    reason = (
        f"p95 {found.p95_ms:.1f} ms {sign} {wanted.max_p95_ms:g} ms, median {found.p50_ms:.1f} ms, over "
        f"{found.num_requests:,} histories on {host_name()}"
    )
    if left:
        reason += f"; {left:,} more were left out after {wanted.max_seconds:g} s"
    return Check(name, found.p95_ms <= wanted.max_p95_ms, reason)
