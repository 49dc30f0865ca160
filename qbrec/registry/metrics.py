"""Reading `metrics.json` of an evaluation (layout: `evaluation.results`): the mode that serves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qbrec.evaluation.results import MODEL
from qbrec.ranking import METRICS

HEADLINE = "ndcg@10"  # where there is room for one metric
SEEN = "removed"  # items of the history are not recommended again: the mode that serves

Cells = dict[str, dict[str, float]]  # metric name -> mean, low, high


def cells_of(table: Mapping[str, Any]) -> dict[str, Cells]:
    """Cells of every model (or baseline, of a paired table), qbrec first."""
    return {name: table[name][SEEN] for name in sorted(table, key=lambda name: (name != MODEL, name))}


def metric_names(table: Mapping[str, Cells]) -> list[str]:
    """Names of all metrics in their usual order (JSON comes sorted, hr@10 before hr@5)."""
    present = {name for cells in table.values() for name in cells}
    return [name for name in METRICS if name in present]


def qbrec_cells(table: Mapping[str, Any]) -> Cells:
    """Cells of qbrec by metric, of the whole or of a slice; empty where nobody is in it."""
    cells: Cells = table.get("models", {}).get(MODEL, {}).get(SEEN, {})
    return cells


def metric_value(metrics: Mapping[str, Any], name: str) -> float | None:
    """Mean of one metric of qbrec: `ndcg@10`, or `cold/ndcg@10` on a slice; None if it is not there."""
    part, _, metric = name.rpartition("/")
    cell = qbrec_cells(metrics["slices"].get(part, {}) if part else metrics).get(metric)
    return None if cell is None else float(cell["mean"])


def qbrec_means(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Mean of every metric of qbrec."""
    return {name: float(cell["mean"]) for name, cell in qbrec_cells(metrics).items()}
