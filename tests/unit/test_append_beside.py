"""Where new items take their place beside published IDs: digits, shared IDs, room that is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qbrec.config import RootConfig
from qbrec.errors import ConfigError
from qbrec.quantizer.append.beside import Taken, place_beside
from qbrec.quantizer.quantizer import Quantizer
from qbrec.quantizer.rvq import Codebooks
from tests.support.grown_shop import configuration

SIZES = (3, 2)
CODES = st.tuples(st.integers(0, 2), st.integers(0, 1))


def place(
    new: list[tuple[tuple[int, int], int]],
    taken: list[tuple[tuple[int, ...], int]],
    config: RootConfig,
    sizes: tuple[int, ...],
) -> Any:
    books = Codebooks((torch.zeros(3, 2), torch.tensor([[0.0, 0.0], [1.0, 0.0]])))
    quantizer = Quantizer(torch.zeros(2), torch.ones(2), books)
    raw = np.array([codes for codes, _ in new], np.uint8).reshape(-1, 2)
    return place_beside(
        raw,
        np.array([content for _, content in new], np.int64),
        taken=Taken(
            np.array([codes for codes, _ in taken], np.uint8).reshape(-1, len(sizes)),
            np.array([content for _, content in taken], np.int64),
        ),
        sizes=sizes,
        quantizer=quantizer,
        config=config.quantizer,
        residuals=lambda rows, codes: torch.zeros(len(rows), 2),
    )


@given(
    st.lists(st.tuples(CODES, st.integers(0, 5)), max_size=10), st.lists(st.tuples(CODES, st.integers(0, 7)))
)
@settings(max_examples=60)
def test_digits_count_on(
    new: list[tuple[tuple[int, int], int]], old: list[tuple[tuple[int, int], int]]
) -> None:
    """Against a dictionary: the catalogue's digits first, then those of new contents as they come."""
    digits: dict[tuple[int, int], dict[int, int]] = {}
    first: dict[int, tuple[int, ...]] = {}
    taken = []
    for codes, content in old:
        bucket = digits.setdefault(codes, {})
        final = (*codes, bucket.setdefault(content, len(bucket)))
        taken.append((final, content))
        first.setdefault(content, final)
    expected, own = [], {}
    for codes, content in new:
        codes = own.setdefault(content, codes)
        if content in first:
            expected.append(first[content])
            continue
        bucket = digits.setdefault(codes, {})
        expected.append((*codes, bucket.setdefault(content, len(bucket))))
    needed = max([1, *(final[2] + 1 for final in expected), *(final[2] + 1 for final, _ in taken)])
    config = configuration(Path("-"))
    placed = place(new, taken, config, (*SIZES, needed))
    assert [tuple(codes) for codes in placed.codes.tolist()] == expected
    assert placed.shared == sum(content in first for _, content in new)
    had = max([1, *(final[2] + 1 for final, _ in taken)])
    if needed > had:
        with pytest.raises(ConfigError, match="has no digit left"):
            place(new, taken, config, (*SIZES, had))


@given(
    st.lists(st.tuples(CODES, st.integers(0, 5)), max_size=10), st.lists(st.tuples(CODES, st.integers(0, 7)))
)
@settings(max_examples=40)
def test_ids_are_shared_where_nothing_is_resolved(
    new: list[tuple[tuple[int, int], int]], taken: list[tuple[tuple[int, ...], int]]
) -> None:
    placed = place(new, taken, configuration(Path("-")), SIZES)
    first: dict[int, tuple[int, ...]] = {}
    for codes, content in [*taken, *new]:
        first.setdefault(content, codes)
    assert [tuple(codes) for codes in placed.codes.tolist()] == [first[content] for _, content in new]
    assert (placed.moved, placed.unresolved) == (0, 0)


@pytest.mark.parametrize(("policy", "capacity"), [("next_nearest", 1), ("next_nearest", 2), ("sinkhorn", 1)])
@given(
    st.lists(st.tuples(CODES, st.integers(0, 5)), max_size=10), st.lists(st.tuples(CODES, st.integers(0, 7)))
)
@settings(max_examples=40)
def test_only_new_items_move(
    policy: str,
    capacity: int,
    new: list[tuple[tuple[int, int], int]],
    taken: list[tuple[tuple[int, ...], int]],
) -> None:
    """Room is what published contents leave; sinkhorn places appended items as next_nearest does."""
    placed = place(new, taken, configuration(Path("-"), collisions=policy, capacity=capacity), SIZES)
    contents: dict[tuple[int, ...], set[int]] = {}
    first: dict[int, tuple[int, ...]] = {}
    for codes, content in taken:
        contents.setdefault(codes, set()).add(content)
        first.setdefault(content, codes)
    before = {codes: len(found) for codes, found in contents.items()}
    own: dict[int, tuple[int, ...]] = {}
    final = [tuple(codes) for codes in placed.codes.tolist()]
    for (codes, content), found in zip(new, final, strict=True):
        raw = own.setdefault(content, codes)
        assert found == first.get(content, found)
        assert content in first or found[0] == raw[0]
        contents.setdefault(found, set()).add(content)
    for codes, found in contents.items():
        if len(found) > max(capacity, before.get(codes, 0)):
            # Above the capacity only where the whole prefix is full.
            assert all(len(contents.get((codes[0], last), ())) >= capacity for last in range(SIZES[1]))
            assert placed.unresolved > 0
    assert placed.shared == sum(content in first for _, content in new)
