"""Item graphs and their paths against plain Python."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.sparse as sp

from qbrec.ranking import cooccurrence
from qbrec.ranking import graphs as graphs_module
from qbrec.ranking.cooccurrence import FOLLOWS, NEXT, TOGETHER, Counting, co_occurrence, recency
from qbrec.ranking.counted import COUNTED, count_arrows, strongest
from qbrec.ranking.graphs import ItemGraphs, steps
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


def made(histories: list[list[int]], keep: int, **alike: sp.csr_matrix) -> ItemGraphs:
    counted = count_arrows(Ragged.from_lists(histories), num_items=NUM_ITEMS, keep=keep)
    return ItemGraphs(**counted, alike=alike)


def cut(matrix: np.ndarray, keep: int) -> np.ndarray:
    matrix = matrix.copy()
    for row in matrix:
        row[np.argsort(-row, kind="stable")[keep:]] = 0
    return matrix


def shares(matrix: np.ndarray) -> np.ndarray:
    sums = matrix.sum(1, keepdims=True)
    return np.divide(matrix, sums, out=np.zeros_like(matrix), where=sums > 0)


def brute_recency(queries: list[list[int]], decay: float, num_items: int) -> np.ndarray:
    out = np.zeros((len(queries), num_items))
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


@pytest.mark.parametrize("pairs", [200, 1 << 25])
def test_what_surrounds_an_item_is_the_same_whoever_counts_it(
    pairs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, also where an item has more pairs than are counted at once."""
    monkeypatch.setattr(cooccurrence, "CHUNK_PAIRS", pairs)
    histories = [*draw(4), [], [3] * 9, [0, 1]]
    done: list[int] = []

    def counted(keep: int, *cuts: int) -> dict[str, sp.csr_matrix]:
        parts = [
            count_arrows(
                Ragged.from_lists(histories),
                num_items=NUM_ITEMS,
                keep=keep,
                items=range(*ends),
                on_items=done.append,
            )
            for ends in itertools.pairwise([0, *cuts, NUM_ITEMS])
        ]
        return {name: sp.vstack([part[name] for part in parts], "csr") for name in COUNTED}

    for name, graph in counted(NUM_ITEMS).items():
        expected = brute_arrows(histories, NUM_ITEMS)[name]
        np.testing.assert_allclose(graph.toarray(), expected, rtol=1e-5)
    assert sum(done) == len(COUNTED) * NUM_ITEMS
    for keep in (4, NUM_ITEMS):
        whole, shared = counted(keep), counted(keep, 5, 5, 6)
        for name in COUNTED:
            for part in ("indptr", "indices", "data"):
                np.testing.assert_array_equal(getattr(shared[name], part), getattr(whole[name], part))


def brute_arrows(histories: list[list[int]], keep: int) -> dict[str, np.ndarray]:
    counts = np.bincount([item for row in histories for item in row], minlength=NUM_ITEMS) + 1.0
    found = {}
    for name, counting, power in (
        ("follows", FOLLOWS, 0.1),
        ("next", NEXT, 0.1),
        ("together", TOGETHER, 0.5),
    ):
        whole = brute_co(histories, counting) / np.sqrt(counts)[:, None] / counts**power
        found[name] = cut(whole, keep)
    return found


def brute_paths(
    queries: list[list[int]], arrows: dict[str, np.ndarray], like: np.ndarray, direct: np.ndarray
) -> dict[str, np.ndarray]:
    """Strengths before the root; `direct` are the arrows of the single step by content."""
    after, size = shares(arrows["follows"]), len(like)
    near, far, every = (brute_recency(queries, decay, size) for decay in (0.6, 0.8, 0.95))
    return {
        "follows": near @ arrows["follows"],
        "next": near @ arrows["next"],
        "together": every @ arrows["together"],
        "follows>follows": near @ after @ after,
        "text": far @ direct,
        "follows>text": near @ after @ shares(like).T,
        "text>follows": near @ shares(like) @ after,
    }


def test_every_path_equals_brute_force() -> None:
    histories, queries = draw(0), draw(1, users=9)
    for keep in (3, NUM_ITEMS):
        graphs = made(histories, keep, text=view(5))
        like = view(5).toarray()
        expected = brute_paths(queries, brute_arrows(histories, keep), like, like)
        assert graphs.names == tuple(expected)
        for name, path in zip(graphs.names, graphs.paths(Ragged.from_lists(queries)), strict=True):
            np.testing.assert_allclose(path.toarray(), np.sqrt(expected[name]), rtol=1e-4, atol=1e-6)


def lists_of(dense: np.ndarray, keep: int) -> sp.csr_matrix:
    return sp.csr_matrix(cut(np.where(dense > 0.4, dense, 0), keep).astype(np.float32))


def test_grown_graphs_equal_brute_force_on_the_grown_matrices() -> None:
    added, keep, rng = 6, 3, np.random.default_rng(8)
    histories, (old, new) = draw(0), (rng.random((n, NUM_ITEMS)) for n in (NUM_ITEMS, added))
    np.fill_diagonal(old, 0)
    old[5] = 0  # like nothing: it has room for anything
    new[2] = 0
    old, new = lists_of(old, keep), lists_of(new * 0.9, keep)
    graphs = made(histories, NUM_ITEMS, text=old)
    grown = graphs.grown({"text": new})
    assert grown.num_items == NUM_ITEMS + added
    assert grown.names == graphs.names

    size = NUM_ITEMS + added
    like = np.zeros((size, size))
    like[:NUM_ITEMS, :NUM_ITEMS], like[NUM_ITEMS:, :NUM_ITEMS] = old.toarray(), new.toarray()
    direct = like.copy()
    for item in range(NUM_ITEMS):
        own = [w for w in like[item] if w > 0]
        for later in range(NUM_ITEMS, size):
            if like[later, item] > 0 and (len(own) < keep or like[later, item] >= min(own)):
                direct[item, later] = like[later, item]
    assert 0 < (direct > like).sum() < new.nnz
    arrows = brute_arrows(histories, NUM_ITEMS)
    arrows = {name: np.pad(matrix, (0, added)) for name, matrix in arrows.items()}
    queries = [[n % size for n in rng.integers(0, size, rng.integers(1, 9))] for _ in range(12)]
    expected = brute_paths(queries, arrows, like, direct)
    paths = dict(zip(grown.names, grown.paths(Ragged.from_lists(queries)), strict=True))
    for name, path in paths.items():
        np.testing.assert_allclose(path.toarray(), np.sqrt(expected[name]), rtol=1e-4, atol=1e-6)
    reached = {name for name, path in paths.items() if path[:, NUM_ITEMS:].nnz}
    assert reached == {"text", "follows>text"}

    # Whoever has no appended item in the history sees the old items as before, to the bit.
    queries = [[int(n) for n in rng.integers(0, NUM_ITEMS, 6)] for _ in range(12)]
    pairs = zip(*(g.paths(Ragged.from_lists(queries)) for g in (graphs, grown)), strict=True)
    for before, after in pairs:
        assert (before != after[:, :NUM_ITEMS]).nnz == 0


def test_graphs_grow_by_generations_without_new_items_too() -> None:
    graphs = made(draw(0), 5, text=view(5), fused=view(6))
    none = sp.csr_matrix((0, NUM_ITEMS), dtype=np.float32)
    queries = Ragged.from_lists(draw(3, users=4))
    for ours, theirs in zip(
        graphs.grown({"text": none, "fused": none}).paths(queries), graphs.paths(queries), strict=True
    ):
        assert (ours != theirs).nnz == 0


@pytest.mark.parametrize("sparse", [0, 10**6])
def test_products_for_few_histories_are_made_compact(sparse: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs_module, "_SPARSE", sparse)
    weights = recency(Ragged.from_lists([[3, 5, 3], [], [0]]), decay=0.5, num_items=NUM_ITEMS)
    got, expected = steps(weights, view(4)), weights @ view(4)
    assert got.shape == expected.shape
    np.testing.assert_array_equal(got.toarray(), expected.toarray())


def test_graphs_survive_the_disk_form() -> None:
    graphs = made(draw(0), 5, text=view(1), fused=view(2))
    again, queries = ItemGraphs.from_arrays(graphs.arrays()), Ragged.from_lists(draw(3, users=4))
    assert again.names == graphs.names
    for ours, theirs in zip(again.paths(queries), graphs.paths(queries), strict=True):
        assert (ours != theirs).nnz == 0


def test_an_empty_history_and_an_unknown_follower_lead_nowhere() -> None:
    graphs = made([[0, 1], [2]], 5)
    assert all(path.nnz == 0 for path in graphs.paths(Ragged.from_lists([[], [2]])))


def test_rows_appended_later_keep_their_place_and_lead_nowhere() -> None:
    weights = recency(Ragged.from_lists([[1, NUM_ITEMS + 3]]), decay=0.5, num_items=NUM_ITEMS)
    assert weights.nnz == 1
    assert weights[0, 1] == 0.5


def test_the_strongest_of_equals_have_the_lower_columns() -> None:
    matrix = sp.csr_matrix(np.array([[1, 2, 2, 2, 0], [0, 0, 0, 0, 3]], np.float32))
    np.testing.assert_array_equal(strongest(matrix, 2).toarray(), [[0, 2, 2, 0, 0], [0, 0, 0, 0, 3]])
