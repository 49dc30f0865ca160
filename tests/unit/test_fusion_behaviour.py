from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from qbrec.fusion.behaviour import behaviour_vectors, cooccurrence, positive_pmi, training_histories
from qbrec.storage.blocks import BlockSet
from qbrec.storage.ragged import Ragged
from tests.support.fusion_catalog import make_catalog


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 7), max_size=8), max_size=6), st.integers(1, 4))
def test_cooccurrence_is_the_definition(histories: list[list[int]], window: int) -> None:
    expected = np.zeros((8, 8))
    for history in histories:
        for i, a in enumerate(history):
            for j, b in enumerate(history):
                if i != j and a != b and abs(i - j) <= window:
                    expected[a, b] += 1 / abs(i - j)
    got = cooccurrence(Ragged.from_lists(histories), num_items=8, window=window)
    np.testing.assert_allclose(got.toarray(), expected, rtol=1e-5, atol=1e-6)


def test_vectors_span_the_leading_singular_space() -> None:
    rng = np.random.default_rng(0)
    taste = rng.integers(0, 4, 200)
    lists = [(rng.integers(0, 15, 8) + 15 * t).tolist() for t in taste]
    histories = Ragged.from_lists(lists)
    vectors = behaviour_vectors(histories, num_items=64, dim=4, window=3, seed=1)
    matrix = positive_pmi(cooccurrence(histories, num_items=64, window=3)).toarray()
    left, singular, _ = np.linalg.svd(matrix)
    exact = left[:, :4] * np.sqrt(singular[:4])
    norm = np.maximum(np.linalg.norm(exact, axis=1, keepdims=True), 1e-30)
    exact = np.where(matrix.any(1, keepdims=True), exact / norm * 2, 0)
    np.testing.assert_allclose(vectors @ vectors.T, exact @ exact.T, atol=1e-3)
    assert not vectors[60:].any(), "items nobody consumed have no behaviour"
    same = vectors @ vectors.T / 4
    assert same[:15, :15].mean() > 0.9
    assert abs(same[:15, 15:60].mean()) < 0.2


def test_no_history_gives_zeros() -> None:
    empty = Ragged.from_lists([[], [3]])
    assert not behaviour_vectors(empty, num_items=9, dim=4, window=2, seed=0).any()


def test_more_dimensions_than_items_are_padded() -> None:
    vectors = behaviour_vectors(Ragged.from_lists([[0, 1, 2]]), num_items=3, dim=8, window=2, seed=0)
    assert vectors.shape == (3, 8)
    assert not vectors[:, 3:].any()


def test_validation_and_test_items_have_no_influence(tmp_path: Path) -> None:
    sets = [BlockSet.open(make_catalog(tmp_path, tail=tail), "histories") for tail in ("a", "b")]
    assert not np.array_equal(sets[0].column("user"), None)
    raw = [np.concatenate([s.view(block, "row") for block in range(s.num_blocks)]) for s in sets]
    assert (raw[0] != raw[1]).any(), "the two catalogues must differ in what comes after the cut"
    train = [training_histories(s, max_interactions=10**9, seed=3) for s in sets]
    np.testing.assert_array_equal(train[0].values, train[1].values)
    vectors = [behaviour_vectors(t, num_items=300, dim=8, window=5, seed=3) for t in train]
    np.testing.assert_array_equal(vectors[0], vectors[1])
    assert vectors[0].any()


def test_a_cap_takes_a_sample_of_whole_histories(tmp_path: Path) -> None:
    blocks = BlockSet.open(make_catalog(tmp_path), "histories")
    whole = training_histories(blocks, max_interactions=10**9, seed=0)
    some = training_histories(blocks, max_interactions=len(whole.values) // 2, seed=0)
    assert 0.3 < len(some) / len(whole) < 0.7
    have = {whole.row(i).tobytes() for i in range(len(whole))}
    assert all(some.row(i).tobytes() in have for i in range(len(some)))
