"""Content neighbours against brute force, and the stage from artifact to artifact."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors

from qbrec.engine.context import StageContext
from qbrec.neighbours import alike as module
from qbrec.neighbours.alike import Queries, alike
from qbrec.neighbours.counting import share
from qbrec.storage.artifact import ArtifactStore


@pytest.fixture
def ctx(tmp_path: Path) -> StageContext:
    return StageContext.local(ArtifactStore(tmp_path), tmp_path / "run", stage="neighbours")


def vectors(num_items: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(num_items, 16)).astype(np.float32)


def test_neighbours_are_those_of_scikit_learn(ctx: StageContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 64)
    monkeypatch.setattr(module, "_MAX_SCORES", 64 * 100)  # several pieces of the table
    x = vectors(300)
    graph = alike(ctx, x, keep=7)
    distance, index = NearestNeighbors(n_neighbors=8, metric="cosine").fit(x).kneighbors(x)
    for item in range(300):
        row = graph[item]
        order = np.argsort(-row.data)
        np.testing.assert_array_equal(row.indices[order], index[item, 1:])
        np.testing.assert_allclose(row.data[order], (1 - distance[item, 1:]) ** 2, rtol=1e-4)


def test_items_without_the_view_and_opposites_are_like_nothing(ctx: StageContext) -> None:
    x = np.array([[1, 0], [1, 0.1], [-1, 0], [0, 0]], np.float16)
    graph = alike(ctx, x, keep=3).toarray()
    assert (graph > 0).tolist() == [
        [False, True, False, False],
        [True, *[False] * 3],
        [False] * 4,
        [False] * 4,
    ]


def test_equals_crowd_nobody_out(ctx: StageContext) -> None:
    graph = alike(ctx, np.ones((6, 4), np.float32), keep=2)
    assert np.diff(graph.indptr).tolist() == [2] * 6
    assert not graph.diagonal().any()


def test_large_catalogues_are_searched_cell_by_cell(
    ctx: StageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "EXACT_ITEMS", 50)
    x, cells = vectors(120), np.arange(120) % 3
    graph = alike(ctx, x, keep=4, cells=cells)
    rows, columns = graph.nonzero()
    assert (cells[rows] == cells[columns]).all()
    for cell in range(3):
        own = np.flatnonzero(cells == cell)
        alone = alike(ctx, x[own], keep=4)
        np.testing.assert_allclose(graph[own][:, own].toarray(), alone.toarray(), rtol=1e-5)


def test_any_number_of_ranks_finds_the_same(ctx: StageContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 32)
    x = vectors(200)
    whole = alike(ctx, x, keep=5)
    # Each rank alone, its gathering left out: together their rows are all rows.
    parts = []
    for rank in range(3):
        one = StageContext.local(ctx.store, ctx.run_dir)
        one.rank, one.world = rank, 3
        monkeypatch.setattr(one, "gather_bytes", lambda tensor: [tensor])
        parts.append(alike(one, x, keep=5))
    assert (sum(parts[1:], parts[0]) != whole).nnz == 0
    assert min(part.nnz for part in parts) > 0


@given(st.lists(st.integers(0, 50), min_size=1, max_size=40), st.integers(1, 9))
def test_ranks_share_occurrences_evenly(occurrences: list[int], world: int) -> None:
    shares = [share(np.array(occurrences), rank=rank, world=world) for rank in range(world)]
    assert [item for items in shares for item in items] == [*range(len(occurrences))]
    for items in shares:
        assert sum(occurrences[i] for i in items) <= sum(occurrences) / world + max(occurrences)


def nearest_by_hand(queries: np.ndarray, table: np.ndarray, keep: int) -> np.ndarray:
    """Squared cosines of the `keep` nearest rows of a table, dense."""
    table, queries = (
        x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (table, queries)
    )
    cosine = np.maximum(queries @ table.T, 0)
    for row in cosine:
        row[np.argsort(-row, kind="stable")[keep:]] = 0
    return cosine**2


@pytest.mark.parametrize("in_cells", [False, True])
def test_items_beside_the_table_find_theirs_in_it(
    ctx: StageContext, monkeypatch: pytest.MonkeyPatch, in_cells: bool
) -> None:
    monkeypatch.setattr(module, "CHUNK", 16)
    monkeypatch.setattr(module, "_MAX_SCORES", 16 * 30)
    monkeypatch.setattr(module, "EXACT_ITEMS", 50 if in_cells else 200)
    table, asked = vectors(120), vectors(70, seed=1)
    asked[3], asked[4] = 0, table[7]  # without the view; equal to one of the table, which is no reason to go
    cells, of_asked = np.arange(120) % 3, np.arange(70) % 4  # a cell without items
    found = alike(ctx, table, keep=5, cells=cells, queries=Queries(asked, of_asked)).toarray()
    expected = np.zeros((70, 120))
    for cell in range(4 if in_cells else 1):
        rows, columns = (np.flatnonzero((of == cell) | (not in_cells)) for of in (of_asked, cells))
        expected[np.ix_(rows, columns)] = nearest_by_hand(asked[rows], table[columns], 5)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert not found[3].any()
    assert in_cells or found[4, 7] == pytest.approx(1)
    assert in_cells == (not found[of_asked == 3].any())


def test_nobody_beside_the_table_asks(ctx: StageContext, monkeypatch: pytest.MonkeyPatch) -> None:
    none = Queries(np.zeros((0, 16), np.float32), np.zeros(0, np.int64))
    for most in (50, 200):
        monkeypatch.setattr(module, "EXACT_ITEMS", most)
        assert alike(ctx, vectors(120), keep=5, cells=np.arange(120) % 3, queries=none).shape == (0, 120)
