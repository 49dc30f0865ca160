"""The sorted trie of semantic IDs against plain sorting."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qbrec.ranking import code_index, tie_rank
from qbrec.ranking.code_index import CodeIndex
from qbrec.ranking.kernels import native  # noqa: F401 - loaded, it serves small catalogues too


def catalogue(seed: int, *, levels: tuple[int, ...], items: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    codes = np.stack([rng.integers(0, k, items) for k in levels], 1).astype(np.int32)
    return codes, tie_rank(rng.integers(0, 4, items))


def assert_is_trie_of(index: CodeIndex, codes: np.ndarray, ties: np.ndarray, kept: np.ndarray) -> None:
    """Walk every prefix and compare with sorted tuples."""
    rows = sorted(kept.tolist(), key=lambda row: (*codes[row], ties[row]))
    assert index.trie.rows.tolist() == rows
    levels = codes.shape[1]
    below = {(): [0]}  # prefix -> its number
    for length in range(1, levels + 1):
        prefixes = sorted({tuple(codes[row, :length].tolist()) for row in rows})
        assert index.num_prefixes(length) == len(prefixes)
        assert index.last_codes(length).tolist() == [p[-1] for p in prefixes]
        starts = index.continuations(length - 1)
        number = {p: i for i, p in enumerate(prefixes)}
        for prefix, (n,) in below.items():
            mine = [number[p] for p in prefixes if p[:-1] == prefix]
            assert list(range(starts[n], starts[n + 1])) == mine
        below = {p: [i] for p, i in number.items()}
        assert index.used[length - 1].tolist() == sorted({p[-1] for p in prefixes})
    ends = index.continuations(levels)
    for prefix, (n,) in below.items():
        items = rows[ends[n] : ends[n + 1]]
        assert items
        assert all(tuple(codes[row].tolist()) == prefix for row in items)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from([(3,), (300,), (4, 3), (2, 2, 2), (5, 1, 400), (3, 3, 3, 3), (2, 2, 2, 2, 2, 2)]),
    st.sampled_from([1, 5, 60]),
    st.sampled_from([0.0, 0.1, 0.7, 1.0]),
)
def test_is_the_sorted_catalogue(seed: int, levels: tuple[int, ...], items: int, share: float) -> None:
    codes, ties = catalogue(seed, levels=levels, items=items)
    index = CodeIndex.build(codes, tie_rank=ties)
    assert_is_trie_of(index, codes, ties, np.arange(items))
    allowed = np.random.default_rng(seed).random(items) < share
    part = index.only(allowed)
    assert_is_trie_of(part, codes, ties, np.flatnonzero(allowed))
    assert part.num_ranked == allowed.sum()
    assert part.num_items == items
    # A filter of a filter allows what both allow.
    again = np.random.default_rng(seed + 1).random(items) < 0.5
    assert_is_trie_of(part.only(again), codes, ties, np.flatnonzero(allowed & again))


def test_filters_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    codes, ties = catalogue(3, levels=(6, 6, 6), items=300)
    index, allowed = CodeIndex.build(codes, tie_rank=ties), np.arange(300) % 3 == 0
    ours = index.only(allowed)
    monkeypatch.setattr(code_index, "native_kernels", lambda num_items: None)
    for a, b in zip(ours.trie, index.only(allowed).trie, strict=True):
        assert a.dtype == b.dtype
        assert a.tolist() == b.tolist()


def test_bytes_of_an_item() -> None:
    rng = np.random.default_rng(0)
    codes = np.unique((rng.random((300_000, 4)) ** 2 * 256).astype(np.uint8), axis=0)
    index = CodeIndex.build(codes, tie_rank=np.arange(len(codes)))
    assert index.nbytes / len(codes) < 14


def test_more_than_63_bits() -> None:
    codes, ties = catalogue(0, levels=(3, 2**17, 2, 2**20, 2**18, 2), items=400)
    codes[:, 1] %= 3  # large codes that share prefixes
    codes[0, 1] = 2**17 - 1
    index = CodeIndex.build(codes, tie_rank=ties)
    assert_is_trie_of(index, codes, ties, np.arange(400))
