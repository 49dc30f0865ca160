"""Top-k and ranks over the sorted IDs against dense scores: the same rows, the same bits."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qbrec.errors import ConfigError, DataError
from qbrec.ranking import exact, rank_of, tie_rank, top_k
from qbrec.ranking.code_index import CodeIndex
from qbrec.ranking.exact import exact_top_k
from qbrec.ranking.kernels import native  # noqa: F401 - loaded, it serves small catalogues too
from qbrec.ranking.rank_of import exact_ranks
from qbrec.ranking.scorer import CodeTable
from qbrec.ranking.topk import ranks_both
from qbrec.storage.ragged import Ragged

LAYOUTS = ((5,), (40,), (7, 3), (4, 4, 4), (2, 30, 3), (4, 4, 4, 4), (300, 9, 300), (3, 2, 2, 2, 3))


class Case:
    """A random catalogue, and what is asked of it."""

    def __init__(self, seed: int, *, levels: tuple[int, ...], items: int, batch: int, values: str) -> None:
        rng = np.random.default_rng(seed)
        self.codes = np.stack([rng.zipf(1.3, items) % k for k in levels], 1).astype(np.uint16)
        self.ties = tie_rank(rng.integers(0, 5, items))
        table = rng.standard_normal((batch, len(levels), max(levels))).astype(np.float32) * 3
        if values == "ties":  # few distinct values: most scores tie
            table = table.round()
        elif values == "uneven":  # sums that depend on the order of additions
            table *= np.float32(10) ** rng.integers(-6, 7, table.shape).astype(np.float32)
        elif values == "impossible":
            table[rng.random(table.shape) < 0.4] = -np.inf
        for level, k in enumerate(levels):
            table[:, level, k:] = np.nan  # never to be read
        self.log_probs = torch.from_numpy(table)
        self.seen = Ragged.from_lists(
            [rng.integers(0, items, rng.integers(0, min(items, 20) + 1)).tolist() for _ in range(batch)]
        )
        self.allowed = rng.random(items) < rng.choice([0.0, 0.05, 0.4, 1.0])
        self.target = rng.integers(0, items, batch)
        data = rng.random((batch, items)).astype(np.float32) * 4
        self.bonus = sp.csr_matrix(np.where(rng.random((batch, items)) < 0.1, data, 0))
        self.index = CodeIndex.build(self.codes, tie_rank=self.ties)

    def dense(self, *, bonus: bool) -> torch.Tensor:
        scores = CodeTable(self.codes).scores_of(self.log_probs)
        if bonus:
            scores += torch.from_numpy(self.bonus.toarray())
        return scores


cases = st.builds(
    Case,
    st.integers(0, 2**31),
    levels=st.sampled_from(LAYOUTS),
    items=st.sampled_from([1, 2, 17, 200, 900]),
    batch=st.sampled_from([1, 2, 3, 9, 20]),
    values=st.sampled_from(["plain", "ties", "uneven", "impossible"]),
)


def assert_same(
    found: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]
) -> None:
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1].view(torch.int32), (expected[1] + 0.0).view(torch.int32))  # bits


@pytest.fixture(params=["kernels", "tensors"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With numba, and as if it were not installed."""
    if request.param == "tensors":
        for module in (exact, rank_of):
            monkeypatch.setattr(module, "native_kernels", lambda num_items: None)
    return str(request.param)


@settings(max_examples=120, deadline=None)
@given(cases, st.booleans(), st.booleans(), st.booleans(), st.integers(1, 30))
def test_top_k_equals_dense(case: Case, exclude: bool, filtered: bool, bonus: bool, k: int) -> None:
    k = min(k, len(case.codes))
    expected = top_k(
        case.dense(bonus=bonus),
        k,
        tie_rank=case.ties,
        exclude=case.seen if exclude else None,
        allowed=case.allowed if filtered else None,
    )
    options = {"exclude": case.seen if exclude else None, "bonus": case.bonus if bonus else None}
    index = case.index.only(case.allowed) if filtered else case.index
    assert_same(exact_top_k(case.log_probs, k, index=index, **options), expected)
    if filtered:
        assert_same(
            exact_top_k(case.log_probs, k, index=case.index, allowed=case.allowed, **options), expected
        )


@settings(max_examples=120, deadline=None)
@given(cases, st.booleans(), st.booleans(), st.booleans())
def test_ranks_equal_dense(case: Case, seen: bool, filtered: bool, bonus: bool) -> None:
    expected = ranks_both(
        case.dense(bonus=bonus),
        case.target,
        tie_rank=case.ties,
        seen=case.seen if seen else None,
        allowed=case.allowed if filtered else None,
    )
    found = exact_ranks(
        case.log_probs,
        case.target,
        index=case.index.only(case.allowed) if filtered else case.index,
        seen=case.seen if seen else None,
        bonus=case.bonus if bonus else None,
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize("limit", [-1.0, 2.0])  # all users together; each on his own
@pytest.mark.parametrize("levels", [(60, 60, 60), (16, 16, 16, 16), (8, 8, 8, 8, 8)])
@pytest.mark.parametrize("peak", [0.1, 3.0])  # flat and peaked distributions
def test_either_search_on_large_tries(
    monkeypatch: pytest.MonkeyPatch, limit: float, levels: tuple[int, ...], peak: float
) -> None:
    rng = np.random.default_rng(7)
    codes = np.stack([(rng.random(20_000) ** 2 * k).astype(int) for k in levels], 1).astype(np.uint8)
    ties = tie_rank(rng.integers(0, 9, len(codes)))
    log_probs = (
        torch.from_numpy(rng.standard_normal((11, len(levels), max(levels)))).float() * peak
    ).log_softmax(-1)
    seen = Ragged.from_lists([rng.integers(0, len(codes), 300).tolist() for _ in range(11)])
    for name in ("EXHAUSTIVE", "FLAT_ALONE"):
        monkeypatch.setattr(exact, name, limit)
    monkeypatch.setattr(exact, "SMALL", 0)
    monkeypatch.setattr(exact, "SMALL_ALONE", 0)
    monkeypatch.setattr(exact, "TINY", 0)
    index, dense = CodeIndex.build(codes, tie_rank=ties), CodeTable(codes).scores_of(log_probs)
    for k in (1, 20, 400):
        expected = top_k(dense, k, tie_rank=ties, exclude=seen)
        assert_same(exact_top_k(log_probs, k, index=index, exclude=seen), expected)
        alone = exact_top_k(log_probs[:1], k, index=index, exclude=seen.slice(0, 1))
        assert_same(alone, (expected[0][:1], expected[1][:1]))
    target = rng.integers(0, len(codes), 11)
    target[:3] = top_k(dense, 1, tie_rank=ties)[0][:3, 0]
    for ours, theirs in zip(
        exact_ranks(log_probs, target, index=index, seen=seen),
        ranks_both(dense, target, tie_rank=ties, seen=seen),
        strict=True,
    ):
        assert ours.tolist() == theirs.tolist()


def test_without_numba(either: str) -> None:
    for seed, levels in enumerate(LAYOUTS):
        case = Case(seed, levels=levels, items=300, batch=9, values="ties")
        index = case.index.only(case.allowed)
        expected = top_k(
            case.dense(bonus=True), 20, tie_rank=case.ties, exclude=case.seen, allowed=case.allowed
        )
        assert_same(
            exact_top_k(case.log_probs, 20, index=index, exclude=case.seen, bonus=case.bonus), expected
        )
        ranks = ranks_both(
            case.dense(bonus=True), case.target, tie_rank=case.ties, seen=case.seen, allowed=case.allowed
        )
        found = exact_ranks(case.log_probs, case.target, index=index, seen=case.seen, bonus=case.bonus)
        assert [r.tolist() for r in found] == [r.tolist() for r in ranks]


def test_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(5, levels=(16, 16, 16), items=900, batch=20, values="ties")
    monkeypatch.setattr(exact, "SMALL", 0)
    monkeypatch.setattr(exact, "USERS_PER_TASK", 3)
    threads, found = torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        found.append(
            (
                *exact_top_k(case.log_probs, 9, index=case.index, exclude=case.seen),
                *map(torch.from_numpy, exact_ranks(case.log_probs, case.target, index=case.index, seen=None)),
            )
        )
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_good_prefixes_spare_most_of_the_catalogue() -> None:
    """Peaked distributions are searched without looking at more than a small share of the prefixes."""
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 32, (50_000, 4)).astype(np.uint8)
    index = CodeIndex.build(codes, tie_rank=np.arange(len(codes)))
    log_probs = (torch.from_numpy(rng.standard_normal((8, 4, 32))).float() * 6).log_softmax(-1)
    tables = exact.Tables.of(log_probs, index)
    kernels = exact.native_kernels(10**9)
    assert kernels is not None
    shares = np.empty(8, np.float32)
    kernels.best_first(
        index.trie, tables.log_probs, tables.best, np.empty(0, np.int64), np.zeros(9, np.int64), 48, 2.0,
        np.empty((8, 20), np.float32), np.empty((8, 20), np.int64), np.empty(8, np.float32), shares,
    )  # fmt: skip
    assert np.median(shares) < 0.1


@pytest.mark.usefixtures("either")
def test_nobody_asks() -> None:
    case = Case(0, levels=(4, 4, 4), items=50, batch=2, values="plain")
    rows, scores = exact_top_k(case.log_probs[:0], 3, index=case.index)
    assert rows.shape == scores.shape == (0, 3)
    kept, removed = exact_ranks(case.log_probs[:0], case.target[:0], index=case.index, seen=None)
    assert len(kept) == len(removed) == 0


def test_what_is_refused(either: str) -> None:
    case = Case(0, levels=(4, 4, 4), items=50, batch=2, values="plain")
    for k in (0, 51):
        with pytest.raises(ConfigError, match="catalogue has 50 items"):
            exact_top_k(case.log_probs, k, index=case.index)
    with pytest.raises(DataError, match="do not fit"):
        exact_top_k(case.log_probs[:, :2], 1, index=case.index)
    with pytest.raises(DataError, match="do not fit"):
        exact_ranks(case.log_probs[:, :, : int(case.codes.max())], case.target, index=case.index, seen=None)
    bonus = case.bonus.copy()
    bonus.data[0] = -1
    with pytest.raises(DataError, match="negative"):
        exact_top_k(case.log_probs, 1, index=case.index, bonus=bonus)
    wrong = case.log_probs.clone()
    wrong[1, 1, int(case.codes[0, 1])] = torch.nan
    with pytest.raises(DataError, match="NaN"):
        exact_top_k(wrong, 3, index=case.index)
    with pytest.raises(DataError, match="NaN"):
        exact_ranks(wrong, case.target, index=case.index, seen=None)


def test_kernel_and_numpy_compare_shares_at_one_precision() -> None:
    # A share that is exactly the limit would be put off by one of them and left there by the other.
    assert float(np.float32(exact.EXHAUSTIVE)) == exact.EXHAUSTIVE
