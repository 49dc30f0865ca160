"""Popularity and ItemKNN against the formula written as loops."""

from __future__ import annotations

import math
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from qbrec.baselines import ItemKNN, Popularity, itemknn
from qbrec.baselines.sparse import SparseRace
from qbrec.evaluation.protocol import TestSet, rank_model
from qbrec.ranking import cooccurrence, target_ranks, tie_rank, validation_metrics
from qbrec.storage.ragged import Ragged

NUM_ITEMS = 40


def random_histories(num_users: int = 60, *, seed: int = 0) -> SimpleNamespace:
    """Users who walk along a ring of items, with noise, so that neighbours mean something."""
    rng = np.random.default_rng(seed)
    lists = []
    for _ in range(num_users):
        walk = (rng.integers(0, NUM_ITEMS) + np.cumsum(rng.integers(1, 4, rng.integers(3, 30)))) % NUM_ITEMS
        lists.append(walk.tolist())
    cut = np.array([(len(x) - 2, len(x) - 1) for x in lists], np.int32)
    return SimpleNamespace(
        rows=Ragged.from_lists(lists),
        cut=cut,
        domain=np.zeros(num_users, np.uint8),
        user=np.arange(num_users),
    )


def by_loops(training: list[list[int]], history: list[int], *, alpha: float, decay: float) -> np.ndarray:
    """The formula in the head of `baselines.itemknn`, one term at a time."""
    pop, co = np.zeros(NUM_ITEMS), np.zeros((NUM_ITEMS, NUM_ITEMS))
    for items in training:
        for i in items:
            pop[i] += 1
        for a in range(len(items)):
            for b in range(a + 1, min(a + 10, len(items) - 1) + 1):
                if items[a] != items[b]:
                    weight = 1 / ((b - a) * math.log(2 + len(items)))
                    co[items[a], items[b]] += weight
                    co[items[b], items[a]] += 0.5 * weight
    score = np.zeros(NUM_ITEMS)
    for age, i in enumerate(reversed(history[-20:])):
        for j in range(NUM_ITEMS):
            score[j] += decay**age * co[i, j] / ((pop[j] + 1) ** alpha * math.sqrt(pop[i] + 1))
    return score


@pytest.mark.parametrize("chunk", [17, 1 << 20])
def test_itemknn_is_the_formula(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cooccurrence, "CHUNK_PAIRS", 20 * chunk)
    data = random_histories(12)
    training = data.rows.prefix(data.cut[:, 0])
    fitted = ItemKNN.fit(training, num_items=NUM_ITEMS)
    model = ItemKNN(fitted.co, fitted.counts, alpha=0.3, decay=0.6)
    found = model.scores(data.rows, 0).numpy()
    lists = [training.row(i).tolist() for i in range(12)]
    filled = 0
    for u in range(12):
        expected = by_loops(lists, data.rows.row(u).tolist(), alpha=0.3, decay=0.6)
        near = expected > 0
        np.testing.assert_allclose(found[u, near], expected[near], rtol=1e-5)
        # the rest: below zero, in the order of popularity
        rest = np.flatnonzero(~near)
        filled += len(rest)
        assert (found[u, rest] < 0).all()
        order = tie_rank(fitted.counts)[rest]
        assert (rest[np.argsort(-found[u, rest])] == rest[np.argsort(order)]).all()
    assert filled > 0


def test_popularity() -> None:
    model = Popularity.fit(Ragged.from_lists([[1, 1, 2], [2, 1], []]), num_items=4)
    assert model.scores(Ragged.from_lists([[0], [1]]), 0).tolist() == [[0, 3, 2, 0]] * 2


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**31), st.booleans())
def test_sparse_ranks_equal_dense_ranks(seed: int, filtered: bool) -> None:
    rng = np.random.default_rng(seed)
    batch, items = int(rng.integers(1, 6)), int(rng.integers(2, 25))
    raw = sp.random(batch, items, density=0.4, format="csr", rng=rng, dtype=np.float32)
    raw.data = rng.integers(1, 4, raw.nnz).astype(np.float32)
    discount = rng.choice(np.array([0.5, 1.0], np.float32), items)
    counts = rng.integers(0, 3, items)
    ties = tie_rank(counts)
    seen = Ragged.from_lists([rng.integers(0, items, rng.integers(0, items)).tolist() for _ in range(batch)])
    allowed = rng.random(items) < 0.7 if filtered else None
    target = rng.integers(0, items, batch)
    dense = np.tile(-(ties + 1.0) / items, (batch, 1)).astype(np.float32)
    rows = np.repeat(np.arange(batch), np.diff(raw.indptr))
    dense[rows, raw.indices] = raw.data * discount[raw.indices]
    import torch

    expected = target_ranks(torch.from_numpy(dense), target, tie_rank=ties, exclude=seen, allowed=allowed)
    race = SparseRace(raw, target, places=ties, seen=seen, allowed=allowed)
    assert (race.ranks(discount) == expected).all()


def test_tuning_takes_the_best_on_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(itemknn, "CHUNK_USERS", 50)
    data = random_histories(300, seed=1)
    fitted = ItemKNN.fit(data.rows.prefix(data.cut[:, 0]), num_items=NUM_ITEMS)
    ties = tie_rank(fitted.counts)
    values = {
        (alpha, decay): validation_metrics(
            ItemKNN(fitted.co, fitted.counts, alpha=alpha, decay=decay), data, tie_rank=ties
        )["ndcg@10"]
        for alpha in itemknn.ALPHAS
        for decay in itemknn.DECAYS
    }
    done: list[int] = []
    tuned = fitted.tuned(data, on_batch=done.append)
    assert sum(done) == 300
    assert values[tuned.alpha, tuned.decay] == max(values.values())
    assert len(set(values.values())) > 1
    untuned = random_histories(3)
    untuned.cut[:] = untuned.rows.lengths[:, None]
    assert fitted.tuned(untuned) is fitted


REFERENCE = {  # HR@10, NDCG@10: seen removed, seen kept
    "instruments": (0.1391, 0.1123, 0.1306, 0.1011),
    "beauty": (0.0848, 0.0528, 0.0778, 0.0468),
    "scientific": (0.1129, 0.0833, 0.1065, 0.0742),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REFERENCE)
def test_itemknn_on_real_data(name: str) -> None:
    root = os.environ.get("QBREC_BENCH_DATA")
    if not root:
        pytest.skip("QBREC_BENCH_DATA is not set: no real data to measure on")
    import pyarrow.parquet as pq

    folder = Path(root) / name
    ids = np.unique(
        pq.read_table(folder / "items.parquet", columns=["item_id"])["item_id"].to_numpy().astype(str)
    )
    table = pq.read_table(folder / "interactions.parquet")
    users = np.unique(table["user_id"].to_numpy().astype(str), return_inverse=True)[1]
    order = np.lexsort((table["timestamp"].to_numpy(), users))
    rows = np.searchsorted(ids, table["item_id"].to_numpy().astype(str))[order]
    lengths = np.bincount(users)
    data = SimpleNamespace(
        rows=Ragged.from_lengths(rows, lengths),
        cut=np.stack([lengths - 2, lengths - 1], axis=1),
        domain=np.zeros(len(lengths), np.uint8),
    )
    model = ItemKNN.fit(data.rows.prefix(data.cut[:, 0]), num_items=len(ids)).tuned(data)
    test = TestSet.build(data, allowed=np.ones(len(ids), bool), train_counts=model.counts)
    ranks = rank_model(model, test, batch_users=256)
    found = []
    for values in (ranks.removed, ranks.kept):
        hit = values <= 10
        found += [hit.mean(), (hit / np.log2(values + 1)).mean()]
    assert found == pytest.approx(REFERENCE[name], abs=1e-4)
