"""Protocol, slices, intervals, table: by hand and against scipy."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from qbrec.errors import DataError
from qbrec.evaluation.bootstrap import UserSums, interval
from qbrec.evaluation.protocol import ModelRanks, TestSet, rank_model
from qbrec.evaluation.results import MODES, summarise
from qbrec.evaluation.slices import test_slices as slices_of
from qbrec.evaluation.table import format_table
from qbrec.ranking import METRICS, metrics_of_ranks
from qbrec.storage.ragged import Ragged


def histories_of(lists: list[list[int]]) -> SimpleNamespace:
    lengths = np.array([len(x) for x in lists])
    return SimpleNamespace(
        rows=Ragged.from_lists(lists),
        cut=np.stack([lengths - 2, lengths - 1], axis=1).astype(np.int32),
        domain=np.zeros(len(lists), np.uint8),
        user=np.arange(len(lists)),
    )


class Fixed:
    """The same scores for everybody."""

    name = "fixed"

    def __init__(self, scores: list[float]) -> None:
        self.row = torch.tensor(scores)

    def scores(self, histories: Ragged, domain: object) -> torch.Tensor:
        return self.row.repeat(len(histories), 1)


def test_ranks_by_hand() -> None:
    histories = histories_of([[0, 1, 2], [5, 4, 3], [3, 2, 1]])
    allowed = np.array([True, True, True, True, True, False])
    test = TestSet.build(histories, allowed=allowed, train_counts=np.zeros(6, np.int64))
    assert test.targets.tolist() == [2, 3, 1]
    found = rank_model(Fixed([6.0, 5, 4, 3, 2, 9]), test, batch_users=2)
    assert found.kept.tolist() == [3, 4, 2]
    assert found.removed.tolist() == [1, 4, 2]
    assert found.coverage == 1.0  # five candidates, lists of six
    assert (found.of("kept") == found.kept).all()


def test_coverage_counts_items_in_anybodys_list() -> None:
    lists = [[40, 41, 42], [40, 0, 43]]
    test = TestSet.build(histories_of(lists), allowed=np.ones(50, bool), train_counts=np.zeros(50, np.int64))
    found = rank_model(Fixed(list(range(50, 0, -1))), test, batch_users=1)
    assert found.coverage == 11 / 50  # 0…9 for the first, 1…10 for the second, who has seen 0


def test_draws_users_and_refuses_nobody() -> None:
    histories = histories_of([[0, 1, 2]] * 30)
    options = {"allowed": np.ones(3, bool), "train_counts": np.zeros(3, np.int64)}
    some = TestSet.build(histories, **options, max_users=7, seed=1)
    assert len(some) == 7
    assert (some.users == TestSet.build(histories, **options, max_users=7, seed=1).users).all()
    assert (some.users != TestSet.build(histories, **options, max_users=7, seed=2).users).any()
    histories.cut[:] = 3
    with pytest.raises(DataError, match="no user has a test interaction"):
        TestSet.build(histories, **options)


def test_slices_by_hand() -> None:
    counts = np.array([9, 8, 0, 3, 2, 1, 1, 1, 1, 1])
    groups = np.array([0, 1, 2, 3, 3, 5, 6, 7, 8, 9])  # 3 and 4 are near-duplicates
    lists = [[0, 4, 3], [0, 1, 2], [5, 6, 7, 8, 9, 4, 1], [4, 5, 0]]
    test = TestSet.build(histories_of(lists), allowed=np.ones(10, bool), train_counts=counts)
    slices = slices_of(test, train_counts=counts, near_duplicate_group=groups)
    found = {k: v.tolist() for k, v in slices.items()}
    assert found == {
        "all": [True] * 4,
        "non_duplicate": [False, True, True, True],
        "cold": [False, True, False, False],
        "head": [False, False, True, True],
        "tail": [True, True, False, False],
        "short": [True, True, False, True],
        "long": [False, False, True, False],
    }


def test_bootstrap_matches_scipy_and_theory() -> None:
    from scipy.stats import bootstrap

    values = np.random.default_rng(0).random((400, 2)) ** 2
    sums = UserSums(400, seed=0)
    place = sums.add(values)
    assert sums.totals() == pytest.approx(values.sum(0))
    replicates = sums.resampled(resamples=4000, seed=1)[:, place] / 400
    low, high = interval(replicates)
    rival = bootstrap(
        (values[:, 0],), np.mean, n_resamples=4000, method="percentile", rng=2
    ).confidence_interval
    width = rival.high - rival.low
    assert low[0] == pytest.approx(rival.low, abs=0.05 * width)
    assert high[0] == pytest.approx(rival.high, abs=0.05 * width)
    # the draws are shared: the difference of two columns has the variance of the paired difference
    difference = replicates[:, 0] - replicates[:, 1]
    assert difference.std() == pytest.approx((values[:, 0] - values[:, 1]).std() / 20, rel=0.05)
    again = UserSums(400, seed=0)
    again.add(values)
    assert (again.resampled(resamples=4000, seed=1) / 400 == replicates).all()


def test_groups_of_users_have_the_same_interval() -> None:
    values = np.random.default_rng(0).random((20_000, 1))
    spread = []
    for units in (20_000, 1_000):
        sums = UserSums(20_000, seed=5, max_units=units)
        sums.add(values)
        assert sums.totals() == pytest.approx(values.sum(0))
        spread.append((sums.resampled(resamples=1500, seed=1) / 20_000).std())
    assert spread[1] == pytest.approx(spread[0], rel=0.1)


def example(num_users: int = 300) -> tuple[dict[str, list[ModelRanks]], dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    rival = rng.integers(1, 60, num_users)
    ours = np.maximum(rival - rng.integers(-1, 5, num_users), 1)
    ranks = {"qbrec": [ModelRanks(ours + 1, ours, 0.5)], "itemknn": [ModelRanks(rival + 1, rival, 0.25)]}
    slices = {
        "all": np.ones(num_users, bool),
        "non_duplicate": rng.random(num_users) < 0.9,
        "cold": np.zeros(num_users, bool),
        "tail": np.arange(num_users) == 7,
    }
    return ranks, slices


def test_summary_means_are_exact_and_intervals_hold_them() -> None:
    ranks, slices = example()
    found = summarise(ranks, slices, resamples=500, seed=0)
    assert found["slices"]["cold"] == {"num_users": 0, "models": {}, "paired": {}}
    assert found["models"] == found["slices"]["all"]["models"]
    for name in ("all", "non_duplicate", "tail"):
        member = slices[name]
        part = found["slices"][name]
        assert part["num_users"] == member.sum()
        for mode in MODES:
            ours = metrics_of_ranks(ranks["qbrec"][0].of(mode))[member]
            rival = metrics_of_ranks(ranks["itemknn"][0].of(mode))[member]
            for i, metric in enumerate(METRICS):
                cell = part["models"]["qbrec"][mode][metric]
                assert cell["mean"] == pytest.approx(ours[:, i].mean())
                assert cell["low"] <= cell["mean"] + 1e-6
                assert cell["high"] >= cell["mean"] - 1e-6
                paired = part["paired"]["itemknn"][mode][metric]
                assert paired["mean"] == pytest.approx((ours - rival)[:, i].mean())
    cells = found["models"], found["paired"]
    wide = cells[0]["qbrec"]["removed"]["ndcg@10"]
    narrow = cells[1]["itemknn"]["removed"]["ndcg@10"]
    assert narrow["high"] - narrow["low"] < wide["high"] - wide["low"]
    assert found["coverage"] == {"qbrec": 0.5, "itemknn": 0.25}
    json.dumps(found, allow_nan=False)


def test_metrics_of_users_are_averaged_over_seeds_first() -> None:
    ranks, slices = example()
    rng = np.random.default_rng(3)
    first = ranks["qbrec"][0]
    others = [
        ModelRanks(rng.permutation(first.kept), rng.permutation(first.removed), share) for share in (0.1, 0.9)
    ]
    found = summarise(ranks | {"qbrec": [first, *others]}, slices, resamples=500, seed=0)
    each = np.stack([metrics_of_ranks(one.removed) for one in (first, *others)])
    rival = metrics_of_ranks(ranks["itemknn"][0].removed)
    for i, metric in enumerate(METRICS):
        cell = found["models"]["qbrec"]["removed"][metric]
        assert cell["mean"] == pytest.approx(each[..., i].mean())
        spread = found["seeds"]["qbrec"]["removed"][metric]
        assert spread["values"] == pytest.approx(each[..., i].mean(1))
        assert spread["mean"] == pytest.approx(cell["mean"])
        assert spread["sd"] == pytest.approx(each[..., i].mean(1).std(ddof=1))
        paired = found["paired"]["itemknn"]["removed"][metric]
        assert paired["mean"] == pytest.approx((each.mean(0) - rival)[:, i].mean())
    # Averaged over seeds a user's metric varies less.
    width = [
        cells["models"]["qbrec"]["removed"]["ndcg@10"]
        for cells in (found, summarise(ranks, slices, resamples=500, seed=0))
    ]
    assert width[0]["high"] - width[0]["low"] < width[1]["high"] - width[1]["low"]
    assert set(found["seeds"]) == {"qbrec"}
    assert found["coverage"]["qbrec"] == pytest.approx(0.5)
    found["protocol"] = {"domain": "pets", "num_users": 300, "num_candidates": 6000, "duplicate_share": 0.1}
    assert "± 3 seeds" in format_table(found)


def test_table_fits_a_terminal() -> None:
    ranks, slices = example()
    metrics = summarise(ranks, slices, resamples=100, seed=0)
    metrics["protocol"] = {"domain": "pets", "num_users": 300, "num_candidates": 6000, "duplicate_share": 0.1}
    text = format_table(metrics)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 110
    value = metrics["models"]["qbrec"]["kept"]["ndcg@10"]["mean"]
    assert f"{value:.4f}".removeprefix("0") in text
    assert sum(line.startswith("qbrec") for line in lines) == 2
    for word in ("seen removed", "seen kept", "HR@10", "NDCG@5", "vs itemknn", "coverage@10", "non_dup"):
        assert word in text
    alone = summarise({"qbrec": ranks["qbrec"]}, slices, resamples=50, seed=0)
    alone["protocol"] = metrics["protocol"]
    assert "paired" not in format_table(alone)
    assert "10.0% of the users saw a near-duplicate of their target" in text
