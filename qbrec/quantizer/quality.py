"""What the semantic IDs are worth, before anything is trained on them, and the gate that says no."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from qbrec.config.stages import QualityConfig
from qbrec.errors import GateError
from qbrec.quantizer.packing import code_bits, pack

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


def add_residual_energy(
    levels: list[dict[str, float]], *, held_out: Sequence[float], everywhere: Sequence[float]
) -> None:
    """Note per level what share of the variance is left after it, and R² on held-out items.

    Args:
        levels: From `level_usage`; gains `residual_energy` (all items), `residual_energy_held_out` and
            `r2_held_out`, which is 1 minus the latter.
        held_out: Squared error of held-out items after 0, 1, … L levels [L + 1].
        everywhere: The same of all items [L + 1].
    """
    for level, figures in enumerate(levels, start=1):
        figures["residual_energy"] = float(everywhere[level]) / max(float(everywhere[0]), 1e-300)
        figures["residual_energy_held_out"] = float(held_out[level]) / max(float(held_out[0]), 1e-300)
        figures["r2_held_out"] = 1.0 - figures["residual_energy_held_out"]


def bucket_figures(codes: np.ndarray, sizes: Sequence[int], *, group: np.ndarray) -> dict[str, Any]:
    """How items share IDs.

    Args:
        codes: Semantic IDs [N, L], N >= 1.
        sizes: Codes per level.
        group: Content group per item int64 [N].

    Returns:
        `unique_ids`; `prefixes`, different ones of 1, 2, … L codes; `no_collision_rate` (items alone on their
        ID); `collision_rate` (items that share it with an item of *other* content); `duplicate_rate` (items
        of a content group of more than one); `largest_bucket`; `gini` of the bucket sizes; `bucket_sizes`,
        for IDs of at most 1, 2, 4, 8, … items: `up_to` which number, how many `ids`, how many `items`. With
        items of equal content counted once: `num_contents`; `largest_bucket_contents`;
        `contents_alone_rate` (contents alone on their ID); `split_contents` (IDs that hold a content which
        another ID holds too, beyond the first of each); `bucket_contents`, like `bucket_sizes` by the number
        of contents.
    """
    packed = pack(codes, sizes)
    order = np.argsort(packed)
    packed = packed[order]
    bits = code_bits(sizes)
    shifts = [sum(bits[depth:]) for depth in range(1, len(bits) + 1)]
    size = _run_lengths(packed[1:] != packed[:-1])
    # Contents are told apart only where there is something to tell apart: at scale most IDs have one item.
    bucket = np.repeat(np.arange(len(size)), size)
    crowded = (size > 1)[bucket]
    inside, content = bucket[crowded], group[order[crowded]]
    by_content = np.lexsort((content, inside))
    inside, content = inside[by_content], content[by_content]
    fresh = np.ones(len(inside), dtype=bool)
    fresh[1:] = (inside[1:] != inside[:-1]) | (content[1:] != content[:-1])
    contents = np.bincount(inside[fresh], minlength=len(size))
    contents[size == 1] = 1
    ordered = np.sort(group)
    group_size = _run_lengths(ordered[1:] != ordered[:-1])
    ascending, rank = np.sort(size), np.arange(1, len(size) + 1)
    gini = float(2 * (rank * ascending).sum() / (len(size) * ascending.sum()) - (len(size) + 1) / len(size))
    return {
        "unique_ids": len(size),
        "prefixes": [int(np.count_nonzero(np.diff(packed >> shift))) + 1 for shift in shifts],
        "no_collision_rate": float((size == 1).sum() / len(codes)),
        "collision_rate": float(size[contents > 1].sum() / len(codes)),
        "duplicate_rate": float(group_size[group_size > 1].sum() / len(codes)),
        "largest_bucket": int(size.max()),
        "gini": gini,
        "bucket_sizes": _by_powers_of_two(size, size),
        "num_contents": len(group_size),
        "largest_bucket_contents": int(contents.max()),
        "contents_alone_rate": float((contents == 1).sum() / contents.sum()),
        "split_contents": int(contents.sum()) - len(group_size),
        "bucket_contents": _by_powers_of_two(contents, size),
    }


def _run_lengths(changes: np.ndarray) -> np.ndarray:
    """Lengths of the runs of a sorted array, from where it differs from the element before: bool [N - 1]."""
    return np.diff(np.concatenate([[0], np.flatnonzero(changes) + 1, [len(changes) + 1]]))


def _by_powers_of_two(count: np.ndarray, items: np.ndarray) -> list[dict[str, int]]:
    """IDs and items by `count` per ID, for 1, 2, 3-4, 5-8 and so on."""
    step = np.ceil(np.log2(count)).astype(np.int64)
    ids = np.bincount(step)
    held = np.bincount(step, weights=items)
    return [{"up_to": 2**i, "ids": int(n), "items": int(held[i])} for i, n in enumerate(ids)]


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
    ordered = unit[order]
    sums = np.add.reduceat(ordered, start, axis=0, dtype=np.float64)
    own = np.add.reduceat(np.einsum("nd,nd->n", ordered, ordered, dtype=np.float64), start)
    pairs = int((size * (size - 1)).sum())
    inside = float(((sums**2).sum(1) - own).sum())
    return (inside / pairs if pairs else 0.0), pairs // 2


def check_gate(quality: dict[str, Any], gate: QualityConfig) -> None:
    """Stop the run on a collapsed codebook.

    Args:
        quality: As written to quality.json.
        gate: Thresholds from the configuration.

    Raises:
        GateError: Names every figure that fails, its value, the threshold, the key and a way out.
    """
    failed = list(_failed(quality, gate))
    if len(failed) == 1:
        raise failed[0]
    if failed:
        told = "\n".join(textwrap.indent(str(error), "  ") for error in failed)
        raise GateError(
            f"{len(failed)} quality gates on the semantic IDs say no\n{told}",
            where="all figures: quantizer-quality.json in the run's directory",
        )


def _failed(quality: dict[str, Any], gate: QualityConfig) -> Iterator[GateError]:
    def no(what: str, key: str, fix: str) -> GateError:
        return GateError(what, where=f"quantizer.quality.{key} = {getattr(gate, key):g}", fix=fix)

    levels = quality["levels"]
    first = levels[0]
    collapsed = "the codebook has collapsed: perplexity"
    floor = gate.min_perplexity_fraction * first["codes"]
    if first["perplexity"] < floor:
        yield no(
            f"{collapsed} {first['perplexity']:.1f} at level 0, not {floor:.1f}",
            "min_perplexity_fraction",
            "look at the fused vectors (are many equal?), use smaller levels, or lower the threshold",
        )
    if first["perplexity"] < gate.min_perplexity:
        yield no(
            f"{collapsed} {first['perplexity']:.1f} at level 0, not {gate.min_perplexity:.1f}",
            "min_perplexity",
            "look at the fused vectors (are many equal?), use a larger first level, or lower the threshold",
        )
    for number, level in enumerate(levels):
        share = level["dead"] / level["codes"]
        if share > gate.max_dead_fraction:
            yield no(
                f"{level['dead']} of {level['codes']} codes of level {number} are dead: no item has them "
                f"({share:.1%}, not at most {gate.max_dead_fraction:.1%})",
                "max_dead_fraction",
                "use smaller or fewer quantizer.levels, or a higher threshold",
            )
    explained = levels[-1]["r2_held_out"]
    if gate.min_r2_held_out and explained < gate.min_r2_held_out:
        yield no(
            f"the codes say little about items the fit has not seen: R² {explained:.3f} after all levels, "
            f"not {gate.min_r2_held_out:.3f}",
            "min_r2_held_out",
            "more or larger quantizer.levels, a larger quantizer.sample, or a lower threshold",
        )
    near = quality["cohesion"][0]
    gain = near["cohesion"] - near["shuffled"]
    # Without two items on one code there is nothing to compare.
    if gate.min_cohesion_gain and near["pairs"] and gain <= gate.min_cohesion_gain:
        yield no(
            f"items on one code of level 0 are hardly alike: mean cosine {near['cohesion']:.3f} "
            f"(shuffled IDs: {near['shuffled']:.3f}), {gain:.3f} above chance, "
            f"not more than {gate.min_cohesion_gain:.3f}",
            "min_cohesion_gain",
            "train the fusion longer, use a larger first level, or lower the threshold",
        )
    rate = quality["collision_rate"]
    if rate > gate.max_collision_rate:
        yield no(
            f"collision rate {rate:.1%}, not at most {gate.max_collision_rate:.1%}: so many items share "
            "their ID with an item of other content",
            "max_collision_rate",
            "more or larger quantizer.levels, quantizer.collisions=next_nearest, or a higher threshold",
        )
    crowd = quality["largest_bucket_contents"]
    if gate.max_largest_bucket and crowd > gate.max_largest_bucket:
        yield no(
            f"{crowd:,} items of different content share one ID, not at most {gate.max_largest_bucket:,}",
            "max_largest_bucket",
            "more or larger quantizer.levels, quantizer.collisions=next_nearest, or a higher threshold",
        )
