"""Packing, collisions, quality figures, gate, labels: tables against brute force."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qbrec.config.stages import QualityConfig
from qbrec.errors import ConfigError, GateError
from qbrec.quantizer import collisions
from qbrec.quantizer.collisions import next_nearest
from qbrec.quantizer.ids import id_text, parse_prefix
from qbrec.quantizer.labels import describe, make_labels
from qbrec.quantizer.packing import bucket_order, code_bits, code_dtype, pack, unpack
from qbrec.quantizer.quality import bucket_figures, check_gate, cohesion, level_usage

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


def _brute_force(
    codes: np.ndarray,
    group: np.ndarray,
    popularity: np.ndarray,
    capacity: int,
    book: np.ndarray,
    left: np.ndarray,
) -> np.ndarray:
    """One unit after the other, in plain Python."""
    units = defaultdict(list)
    for row in range(len(codes)):
        units[(*codes[row], group[row])].append(row)
    heads = {key: min(rows, key=lambda r: (-popularity[r], r)) for key, rows in units.items()}
    by_priority = sorted(units, key=lambda key: (-popularity[heads[key]], heads[key]))
    taken: Counter[tuple[int, ...]] = Counter()
    out, waiting = codes.copy(), []
    for key in by_priority:
        if taken[key[:-1]] < capacity:
            taken[key[:-1]] += 1
        else:
            waiting.append(key)
    for key in waiting:
        prefix = key[:-2]
        gaps = ((left[heads[key]] - book) ** 2).sum(1)
        for code in np.argsort(gaps, kind="stable"):
            if taken[(*prefix, code)] < capacity:
                taken[(*prefix, code)] += 1
                out[units[key], -1] = code
                break
    return out


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), capacity=st.integers(1, 3), at_once=st.sampled_from([1, 7, 16_384]))
def test_next_nearest_equals_brute_force(seed: int, capacity: int, at_once: int) -> None:
    rng = np.random.default_rng(seed)
    count, sizes = int(rng.integers(1, 150)), (3, 2, 8)
    codes = np.stack([(rng.random(count) ** 3 * s).astype(int) for s in sizes], 1)
    group = rng.integers(0, max(1, count * 2 // 3), count)
    popularity = rng.integers(0, 6, count)
    book, left = rng.normal(size=(8, 4)).astype(np.float32), rng.normal(size=(count, 4)).astype(np.float32)
    keep = collisions.UNITS_AT_ONCE
    collisions.UNITS_AT_ONCE = at_once
    try:
        got = next_nearest(
            codes,
            sizes,
            group=group,
            popularity=popularity,
            capacity=capacity,
            last_level=torch.from_numpy(book),
            residuals=lambda rows: torch.from_numpy(left[rows]),
        )
    finally:
        collisions.UNITS_AT_ONCE = keep
    want = _brute_force(codes, group, popularity, capacity, book, left)
    assert np.array_equal(got.codes, want)
    assert np.array_equal(got.codes[:, :-1], codes[:, :-1])
    assert got.moved == int((want != codes).any(1).sum())
    contents = Counter(
        key[:3]
        for key in {
            (*unit, g, *raw)
            for unit, g, raw in zip(map(tuple, want.tolist()), group, map(tuple, codes.tolist()), strict=True)
        }
    )
    assert (max(contents.values()) <= capacity) or got.unresolved > 0


def test_equal_content_stays_together() -> None:
    codes = np.zeros((6, 2), dtype=np.uint8)
    got = next_nearest(
        codes,
        (1, 4),
        group=np.array([7, 7, 8, 8, 9, 9]),
        popularity=np.array([0, 1, 5, 0, 0, 0]),
        capacity=1,
        last_level=torch.tensor([[0.0], [1.0], [2.0], [3.0]]),
        residuals=lambda rows: torch.zeros(len(rows), 1),
    )
    # The most popular content keeps its ID, the next ones take the nearest free codes.
    assert got.codes[:, 1].tolist() == [1, 1, 0, 0, 2, 2]
    assert (got.moved, got.unresolved) == (4, 0)


def test_a_full_prefix_is_counted_as_unresolved() -> None:
    got = next_nearest(
        np.zeros((5, 2), dtype=np.uint8),
        (1, 2),
        group=np.arange(5),
        popularity=np.arange(5),
        capacity=2,
        last_level=torch.tensor([[0.0], [1.0]]),
        residuals=lambda rows: torch.zeros(len(rows), 1),
    )
    assert got.codes[:, 1].tolist() == [0, 1, 1, 0, 0]
    assert (got.moved, got.unresolved) == (2, 1)


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


def test_the_gate_names_figure_and_threshold() -> None:
    gate = QualityConfig(min_perplexity_fraction=0.1, max_collision_rate=0.2)
    fine = {"levels": [{"codes": 256, "perplexity": 30.0}], "collision_rate": 0.1}
    check_gate(fine, gate)
    with pytest.raises(GateError, match=r"perplexity 15\.8 at level 0, not 25\.6") as caught:
        check_gate(fine | {"levels": [{"codes": 256, "perplexity": 15.8}]}, gate)
    assert caught.value.exit_code == 6
    assert "min_perplexity_fraction = 0.1" in str(caught.value)
    with pytest.raises(GateError, match=r"collision rate 30\.0%"):
        check_gate(fine | {"collision_rate": 0.3}, gate)


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
