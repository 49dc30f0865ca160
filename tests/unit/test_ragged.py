"""Ragged against plain Python lists."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qbrec.storage.ragged import Ragged

rows = st.lists(st.lists(st.integers(0, 99), max_size=6), min_size=1, max_size=8)


def _lists(ragged: Ragged) -> list[list[int]]:
    return [ragged.row(i).tolist() for i in range(len(ragged))]


@given(rows, st.integers(0, 7))
def test_last_and_prefix(lists: list[list[int]], n: int) -> None:
    ragged = Ragged.from_lists(lists)
    assert _lists(ragged.last(n)) == [row[max(len(row) - n, 0) :] for row in lists]
    assert _lists(ragged.prefix(np.full(len(lists), n))) == [row[:n] for row in lists]


@given(rows, st.data())
def test_take_and_slice(lists: list[list[int]], data: st.DataObject) -> None:
    ragged = Ragged.from_lists(lists)
    index = data.draw(st.lists(st.integers(0, len(lists) - 1), max_size=9))
    assert _lists(ragged.take(np.array(index, np.int64))) == [lists[i] for i in index]
    begin = data.draw(st.integers(0, len(lists)))
    end = data.draw(st.integers(begin, len(lists)))
    assert _lists(ragged.slice(begin, end)) == lists[begin:end]
    assert ragged.row_ids.tolist() == [i for i, row in enumerate(lists) for _ in row]


@given(rows, st.data())
def test_where_and_followed_by(lists: list[list[int]], data: st.DataObject) -> None:
    ragged = Ragged.from_lists(lists)
    mask = data.draw(st.lists(st.booleans(), min_size=len(ragged.values), max_size=len(ragged.values)))
    kept = ragged.where(np.array(mask, bool))
    marks = [mask[begin:end] for begin, end in pairwise(ragged.offsets)]
    pairs = zip(lists, marks, strict=True)
    assert _lists(kept) == [[v for v, there in zip(row, m, strict=True) if there] for row, m in pairs]
    assert _lists(ragged.followed_by(7)) == [[*row, 7] for row in lists]
    assert kept.offsets.dtype == ragged.followed_by(7).offsets.dtype == np.int64
