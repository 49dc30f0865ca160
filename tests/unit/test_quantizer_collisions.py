"""Collision policies against brute force: one unit after the other, in plain Python."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp

from qbrec.errors import ConfigError
from qbrec.quantizer.collisions import Resolution, digit, next_nearest, next_nearest_beside, seating, sinkhorn
from qbrec.quantizer.collisions.sinkhorn import balanced
from qbrec.quantizer.packing import code_dtype

Key = tuple[int, ...]  # raw codes, then the group: one unit

seeds = st.integers(0, 2**32)
sizes_of_ids = st.sampled_from([(3, 2, 8), (2, 5), (4, 3, 5), (2, 1, 300), (6,)])
tables_at_once = st.sampled_from([1, 40, 1 << 23])


@dataclass(frozen=True)
class Items:
    """Random items: skewed codes, contents that several share, and residuals of whole numbers.

    Products of small whole numbers are exact in float32, so that brute force sees the same distances.
    """

    codes: np.ndarray
    sizes: tuple[int, ...]
    group: np.ndarray
    popularity: np.ndarray
    retired: np.ndarray
    book: np.ndarray
    left: np.ndarray

    @classmethod
    def drawn(cls, seed: int, sizes: tuple[int, ...], *, most: int = 120) -> Items:
        rng = np.random.default_rng(seed)
        count = int(rng.integers(1, most))
        codes = np.stack([(rng.random(count) ** 3 * s).astype(int) for s in sizes], 1)
        return cls(
            codes.astype(code_dtype(sizes)),
            sizes,
            rng.integers(0, max(1, count * 2 // 3), count),
            rng.integers(0, 6, count),
            rng.random(count) < rng.choice([0.0, 0.2]),
            rng.integers(-400, 400, (sizes[-1], 2)).astype(np.float32),
            rng.integers(-400, 400, (count, 2)).astype(np.float32),
        )

    def units(self, rows: Iterable[int]) -> dict[Key, list[int]]:
        """Units of some rows, the first in line first."""
        found = defaultdict(list)
        for row in sorted(rows, key=lambda r: (-self.popularity[r], r)):
            found[(*map(int, self.codes[row]), int(self.group[row]))].append(row)
        return dict(found)

    @property
    def live(self) -> list[int]:
        return np.flatnonzero(~self.retired).tolist()

    def distances(self, row: int) -> np.ndarray:
        return ((self.left[row].astype(float) - self.book) ** 2).sum(1)

    def policy(self, name: Callable[..., Resolution], **keys: object) -> Resolution:
        return name(
            self.codes,
            self.sizes,
            group=self.group,
            popularity=self.popularity,
            last_level=torch.from_numpy(self.book),
            residuals=lambda rows: torch.from_numpy(self.left[rows]),
            retired=self.retired,
            **keys,
        )


def _settled(items: Items, rows: list[int], capacity: int, taken: Counter[Key]) -> tuple[np.ndarray, int]:
    """`next_nearest` of some rows beside what is taken; `taken` is used up."""
    units = items.units(rows)
    out, waiting, stuck = items.codes.copy(), [], 0
    for key in units:
        if taken[key[:-1]] < capacity:
            taken[key[:-1]] += 1
        else:
            waiting.append(key)
    for key in waiting:
        prefix = key[:-2]
        for code in np.argsort(items.distances(units[key][0]), kind="stable").tolist():
            if taken[(*prefix, code)] < capacity:
                taken[(*prefix, code)] += 1
                out[units[key], -1] = code
                break
        else:
            stuck += len(units[key])
    return out, stuck


@settings(max_examples=60, deadline=None)
@given(seed=seeds, sizes=sizes_of_ids, capacity=st.integers(1, 3), table=tables_at_once)
def test_next_nearest_equals_brute_force(
    seed: int, sizes: tuple[int, ...], capacity: int, table: int
) -> None:
    items = Items.drawn(seed, sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seating, "TABLE_AT_ONCE", table)
        got = items.policy(next_nearest, capacity=capacity)
    want, stuck = _settled(items, items.live, capacity, Counter())
    assert np.array_equal(got.codes, want)
    assert got.codes.dtype == code_dtype(sizes)
    assert got.sizes == sizes
    assert got.moved == int((want != items.codes).any(1).sum())
    assert got.unresolved == stuck
    assert np.array_equal(got.codes[items.retired], items.codes[items.retired])


def _plan(items: Items, heads: list[int], is_open: np.ndarray, epsilon: float, iterations: int) -> np.ndarray:
    """Scores [b, K] of one batch, by Sinkhorn's updates with a row of slack."""
    cost = np.stack([items.distances(row)[is_open] for row in heads])
    near = (cost.max() - cost) / max(cost.max() - cost.min(), 1e-300)
    kernel = np.vstack([(2 * near - 1) / epsilon, np.zeros(is_open.sum())])
    with np.errstate(divide="ignore"):
        mass = np.log(np.append(np.ones(len(heads)), is_open.sum() - len(heads)))
    codes = np.zeros(is_open.sum())
    for _ in range(iterations):
        rows = mass - logsumexp(kernel + codes, axis=1)
        codes = -logsumexp(kernel + rows[:, None], axis=0)
    out = np.full((len(heads), len(is_open)), -np.inf)
    out[:, is_open] = 2 * np.round(((kernel + codes + rows[:, None]) / np.log(2))[:-1]) + near
    return out


@settings(max_examples=60, deadline=None)
@given(
    seed=seeds,
    sizes=sizes_of_ids,
    capacity=st.integers(1, 3),
    table=tables_at_once,
    epsilon=st.sampled_from([0.003, 0.1]),
)
def test_sinkhorn_equals_brute_force(
    seed: int, sizes: tuple[int, ...], capacity: int, table: int, epsilon: float
) -> None:
    items = Items.drawn(seed, sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seating, "TABLE_AT_ONCE", table)
        got = items.policy(sinkhorn, capacity=capacity, epsilon=epsilon, iterations=7)
    units = items.units(items.live)
    on_id = Counter(key[:-1] for key in units)
    room = {prefix: np.full(sizes[-1], capacity) for prefix in {key[:-2] for key in units}}
    crowded = defaultdict(list)
    for key in units:
        if on_id[key[:-1]] > capacity:
            crowded[key[:-2]].append(key)
        else:
            room[key[:-2]][key[-2]] -= 1
    want, stuck = items.codes.copy(), 0
    for prefix, waiting in crowded.items():
        free = room[prefix]
        while waiting and free.any():
            batch, waiting = waiting[: (free > 0).sum()], waiting[(free > 0).sum() :]
            plan = _plan(items, [units[key][0] for key in batch], free > 0, epsilon, 7)
            for row, key in zip(plan, batch, strict=True):
                code = int(np.where(free > 0, row, -np.inf).argmax())
                free[code] -= 1
                want[units[key], -1] = code
        stuck += sum(len(units[key]) for key in waiting)
    assert np.array_equal(got.codes, want)
    assert got.sizes == sizes
    assert got.moved == int((want != items.codes).any(1).sum())
    assert got.unresolved == stuck


def test_sinkhorn_leaves_only_equal_content_together() -> None:
    items = Items.drawn(5, (2, 64), most=60)
    got = items.policy(sinkhorn, capacity=1, epsilon=0.003, iterations=50)
    assert got.unresolved == 0
    contents = defaultdict(set)
    for row in items.live:
        contents[tuple(got.codes[row])].add(int(items.group[row]))
    assert max(map(len, contents.values())) == 1
    # What is equal to the last bit is parted too, as long as its content is not.
    same = Items(
        **{**items.__dict__, "left": np.zeros_like(items.left), "group": np.arange(len(items.codes))}
    )
    parted = same.policy(sinkhorn, capacity=1, epsilon=0.003, iterations=50)
    assert len(np.unique(parted.codes[items.live], axis=0)) == len(items.live)


def test_sinkhorn_spreads_at_less_cost_than_taking_turns() -> None:
    items = Items.drawn(3, (1, 64), most=60)
    items.codes[:], items.retired[:] = 0, False
    items.group[:] = np.arange(len(items.codes))

    def cost(found: Resolution) -> float:
        rows = enumerate(found.codes[:, -1])
        return float(sum(items.distances(row)[code] for row, code in rows))

    turns = cost(items.policy(next_nearest, capacity=1))
    assert cost(items.policy(sinkhorn, capacity=1, epsilon=0.003, iterations=200)) < turns


def test_the_plan_is_balanced_and_epsilon_and_iterations_count() -> None:
    rng = np.random.default_rng(0)
    distance, slot = torch.from_numpy(rng.random((14, 8))), np.array([2, 0] * 7)
    is_open = torch.ones(3, 8, dtype=torch.bool)
    is_open[2, 5] = False

    def shares(epsilon: float, iterations: int) -> np.ndarray:
        scores = balanced(distance, slot, is_open, epsilon=epsilon, iterations=iterations).numpy()
        return np.exp2(np.floor(scores / 2))  # nearness, between 0 and 1, goes off

    few, many, even = shares(0.05, 1), shares(0.05, 300), shares(3.0, 300)
    assert (many[slot == 2, 5] == 0).all()
    for problem in (0, 2):
        # Up to a factor of the square root of 2 for the rounding: each row gives 1, no code takes more.
        assert (np.abs(np.log2(many[slot == problem].sum(1))) <= 0.51).all()
        assert (np.log2(many[slot == problem].sum(0).clip(1)) <= 0.51).all()
    assert not np.array_equal(few, many)
    assert even.max() < 0.3 < many.max()


@settings(max_examples=60, deadline=None)
@given(seed=seeds, sizes=sizes_of_ids)
def test_digit_equals_brute_force(seed: int, sizes: tuple[int, ...]) -> None:
    items = Items.drawn(seed, sizes)
    got = digit(items.codes, sizes, group=items.group, popularity=items.popularity, retired=items.retired)
    seen: Counter[Key] = Counter()
    want = np.zeros(len(items.codes), dtype=int)
    for key, rows in items.units(items.live).items():
        want[rows] = seen[key[:-1]]
        seen[key[:-1]] += 1
    assert got.sizes == (*sizes, max(seen.values(), default=1))
    assert np.array_equal(got.codes[:, :-1], items.codes)
    assert np.array_equal(got.codes[:, -1], want)
    assert got.codes.dtype == code_dtype(got.sizes)
    assert (got.moved, got.unresolved) == (0, 0)


def test_a_digit_that_does_not_fit_is_refused() -> None:
    codes, group = np.zeros((3, 3), dtype=np.uint32), np.arange(3)
    sizes = (2**31, 2**31, 1)
    with pytest.raises(ConfigError, match=r"3 contents share one ID.* 64 bits"):
        digit(codes, sizes, group=group, popularity=group)
    assert digit(codes[:2], sizes, group=group[:2], popularity=group[:2]).sizes == (*sizes, 2)


def test_many_contents_need_a_wider_digit() -> None:
    rows = np.arange(300)
    got = digit(np.zeros((300, 2), np.uint8), (2, 2), group=rows, popularity=rows)
    assert got.sizes == (2, 2, 300)
    assert got.codes.dtype == np.uint16
    assert got.codes[:, 2].tolist() == rows[::-1].tolist()


@settings(max_examples=60, deadline=None)
@given(seed=seeds, sizes=sizes_of_ids, capacity=st.integers(1, 3), table=tables_at_once)
def test_next_nearest_beside_equals_brute_force(
    seed: int, sizes: tuple[int, ...], capacity: int, table: int
) -> None:
    new, old = Items.drawn(seed, sizes, most=60), Items.drawn(seed + 1, sizes)
    shift = int(np.random.default_rng(seed).integers(0, 80))  # how many contents are in both
    group_taken = old.group + shift
    before = old.codes.copy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seating, "TABLE_AT_ONCE", table)
        got = next_nearest_beside(
            new.codes,
            sizes,
            taken_codes=old.codes,
            group_new=new.group,
            group_taken=group_taken,
            popularity_new=new.popularity,
            capacity=capacity,
            last_level=torch.from_numpy(new.book),
            residuals=lambda rows: torch.from_numpy(new.left[rows]),
        )
    assert np.array_equal(old.codes, before)
    first = {int(content): row for row, content in reversed(list(enumerate(group_taken)))}
    rest = [row for row in range(len(new.codes)) if int(new.group[row]) not in first]
    units = {(*map(int, codes), int(g)) for codes, g in zip(old.codes, group_taken, strict=True)}
    taken = Counter(key[:-1] for key in units)
    want, stuck = _settled(new, rest, capacity, taken)
    for row in set(range(len(new.codes))) - set(rest):
        want[row] = old.codes[first[int(new.group[row])]]
    assert np.array_equal(got.codes, want)
    assert got.moved == int((want != new.codes).any(1).sum())
    assert got.unresolved == stuck


def test_beside_nothing_it_is_next_nearest() -> None:
    items = Items.drawn(11, (4, 3, 5))
    keys = {"capacity": 2, "last_level": torch.from_numpy(items.book)}
    alone = next_nearest(
        items.codes,
        items.sizes,
        group=items.group,
        popularity=items.popularity,
        residuals=lambda rows: torch.from_numpy(items.left[rows]),
        **keys,
    )
    beside = next_nearest_beside(
        items.codes,
        items.sizes,
        taken_codes=items.codes[:0],
        group_new=items.group,
        group_taken=items.group[:0],
        popularity_new=items.popularity,
        residuals=lambda rows: torch.from_numpy(items.left[rows]),
        **keys,
    )
    assert np.array_equal(alone.codes, beside.codes)
    assert (alone.moved, alone.unresolved) == (beside.moved, beside.unresolved)
    none = next_nearest_beside(
        items.codes[:0],
        items.sizes,
        taken_codes=items.codes,
        group_new=items.group[:0],
        group_taken=items.group,
        popularity_new=items.popularity[:0],
        residuals=lambda rows: torch.from_numpy(items.left[rows]),
        **keys,
    )
    assert none.codes.shape == (0, 3)


def test_the_number_of_threads_decides_nothing() -> None:
    rng = np.random.default_rng(1)
    count, sizes = 20_000, (8, 16, 64)
    codes = np.stack([(rng.random(count) ** 2 * s).astype(np.uint8) for s in sizes], 1)
    book, left = rng.normal(size=(64, 8)).astype(np.float32), rng.normal(size=(count, 8)).astype(np.float32)
    threads, found = torch.get_num_threads(), defaultdict(list)
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(seating, "TABLE_AT_ONCE", 1 << 14)
                for policy, keys in ((next_nearest, {}), (sinkhorn, {"epsilon": 0.01, "iterations": 5})):
                    got = policy(
                        codes,
                        sizes,
                        group=np.arange(count) // 2,
                        popularity=np.arange(count) % 7,
                        capacity=1,
                        last_level=torch.from_numpy(book),
                        residuals=lambda rows: torch.from_numpy(left[rows]),
                        **keys,
                    )
                    found[policy].append(got.codes)
    finally:
        torch.set_num_threads(threads)
    for one, three in found.values():
        assert np.array_equal(one, three)


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


def test_the_last_id_of_63_bits_is_resolved_as_any_other() -> None:
    codes = np.full((4, 7), 511, dtype=np.uint16)
    codes[3] = 0
    got = next_nearest(
        codes,
        (512,) * 7,
        group=np.arange(4),
        popularity=np.zeros(4, np.int64),
        capacity=1,
        last_level=torch.arange(512.0)[:, None],
        residuals=lambda rows: torch.full((len(rows), 1), 511.0),
    )
    assert sorted(got.codes[:3, -1].tolist()) == [509, 510, 511]
    assert (got.moved, got.unresolved) == (2, 0)


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


def test_retired_items_take_no_room() -> None:
    retired = np.array([True, False, False])
    got = next_nearest(
        np.zeros((3, 2), dtype=np.uint8),
        (1, 2),
        group=np.arange(3),
        popularity=np.array([9, 0, 0]),
        capacity=1,
        last_level=torch.tensor([[0.0], [1.0]]),
        residuals=lambda rows: torch.zeros(len(rows), 1),
        retired=retired,
    )
    assert got.codes[:, 1].tolist() == [0, 0, 1]
    assert (got.moved, got.unresolved) == (1, 0)
    all_gone = next_nearest(
        np.zeros((3, 2), dtype=np.uint8),
        (1, 2),
        group=np.arange(3),
        popularity=np.arange(3),
        capacity=1,
        last_level=torch.zeros(2, 1),
        residuals=lambda rows: torch.zeros(len(rows), 1),
        retired=np.ones(3, dtype=bool),
    )
    assert (all_gone.codes == 0).all()
