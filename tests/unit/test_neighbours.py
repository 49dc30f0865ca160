"""Content neighbours against brute force, and the stage from artifact to artifact."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from qbrec.engine.context import StageContext
from qbrec.neighbours import alike as module
from qbrec.neighbours.alike import alike
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
