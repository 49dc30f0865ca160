"""What a gate asks of a version alone: floors on its metrics, on its semantic IDs, and on cold start."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from qbrec.config.sections import IdGateConfig
from qbrec.registry.gate import Check
from qbrec.registry.metrics import metric_value


def check_floors(metrics: Mapping[str, Any], floors: Mapping[str, float]) -> tuple[Check, ...]:
    """Floors on means of the version's own evaluation.

    Args:
        metrics: Its `metrics.json`.
        floors: By metric, on a slice where its name stands before; what the evaluation lacks does not pass.
    """

    def missing(name: str) -> str:
        part = name.rpartition("/")[0]
        slices = metrics.get("slices", {})
        if part and part not in slices:
            return f"the evaluation has no slice {part!r}, only {', '.join(sorted(slices))}"
        if part and not slices[part]["models"]:
            return f"the evaluation has nobody in the slice {part!r}"
        return "the evaluation has no such metric"

    return _floors("", floors, lambda name: metric_value(metrics, name), missing)


def check_coldstart(document: Mapping[str, Any] | None, floors: Mapping[str, float]) -> tuple[Check, ...]:
    """Floors on what `qbrec coldstart` measured.

    Args:
        document: Its `coldstart.json`; None: the version carries none.
        floors: By race, slice and metric: `held_out/ndcg@10`, `catalogue/non_duplicate/hr@10`.
    """

    def value(name: str) -> float | None:
        race, _, rest = name.partition("/")
        return None if document is None else metric_value(document[race], rest)

    def missing(name: str) -> str:
        if document is None:
            return (
                "the version carries no measurement of it: run `qbrec coldstart` with its configuration, "
                "then `qbrec register`"
            )
        return "the measurement has no such metric"

    return _floors("cold start, ", floors, value, missing)


def check_ids(quality: Mapping[str, Any], wanted: IdGateConfig) -> tuple[Check, ...]:
    """What the semantic IDs must be like.

    Args:
        quality: The `quality.json` of the codebooks.
        wanted: Thresholds; None: not asked.
    """
    first = quality["levels"][0]
    checks = []
    for name, value, floor in (
        ("alone on their ID", quality["no_collision_rate"], wanted.min_no_collision_rate),
        ("perplexity of level 0", first["perplexity"] / first["codes"], wanted.min_perplexity_share),
    ):
        if floor is not None:
            sign = "≥" if value >= floor else "<"
            checks.append(Check(f"semantic IDs, {name}", value >= floor, f"{value:.1%} {sign} {floor:.1%}"))
    most = wanted.max_largest_bucket
    if most is not None:
        crowd = quality["largest_bucket"]
        sign = "≤" if crowd <= most else ">"
        checks.append(Check("semantic IDs, items on one ID", crowd <= most, f"{crowd:,} {sign} {most:,}"))
    return tuple(checks)


def _floors(
    title: str,
    floors: Mapping[str, float],
    value_of: Callable[[str], float | None],
    missing: Callable[[str], str],
) -> tuple[Check, ...]:
    checks = []
    for name, floor in sorted(floors.items()):
        value = value_of(name)
        if value is None:
            checks.append(Check(f"{title}floor {name}", False, missing(name)))
        else:
            sign = "≥" if value >= floor else "<"
            checks.append(Check(f"{title}floor {name}", value >= floor, f"{value:.4f} {sign} {floor:.4f}"))
    return tuple(checks)
