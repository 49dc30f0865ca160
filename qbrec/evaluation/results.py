"""From ranks to `metrics.json`.

Layout (a cell is `{"mean", "low", "high"}` with the ends of a 95 % bootstrap interval over users; mode is
`removed` or `kept`, for seen items; metric is one of `ranking.METRICS`):

    protocol   {"domain", "split", "num_users", "num_candidates", "duplicate_share", "bootstrap",
               "confidence"}; duplicate_share: of the users, with a near-duplicate of their target in the
               history
    models     {model: {mode: {metric: cell}}}
    paired     {baseline: {mode: {metric: cell}}}     qbrec minus the baseline, per user
    slices     {slice: {"num_users", "models": as above, "paired": as above}}    empty where nobody is in it
    coverage   {model: share of the candidates in anybody's top 10, seen removed}
    settings   {model: what was tuned on validation}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qbrec.evaluation.bootstrap import Cell, UserSums, interval
from qbrec.evaluation.protocol import ModelRanks
from qbrec.ranking.metrics import METRICS, metrics_of_ranks

MODEL = "qbrec"
IDS_ALONE = "qbrec_ids"  # the same model without the co-occurrence bonus, where it has one
MODES = ("removed", "kept")

Table = dict[str, dict[str, dict[str, Cell]]]


def summarise(
    ranks: Mapping[str, ModelRanks],
    slices: Mapping[str, NDArray[np.bool_]],
    *,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Means, intervals and paired differences of all models, over all users and by slice.

    Args:
        ranks: By model; `qbrec` among them is compared with each other one.
        slices: bool [B] by name, `all` among them.
        resamples: Bootstrap resamples.
        seed: Of them.

    Returns:
        `models`, `paired`, `slices`, `coverage` as in the head of this module.
    """
    num_users = len(slices["all"])
    sums = UserSums(num_users, seed=seed)
    sizes, places = {}, {}
    for name, member in slices.items():
        sizes[name] = sums.add(member[:, None].astype(np.float64))
    for model, result in ranks.items():
        for mode in MODES:
            values = metrics_of_ranks(result.of(mode))
            for name, member in slices.items():
                places[name, model, mode] = sums.add(values * member[:, None])
    totals, resampled = sums.totals(), sums.resampled(resamples=resamples, seed=seed + 1)
    by_slice: dict[str, dict[str, Any]] = {}
    for name in slices:
        size = round(float(totals[sizes[name]][0]))
        by_slice[name] = {"num_users": size, "models": {}, "paired": {}}
        if not size:
            continue
        with np.errstate(invalid="ignore"):  # a resample may hold nobody of a tiny slice: 0 / 0, left out
            replicates = {
                key: resampled[:, places[name, *key]] / resampled[:, sizes[name]] for key in _keys(ranks)
            }
        means = {key: totals[places[name, *key]] / size for key in _keys(ranks)}
        for model, mode in _keys(ranks):
            key = model, mode
            by_slice[name]["models"].setdefault(model, {})[mode] = _cells(means[key], replicates[key])
            if MODEL in ranks and model != MODEL:
                ours = MODEL, mode
                cells = _cells(means[ours] - means[key], replicates[ours] - replicates[key])
                by_slice[name]["paired"].setdefault(model, {})[mode] = cells
    return {
        "models": by_slice["all"]["models"],
        "paired": by_slice["all"]["paired"],
        "slices": by_slice,
        "coverage": {model: result.coverage for model, result in ranks.items()},
    }


def _keys(ranks: Mapping[str, ModelRanks]) -> list[tuple[str, str]]:
    return [(model, mode) for model in ranks for mode in MODES]


def _cells(means: NDArray[np.float64], replicates: NDArray[np.float64]) -> dict[str, Cell]:
    low, high = interval(replicates)
    return {
        metric: {"mean": float(means[i]), "low": float(low[i]), "high": float(high[i])}
        for i, metric in enumerate(METRICS)
    }
