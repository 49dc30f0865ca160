"""What each part of the model is worth: evaluations of runs without it, compared user by user."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from qbrec.config.ablations import FULL
from qbrec.errors import DataError
from qbrec.evaluation.bootstrap import UserSums
from qbrec.evaluation.results import IDS_ALONE, MODEL, metric_cells
from qbrec.ranking.metrics import metrics_of_ranks
from qbrec.storage.artifact import Artifact

SHOWN = ("hr@10", "ndcg@10")


def compare(evaluations: Mapping[str, Artifact], *, resamples: int, seed: int) -> dict[str, Any]:
    """Metrics of every variant, and its paired difference to the full model.

    Args:
        evaluations: Evaluation artifacts by variant, `full` among them, on one set of test users.
        resamples: Bootstrap resamples.
        seed: Of them.

    Returns:
        {variant: {model: {"metrics": {metric: cell}, "minus_full": {metric: cell}}}}, seen items removed; a
        cell is {"mean", "low", "high"}. Models are `qbrec` and, where there is a bonus to leave out,
        `qbrec_ids`.

    Raises:
        DataError: Two evaluations have other users.
    """
    measured = {variant: _per_user(artifact) for variant, artifact in evaluations.items()}
    users = measured[FULL]["user"]
    sums = UserSums(len(users), seed=seed)
    places = {}
    for variant, columns in measured.items():
        if not np.array_equal(columns["user"], users):
            raise DataError(
                f"the variant {variant} was evaluated on other users",
                where=str(evaluations[variant].path),
                fix="leave `data` and `catalog` as they are between variants",
            )
        for model in (MODEL, IDS_ALONE):
            if model in columns:
                places[variant, model] = sums.add(columns[model])
    totals = sums.totals() / len(users)
    resampled = sums.resampled(resamples=resamples, seed=seed + 1) / len(users)
    found: dict[str, Any] = {variant: {} for variant in measured}
    for (variant, model), place in places.items():
        entry = {"metrics": metric_cells(totals[place], resampled[:, place])}
        whole = places.get((FULL, model))
        if variant != FULL and whole is not None:
            difference = resampled[:, place] - resampled[:, whole]
            entry["minus_full"] = metric_cells(totals[place] - totals[whole], difference)
        found[variant][model] = entry
    return found


def format_ablation(found: Mapping[str, Any]) -> str:
    """A table for the terminal; * where the interval of a difference excludes 0."""
    lines = []
    for model in (MODEL, IDS_ALONE):
        if model not in found[FULL]:
            continue
        head = "".join(f"{name.upper():>10}{'− full':>10}{'95 % interval':>20}" for name in SHOWN)
        lines += ["", f"{model:<18}{head}", "─" * (18 + len(head))]
        for variant, models in found.items():
            if model in models:
                lines.append(f"{variant:<18}" + "".join(_columns(models[model], name) for name in SHOWN))
    return "\n".join(lines[1:])


def _columns(entry: Mapping[str, Any], name: str) -> str:
    mean = entry["metrics"][name]["mean"]
    if "minus_full" not in entry:
        return f"{mean:>10.4f}{'':>10}{'':>20}"
    cell = entry["minus_full"][name]
    star = "*" if cell["low"] > 0 or cell["high"] < 0 else " "
    span = f"{cell['low']:+.4f} {cell['high']:+.4f}"
    return f"{mean:>10.4f}{cell['mean']:>+9.4f}{star}{span:>20}"


def _per_user(artifact: Artifact) -> dict[str, NDArray[Any]]:
    """`user` int64 [B], and by model its metrics float64 [B, metrics], averaged over its seeds."""
    table = pq.read_table(artifact.file("ranks.parquet"))
    found = {"user": table["user"].to_numpy()}
    for model in (MODEL, IDS_ALONE):
        seeds = [name for name in table.column_names if name.split("@")[0] == f"{model}_removed"]
        if seeds:
            values = [metrics_of_ranks(table[name].to_numpy().astype(np.int64)) for name in seeds]
            found[model] = np.mean(values, axis=0)
    return found
