"""Reading `metrics.json` of an evaluation: the one place that knows its layout on this side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MODEL = "qbrec"
SEEN = "removed"  # items of the history are not recommended again: the setting that serves


def metric_rows(
    metrics: Mapping[str, Any],
) -> tuple[list[str], list[tuple[str, list[dict[str, float] | None]]]]:
    """Metric names, and per model the cells {"mean", "low", "high"}, qbrec first.

    Args:
        metrics: The document of the evaluation artifact.
    """
    models = {name: entry[SEEN] for name, entry in metrics["models"].items()}
    order = sorted(models, key=lambda name: (name != MODEL, name))
    names = list(models[order[0]]) if order else []
    return names, [(name, [models[name].get(metric) for metric in names]) for name in order]


def metric_value(metrics: Mapping[str, Any], name: str) -> float | None:
    """Mean of one metric of qbrec, such as `ndcg@10`; None if there is none of that name."""
    cell = metrics["models"].get(MODEL, {}).get(SEEN, {}).get(name)
    return None if cell is None else float(cell["mean"])


def qbrec_means(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Mean of every metric of qbrec."""
    return {name: float(cell["mean"]) for name, cell in metrics["models"][MODEL][SEEN].items()}
