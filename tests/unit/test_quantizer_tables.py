"""Packing, quality figures, labels: tables against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qbrec.errors import ConfigError
from qbrec.quantizer.ids import id_text, parse_prefix
from qbrec.quantizer.labels import describe, make_labels
from qbrec.quantizer.packing import (
    bucket_order,
    code_bits,
    code_dtype,
    dense_ranks,
    lex_order,
    pack,
    runs,
    sort_keys,
    unpack,
)
from qbrec.quantizer.quality import bucket_figures, cohesion, level_usage

sizes_of_ids = st.lists(st.integers(1, 70_000), min_size=1, max_size=6).filter(
    lambda sizes: sum((s - 1).bit_length() for s in sizes) <= 63
)


@given(sizes=sizes_of_ids, seed=st.integers(0, 2**32))
def test_packing_is_reversible_and_keeps_the_order(sizes: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes = np.stack([rng.integers(0, s, 40) for s in sizes], 1)
    codes[0] = np.array(sizes) - 1
    packed = pack(codes.astype(code_dtype(sizes)), sizes)
    assert (packed >= 0).all()
    assert np.array_equal(unpack(packed, sizes), codes)
    order = np.lexsort(codes.T[::-1])
    assert (np.diff(packed[order]) >= 0).all()
    depth = int(rng.integers(1, len(sizes) + 1))
    shift = sum(code_bits(sizes)[depth:])
    assert np.array_equal(pack(codes[:, :depth], sizes), packed >> shift)


def test_code_types_and_limits() -> None:
    assert [code_dtype([k]) for k in (2, 256, 257, 65_536, 65_537)] == [np.uint8] * 2 + [np.uint16] * 2 + [
        np.uint32
    ]
    assert code_bits([256, 256, 2048, 1]) == (8, 8, 11, 0)
    with pytest.raises(ConfigError, match="64 bits"):
        code_bits([256] * 8)


def test_bucket_order() -> None:
    packed, popularity = np.array([5, 1, 5, 1, 5]), np.array([2, 0, 9, 0, 9])
    assert bucket_order(packed, popularity).tolist() == [1, 3, 2, 4, 0]


@given(seed=st.integers(0, 2**32), count=st.integers(0, 300))
def test_sorts_equal_those_of_numpy(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    few, many = rng.integers(-4, 4, count), rng.integers(-(2**60), 2**60, count)
    values, places = sort_keys(few)
    assert np.array_equal(places, np.argsort(few, kind="stable"))
    assert np.array_equal(values, np.sort(few))
    assert np.array_equal(lex_order(many, few), np.lexsort((many, few)))
    numbers, different = dense_ranks(many)
    want, inverse = np.unique(many, return_inverse=True)
    assert different == len(want)
    assert np.array_equal(numbers, inverse)
    start, size = runs(values)
    assert np.array_equal(values[start], np.unique(few))
    assert np.array_equal(np.repeat(values[start], size), values)


def test_usage_and_bucket_figures() -> None:
    codes = np.array([[0, 0], [0, 0], [0, 1], [1, 0], [1, 0], [1, 0]])
    usage = level_usage(codes, (4, 2))
    assert usage[0] == {
        "codes": 4,
        "used": 2,
        "dead": 2,
        "perplexity": pytest.approx(2.0),
        "largest_share": 0.5,
    }
    figures = bucket_figures(codes, (4, 2), group=np.array([0, 0, 1, 2, 2, 3]))
    assert figures["unique_ids"] == 3
    assert figures["no_collision_rate"] == pytest.approx(1 / 6)
    assert figures["collision_rate"] == pytest.approx(3 / 6)  # rows 0 and 1 are duplicates, no collision
    assert figures["duplicate_rate"] == pytest.approx(4 / 6)
    assert figures["largest_bucket"] == 3
    sizes = [2, 1, 3]
    spread = sum(abs(a - b) for a, b in itertools.product(sizes, sizes)) / (2 * 3 * sum(sizes))
    assert figures["gini"] == pytest.approx(spread)


def test_cohesion_equals_all_pairs() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 3, (40, 2))
    vectors = (rng.normal(size=(40, 5)) + 3 * np.eye(5)[codes[:, 0]]).astype(np.float32)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    got = cohesion(vectors, codes, (3, 3), seed=0)
    for depth, figures in enumerate(got, start=1):
        pairs = [
            float(unit[i] @ unit[j])
            for i, j in itertools.combinations(range(40), 2)
            if (codes[i, :depth] == codes[j, :depth]).all()
        ]
        assert figures["pairs"] == len(pairs)
        assert figures["cohesion"] == pytest.approx(np.mean(pairs), abs=1e-5)
    assert got[0]["cohesion"] > got[0]["shuffled"] + 0.1


ART = [
    ("Acrylic Paint Set 24 Colors", ["Art", "Paint"]),
    ("Acrylic Paint Set for Kids", ["Art", "Paint"]),
    ("Acrylic Paint Brushes", ["Art", "Brushes"]),
    ("Watercolor Brushes", ["Art", "Brushes"]),
    ("Dog Food Chicken", ["Pets", "Dog"]),
    ("Dog Food Beef", ["Pets", "Dog"]),
    ("Cat Toy Mouse", ["Pets", "Cat"]),
    ("Cat Toy Ball", ["Pets", "Cat"]),
]


def test_labels_say_what_sets_a_prefix_apart() -> None:
    codes = np.array([[0, 0], [0, 0], [0, 1], [0, 1], [3, 2], [3, 2], [3, 0], [3, 0]])
    labels = make_labels(codes, (4, 3), [t for t, _ in ART], [c for _, c in ART])
    assert labels["0"][0] == "art"
    assert labels["3"][0] == "pets"
    assert "dog" in labels["3.2"]
    assert "pets" not in labels["3.2"][:2]
    assert describe(labels, [0, 0]) == "[Art] [Set]"
    assert describe(labels, [3, 0]) == "[Pets] [Cat]"
    assert describe(labels, [2, 1]) == "[code 2] [code 1]"


def test_a_word_is_said_once() -> None:
    labels = {"1": ["paint"], "1.2": ["paints", "set"], "1.2.3": ["set", "paint"]}
    assert describe(labels, [1, 2, 3]) == "[Paint] [Set] [code 3]"


def test_no_text_no_labels() -> None:
    assert make_labels(np.zeros((3, 2), np.uint8), (2, 2), ["", "", ""], [[], [], []]) == {}
    assert describe({}, [12, 7]) == "[code 12] [code 7]"


@pytest.mark.parametrize("text", ["12.7", "12 7", " 12,7 ", "<a_12><b_7>", "<a_12> <b_7>"])
def test_prefixes_are_read_in_every_form(text: str) -> None:
    assert parse_prefix(text) == (12, 7)
    assert id_text((12, 7)) == "<a_12><b_7>"


@pytest.mark.parametrize("text", ["", "12.", "a", "<b_7>", "<a_1><c_2>", "12-7", "<a_1> 7"])
def test_what_is_no_prefix_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="no prefix"):
        parse_prefix(text)
