"""Item graphs and their paths against plain Python."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.sparse as sp

from qbrec.ranking import graphs as graphs_module
from qbrec.ranking.cooccurrence import FOLLOWS, NEXT, TOGETHER, Counting, co_occurrence, recency
from qbrec.ranking.graphs import ItemGraphs, steps, strongest
from qbrec.storage.ragged import Ragged

NUM_ITEMS = 12


def draw(seed: int, users: int = 30) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, NUM_ITEMS, rng.integers(1, 15)).tolist() for _ in range(users)]


def brute_co(histories: list[list[int]], counting: Counting) -> np.ndarray:
    co = np.zeros((NUM_ITEMS, NUM_ITEMS))
    for row in histories:
        for a in range(len(row)):
            for b in range(a + 1, min(a + counting.window + 1, len(row))):
                if row[a] != row[b]:
                    weight = 1 / ((b - a) * math.log(2 + len(row))) if counting.discounted else 1.0
                    co[row[a], row[b]] += weight
                    co[row[b], row[a]] += weight * counting.backward
    return co


def cut(matrix: np.ndarray, keep: int) -> np.ndarray:
    matrix = matrix.copy()
    for row in matrix:
        row[np.argsort(-row, kind="stable")[keep:]] = 0
    return matrix


def shares(matrix: np.ndarray) -> np.ndarray:
    sums = matrix.sum(1, keepdims=True)
    return np.divide(matrix, sums, out=np.zeros_like(matrix), where=sums > 0)


def brute_recency(queries: list[list[int]], decay: float) -> np.ndarray:
    out = np.zeros((len(queries), NUM_ITEMS))
    for b, query in enumerate(queries):
        for age, item in enumerate(reversed(query[-20:])):
            out[b, item] += decay**age
    return out


def view(seed: int) -> sp.csr_matrix:
    dense = np.random.default_rng(seed).random((NUM_ITEMS, NUM_ITEMS), np.float32)
    np.fill_diagonal(dense, 0)
    return sp.csr_matrix(np.where(dense > 0.7, dense, 0))


def test_what_a_pair_counts() -> None:
    histories = draw(0)
    for counting in (FOLLOWS, NEXT, TOGETHER):
        counted = co_occurrence(Ragged.from_lists(histories), num_items=NUM_ITEMS, counting=counting)
        np.testing.assert_allclose(counted.toarray(), brute_co(histories, counting), rtol=1e-5)
    assert co_occurrence(Ragged.from_lists([[3]]), num_items=NUM_ITEMS).nnz == 0


def test_every_path_equals_brute_force() -> None:
    histories, queries = draw(0), draw(1, users=9)
    counts = np.bincount(np.concatenate(histories), minlength=NUM_ITEMS) + 1.0
    for keep in (3, NUM_ITEMS):
        graphs = ItemGraphs.fit(
            Ragged.from_lists(histories), num_items=NUM_ITEMS, keep=keep, alike={"text": view(5)}
        )
        arrows = {}
        for name, counting, power in (
            ("follows", FOLLOWS, 0.1),
            ("next", NEXT, 0.1),
            ("together", TOGETHER, 0.5),
        ):
            whole = brute_co(histories, counting) / np.sqrt(counts)[:, None] / counts**power
            arrows[name] = cut(whole, keep)
        like, after = view(5).toarray(), shares(arrows["follows"])
        near, far, every = (brute_recency(queries, decay) for decay in (0.6, 0.8, 0.95))
        expected = {
            "follows": near @ arrows["follows"],
            "next": near @ arrows["next"],
            "together": every @ arrows["together"],
            "follows>follows": near @ after @ after,
            "text": far @ like,
            "follows>text": near @ after @ shares(like).T,
            "text>follows": near @ shares(like) @ after,
        }
        assert graphs.names == tuple(expected)
        for name, path in zip(graphs.names, graphs.paths(Ragged.from_lists(queries)), strict=True):
            np.testing.assert_allclose(path.toarray(), np.sqrt(expected[name]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sparse", [0, 10**6])
def test_products_for_few_histories_are_made_compact(sparse: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs_module, "_SPARSE", sparse)
    weights = recency(Ragged.from_lists([[3, 5, 3], [], [0]]), decay=0.5, num_items=NUM_ITEMS)
    got, expected = steps(weights, view(4)), weights @ view(4)
    assert got.shape == expected.shape
    np.testing.assert_array_equal(got.toarray(), expected.toarray())


def test_graphs_survive_the_disk_form() -> None:
    graphs = ItemGraphs.fit(
        Ragged.from_lists(draw(0)), num_items=NUM_ITEMS, keep=5, alike={"text": view(1), "fused": view(2)}
    )
    again, queries = ItemGraphs.from_arrays(graphs.arrays()), Ragged.from_lists(draw(3, users=4))
    assert again.names == graphs.names
    for ours, theirs in zip(again.paths(queries), graphs.paths(queries), strict=True):
        assert (ours != theirs).nnz == 0


def test_an_empty_history_and_an_unknown_follower_lead_nowhere() -> None:
    graphs = ItemGraphs.fit(Ragged.from_lists([[0, 1], [2]]), num_items=NUM_ITEMS, keep=5)
    assert all(path.nnz == 0 for path in graphs.paths(Ragged.from_lists([[], [2]])))


def test_rows_appended_later_keep_their_place_and_lead_nowhere() -> None:
    weights = recency(Ragged.from_lists([[1, NUM_ITEMS + 3]]), decay=0.5, num_items=NUM_ITEMS)
    assert weights.nnz == 1
    assert weights[0, 1] == 0.5


def test_the_strongest_of_equals_have_the_lower_columns() -> None:
    matrix = sp.csr_matrix(np.array([[1, 2, 2, 2, 0], [0, 0, 0, 0, 3]], np.float32))
    np.testing.assert_array_equal(strongest(matrix, 2).toarray(), [[0, 2, 2, 0, 0], [0, 0, 0, 0, 3]])
