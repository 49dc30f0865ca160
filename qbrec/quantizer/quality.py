"""What the semantic IDs are worth, before anything is trained on them, and the gate that says no."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qbrec.config.stages import QualityConfig
from qbrec.errors import GateError
from qbrec.quantizer.packing import pack

PAIR_ROWS = 200_000  # items on which cohesion is measured


def level_usage(codes: np.ndarray, sizes: Sequence[int]) -> list[dict[str, float]]:
    """Per level: codes, used, dead, perplexity (exp of the entropy), share of the largest code.

    Args:
        codes: Semantic IDs [N, L], N >= 1.
        sizes: Codes per level.
    """
    out = []
    for level, size in enumerate(sizes):
        counts = np.bincount(codes[:, level], minlength=size)
        share = counts[counts > 0] / len(codes)
        out.append(
            {
                "codes": int(size),
                "used": int((counts > 0).sum()),
                "dead": int((counts == 0).sum()),
                "perplexity": float(np.exp(-(share * np.log(share)).sum())),
                "largest_share": float(share.max()),
            }
        )
    return out


def bucket_figures(codes: np.ndarray, sizes: Sequence[int], *, group: np.ndarray) -> dict[str, float]:
    """How items share IDs.

    Args:
        codes: Semantic IDs [N, L].
        sizes: Codes per level.
        group: Content group per item int64 [N].

    Returns:
        `unique_ids`; `no_collision_rate` (items alone on their ID); `collision_rate` (items that share it
        with an item of *other* content); `duplicate_rate` (items of a content group of more than one);
        `largest_bucket`; `gini` of the bucket sizes.
    """
    _, bucket, size = np.unique(pack(codes, sizes), return_inverse=True, return_counts=True)
    _, dense = np.unique(group, return_inverse=True)
    groups = int(dense.max()) + 1
    pairs = np.unique(bucket.astype(np.int64) * groups + dense)
    contents = np.bincount(pairs // groups, minlength=len(size))
    ascending = np.sort(size)
    rank = np.arange(1, len(size) + 1)
    gini = float(2 * (rank * ascending).sum() / (len(size) * ascending.sum()) - (len(size) + 1) / len(size))
    return {
        "unique_ids": len(size),
        "no_collision_rate": float((size[bucket] == 1).mean()),
        "collision_rate": float((contents[bucket] > 1).mean()),
        "duplicate_rate": float((np.bincount(dense)[dense] > 1).mean()),
        "largest_bucket": int(size.max()),
        "gini": gini,
    }


def cohesion(
    vectors: np.ndarray, codes: np.ndarray, sizes: Sequence[int], *, seed: int
) -> list[dict[str, float]]:
    """Mean cosine of two different items that share a prefix, for prefixes of one and two codes.

    Args:
        vectors: float32 [n, D], centred.
        codes: Their semantic IDs [n, L].
        sizes: Codes per level.
        seed: Shuffles the IDs for comparison.

    Returns:
        Per prefix length `cohesion`, the same over `shuffled` IDs, and the number of `pairs`.
    """
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = (vectors / np.maximum(norms, 1e-12)).astype(np.float32)
    shuffle = np.random.Generator(np.random.PCG64(seed)).permutation(len(codes))
    out = []
    for depth in range(1, min(2, codes.shape[1]) + 1):
        prefix = pack(codes[:, :depth], sizes)
        real, pairs = _mean_cosine(unit, prefix)
        chance, _ = _mean_cosine(unit, prefix[shuffle])
        out.append({"prefix": depth, "cohesion": real, "shuffled": chance, "pairs": pairs})
    return out


def _mean_cosine(unit: np.ndarray, prefix: np.ndarray) -> tuple[float, int]:
    # The sum of all cosines within a set is |sum of its unit vectors|^2; the items' cosines with themselves
    # go off.
    order = np.argsort(prefix, kind="stable")
    fresh = np.ones(len(order), dtype=bool)
    fresh[1:] = prefix[order][1:] != prefix[order][:-1]
    start = np.flatnonzero(fresh)
    size = np.diff(np.append(start, len(order)))
    sums = np.add.reduceat(unit[order].astype(np.float64), start, axis=0)
    own = np.add.reduceat((unit[order].astype(np.float64) ** 2).sum(1), start)
    pairs = int((size * (size - 1)).sum())
    inside = float(((sums**2).sum(1) - own).sum())
    return (inside / pairs if pairs else 0.0), pairs // 2


def check_gate(quality: dict[str, Any], gate: QualityConfig) -> None:
    """Stop the run on a collapsed codebook.

    Args:
        quality: As written to quality.json.
        gate: Thresholds from the configuration.

    Raises:
        GateError: Names the figure, its value and the threshold.
    """
    first = quality["levels"][0]
    floor = gate.min_perplexity_fraction * first["codes"]
    if first["perplexity"] < floor:
        raise GateError(
            f"the codebook has collapsed: perplexity {first['perplexity']:.1f} at level 0, not {floor:.1f}",
            where=f"quantizer.quality.min_perplexity_fraction = {gate.min_perplexity_fraction:g}",
            fix="look at the fused vectors (are many equal?), use smaller levels, or lower the threshold",
        )
    rate = quality["collision_rate"]
    if rate > gate.max_collision_rate:
        raise GateError(
            f"collision rate {rate:.1%}: so many items share their ID with an item of other content",
            where=f"quantizer.quality.max_collision_rate = {gate.max_collision_rate:g}",
            fix="more or larger quantizer.levels, quantizer.collisions=next_nearest, or a higher threshold",
        )
