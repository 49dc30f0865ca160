"""Exact top-k and target ranks against brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qbrec.errors import ConfigError, DataError
from qbrec.ranking import target_ranks, tie_rank, top_k
from qbrec.ranking.topk import ranks_both
from qbrec.storage.ragged import Ragged


def brute_order(scores: np.ndarray, ties: np.ndarray, gone: set[int]) -> list[int]:
    """All items that compete, best first, by plain sorting."""
    return [int(i) for i in np.lexsort((ties, -scores)) if int(i) not in gone]


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, Ragged, np.ndarray, np.ndarray]:
    batch, items = draw(st.integers(1, 4)), draw(st.integers(1, 30))
    seed = draw(st.integers(0, 2**31))
    rng = np.random.default_rng(seed)
    # Few distinct values: most scores tie. -inf is a score like any other.
    palette = np.array([-np.inf, -2.0, -1.0, 0.0, 0.5, 3.0], np.float32)[: draw(st.integers(1, 6))]
    scores = rng.choice(palette, (batch, items)).astype(np.float32)
    counts = rng.integers(0, 4, items)
    seen = Ragged.from_lists(
        [rng.integers(0, items, rng.integers(0, items + 2)).tolist() for _ in range(batch)]
    )
    allowed = rng.random(items) < draw(st.sampled_from([0.3, 0.8, 1.0]))
    return scores, counts, seen, allowed, rng.integers(0, items, batch)


@settings(max_examples=150, deadline=None)
@given(cases(), st.booleans(), st.booleans(), st.integers(0, 29))
def test_agrees_with_plain_sorting(case, exclude: bool, filtered: bool, k: int) -> None:
    scores, counts, seen, allowed, target = case
    batch, items = scores.shape
    k = k % items + 1
    ties = tie_rank(counts)
    options = {
        "tie_rank": ties,
        "exclude": seen if exclude else None,
        "allowed": allowed if filtered else None,
    }
    rows, values = top_k(torch.from_numpy(scores), k, **options)
    ranks = target_ranks(torch.from_numpy(scores), target, **options)
    for b in range(batch):
        gone = set(seen.row(b).tolist()) if exclude else set()
        if filtered:
            gone |= set(np.flatnonzero(~allowed).tolist())
        order = brute_order(scores[b], ties, gone)
        expected = order[:k] + [-1] * (k - len(order[:k]))
        assert rows[b].tolist() == expected
        assert values[b].tolist() == [scores[b, i] if i >= 0 else -np.inf for i in expected]
        t = int(target[b])
        assert ranks[b] == (order.index(t) + 1 if t in order else items + 1)


@settings(max_examples=50, deadline=None)
@given(cases())
def test_both_ranks_at_once(case) -> None:
    scores, counts, seen, allowed, target = case
    ties = tie_rank(counts)
    table = torch.from_numpy(scores)
    kept, removed = ranks_both(table, target, tie_rank=ties, seen=seen, allowed=allowed)
    assert (kept == target_ranks(table, target, tie_rank=ties, allowed=allowed)).all()
    assert (removed == target_ranks(table, target, tie_rank=ties, exclude=seen, allowed=allowed)).all()


def test_ties_go_to_the_more_popular_then_the_lower_row() -> None:
    assert tie_rank(np.array([1, 5, 0, 5])).tolist() == [2, 0, 3, 1]
    rows, _ = top_k(torch.zeros(1, 4), 4, tie_rank=tie_rank(np.array([1, 5, 0, 5])))
    assert rows.tolist() == [[1, 3, 0, 2]]


def test_scores_are_left_alone() -> None:
    scores = torch.randn(3, 20)
    before = scores.clone()
    seen = Ragged.from_lists([[1, 1, 2], [], [19]])
    top_k(scores, 5, tie_rank=np.arange(20), exclude=seen, allowed=np.arange(20) > 3)
    target_ranks(scores, np.array([4, 5, 6]), tie_rank=np.arange(20), exclude=seen)
    assert torch.equal(scores, before)


@pytest.mark.parametrize("k", [0, 6])
def test_k_outside_the_catalogue(k: int) -> None:
    with pytest.raises(ConfigError, match="catalogue has 5 items"):
        top_k(torch.zeros(1, 5), k, tie_rank=np.arange(5))


@pytest.mark.parametrize("place", [0, 3])
def test_nan_is_refused_not_ranked(place: int) -> None:
    scores = torch.arange(8.0).repeat(2, 1)
    scores[1, place] = torch.nan
    with pytest.raises(DataError, match="NaN"):
        top_k(scores, 2, tie_rank=np.arange(8))
    with pytest.raises(DataError, match="NaN"):
        target_ranks(scores, np.array([3, 3]), tie_rank=np.arange(8))


def test_device_counting_agrees_with_the_cpu_one() -> None:
    from qbrec.ranking.topk import _count_numpy, _count_torch

    scores = torch.randint(0, 4, (5, 40)).float()
    mine = scores[:, :1].clone()
    mask = torch.rand(40) < 0.5
    for allowed in (None, mask):
        for a, b in zip(
            _count_numpy(scores, mine, allowed), _count_torch(scores, mine, allowed), strict=True
        ):
            assert (a == b).all()
