"""From ranks to `metrics.json`.

Layout (a cell is `{"mean", "low", "high"}` with the ends of a 95 % bootstrap interval over users; mode is
`removed` or `kept`, for seen items; metric is one of `ranking.METRICS`):

    protocol   {"domain", "split", "num_users", "num_candidates", "seeds", "duplicate_share", "bootstrap",
               "confidence"}; duplicate_share: of the users, with a near-duplicate of their target in the
               history
    models     {model: {mode: {metric: cell}}}
    paired     {baseline: {mode: {metric: cell}}}     qbrec minus the baseline, per user
    slices     {slice: {"num_users", "models": as above, "paired": as above}}    empty where nobody is in it
    seeds      {model: {mode: {metric: {"mean", "sd", "values"}}}}    of models trained from several seeds:
               the mean over users by seed; everywhere else each user's metrics are averaged over seeds first
    coverage   {model: share of the candidates in anybody's top 10, seen removed}
    settings   {model: what was tuned on validation}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qbrec.evaluation.bootstrap import Cell, UserSums, interval
from qbrec.evaluation.protocol import ModelRanks
from qbrec.ranking.metrics import METRICS, metrics_of_ranks

MODEL = "qbrec"
IDS_ALONE = "qbrec_ids"  # the same model without the bonus of item graphs, where it has one
MODES = ("removed", "kept")

Table = dict[str, dict[str, dict[str, Cell]]]


def summarise(
    ranks: Mapping[str, Sequence[ModelRanks]],
    slices: Mapping[str, NDArray[np.bool_]],
    *,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Means, intervals and paired differences of all models, over all users and by slice.

    Args:
        ranks: By model, one for each seed; `qbrec` among them is compared with each other one.
        slices: bool [B] by name, `all` among them.
        resamples: Bootstrap resamples.
        seed: Of them.

    Returns:
        `models`, `paired`, `slices`, `seeds`, `coverage` as in the head of this module.
    """
    num_users = len(slices["all"])
    sums = UserSums(num_users, seed=seed)
    sizes, places = {}, {}
    for name, member in slices.items():
        sizes[name] = sums.add(member[:, None].astype(np.float64))
    by_seed: dict[str, dict[str, Any]] = {}
    for model, results in ranks.items():
        for mode in MODES:
            each = np.stack([metrics_of_ranks(result.of(mode)) for result in results])  # [S, B, metrics]
            values = each.mean(0)
            if len(results) > 1:
                by_seed.setdefault(model, {})[mode] = _spread(each.mean(1))
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
            by_slice[name]["models"].setdefault(model, {})[mode] = metric_cells(means[key], replicates[key])
            if MODEL in ranks and model != MODEL:
                ours = MODEL, mode
                cells = metric_cells(means[ours] - means[key], replicates[ours] - replicates[key])
                by_slice[name]["paired"].setdefault(model, {})[mode] = cells
    return {
        "models": by_slice["all"]["models"],
        "paired": by_slice["all"]["paired"],
        "slices": by_slice,
        "seeds": by_seed,
        "coverage": {
            model: float(np.mean([result.coverage for result in results])) for model, results in ranks.items()
        },
    }


def _spread(means: NDArray[np.float64]) -> dict[str, Any]:
    """Mean, standard deviation and values over the seeds, of means [S, metrics]."""
    return {
        metric: {
            "mean": float(means[:, i].mean()),
            "sd": float(means[:, i].std(ddof=1)),
            "values": means[:, i].tolist(),
        }
        for i, metric in enumerate(METRICS)
    }


def _keys(ranks: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(model, mode) for model in ranks for mode in MODES]


def metric_cells(means: NDArray[np.float64], replicates: NDArray[np.float64]) -> dict[str, Cell]:
    """A cell for every metric, from means [metrics] and their replicates [R, metrics]."""
    low, high = interval(replicates)
    return {
        metric: {"mean": float(means[i]), "low": float(low[i]), "high": float(high[i])}
        for i, metric in enumerate(METRICS)
    }
