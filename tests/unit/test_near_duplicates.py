"""Items that the same users bought: the join by prefixes against all pairs, groups, the list."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qbrec.catalog.duplicates import overlap
from qbrec.catalog.duplicates.near_duplicates import components, find_overlaps, listing
from qbrec.catalog.duplicates.overlap import OVERLAPS, OverlapJob
from qbrec.storage.blocks import BlockTarWriter, write_block_index
from qbrec.storage.ragged import Ragged

DOMAIN_ITEMS = 25


def exchange(
    sources: Iterable[Any],
    split: Callable[[list[Any]], tuple[list[Any], Any]],
    *,
    partitions: int,
    group: int = 1,
    add: Callable[[Any], None] | None = None,
) -> list[list[Any]]:
    """The all-to-all of `catalog.exchange` in this process."""
    iterator, outputs = iter(sources), []
    while mine := list(islice(iterator, group)):
        parts, summary = split(mine)
        assert len(parts) == partitions
        outputs.append(parts)
        if add is not None:
            add(summary)
    return [list(parts) for parts in zip(*outputs, strict=True)]


def reduce(parts: list[list[Any]], work: Callable[[int, list[Any]], Any]) -> Iterator[Any]:
    return (work(number, mine) for number, mine in enumerate(parts))


def write_histories(folder: Path, lists: list[list[int]], cut: np.ndarray, *, block: int = 17) -> None:
    """Histories of one domain; user numbers have gaps, as those of later generations may."""
    writer = BlockTarWriter(folder, prefix="histories")
    for begin in range(0, len(lists), block):
        part = Ragged.from_lists(lists[begin : begin + block])
        users = np.arange(begin, begin + len(part)) * 3
        writer.add(
            {
                "user": users,
                "domain": np.zeros(len(part), np.uint8),
                "offset": part.offsets,
                "row": part.values,
                "time": np.arange(len(part.values)),
                "cut": cut[begin : begin + block],
            },
            len(part),
        )
    write_block_index(folder / "blocks.histories.npy", [writer.close()])


def found_in(
    lists: list[list[int]],
    cut: np.ndarray,
    *,
    num_items: int,
    partitions: int,
    min_overlap: float,
    min_users: int,
) -> list[tuple[int, int, int]]:
    with tempfile.TemporaryDirectory() as folder:
        write_histories(Path(folder), lists, cut)
        job = OverlapJob(Path(folder), num_items, partitions, min_overlap, min_users)
        table = find_overlaps(job, exchange=exchange, reduce=reduce, update=lambda _: None)
    a, b, common = (table[name].to_pylist() for name in ("a", "b", "common"))
    return list(zip(a, b, common, strict=True))


def all_pairs(
    lists: list[list[int]], cut: np.ndarray, *, num_items: int, min_overlap: float, min_users: int
) -> list[tuple[int, int, int]]:
    users: list[set[int]] = [set() for _ in range(num_items)]
    for user, (rows, (end, _)) in enumerate(zip(lists, cut, strict=True)):
        for row in rows[:end]:
            users[row].add(user)
    found = []
    for a, b in combinations(range(num_items), 2):
        common = len(users[a] & users[b])
        if common >= min_users and common / len(users[a] | users[b]) >= min_overlap:
            found.append((a, b, common))
    return found


def random_histories(seed: int, num_users: int, num_items: int) -> tuple[list[list[int]], np.ndarray]:
    """Popular and rare items, long and short histories, repeats, and items that follow another as copies."""
    rng = np.random.default_rng(seed)
    weights = rng.random(num_items) ** 3 + 1e-3
    faith = np.where(rng.random(num_items) < 0.4, rng.random(num_items), 0.0)
    lists, cut = [], []
    for _ in range(num_users):
        rows: list[int] = []
        for row in rng.choice(num_items, int(rng.geometric(0.15)), p=weights / weights.sum()).tolist():
            rows += [row] + [(row + 1) % num_items] * int(rng.random() < faith[row])
        lists.append(rows)
        cut.append([max(len(rows) - 2, 1), max(len(rows) - 1, 1)] if len(rows) > 2 else [len(rows)] * 2)
    return lists, np.array(cut, np.int32)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    num_users=st.integers(1, 250),
    num_items=st.integers(1, DOMAIN_ITEMS),
    partitions=st.integers(1, 4),
    min_overlap=st.sampled_from([0.01, 0.05, 0.1, 0.3, 0.5, 2 / 3, 0.7, 0.9, 1.0]),
    min_users=st.integers(1, 5),
)
def test_all_pairs_are_found_and_no_other(
    seed: int, num_users: int, num_items: int, partitions: int, min_overlap: float, min_users: int
) -> None:
    lists, cut = random_histories(seed, num_users, num_items)
    options: dict[str, Any] = {
        "num_items": num_items,
        "min_overlap": min_overlap,
        "min_users": min_users,
    }
    found = found_in(lists, cut, partitions=min(partitions, num_items), **options)
    assert found == all_pairs(lists, cut, **options)


def test_small_steps_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    lists, cut = random_histories(7, 400, 40)
    options: dict[str, Any] = {"num_items": 40, "min_overlap": 0.1, "min_users": 2}
    want = all_pairs(lists, cut, **options)
    assert len(want) > 5
    monkeypatch.setattr(overlap, "MAX_PAIRS", 3)
    assert found_in(lists, cut, partitions=2, **options) == want


def test_bounds_drop_most_meetings() -> None:
    """Popular items that share users by chance never come to be counted in full."""
    rng = np.random.default_rng(0)
    lists = [rng.choice(300, 8, replace=False).tolist() for _ in range(4000)]
    cut = np.full((len(lists), 2), 8, np.int32)
    with tempfile.TemporaryDirectory() as folder:
        write_histories(Path(folder), lists, cut)
        job = OverlapJob(Path(folder), 300, 1, 0.5, 2)
        (pairs,), count = job.read([(0, -(-4000 // 17))])
        *groups, sets = job.prefixes([pairs])
        candidates = job.probe(sets, job.join(groups))
    assert count == 32_000
    assert sum(table.num_rows for table in candidates) < 0.01 * 300 * 299 / 2


def test_validation_and_test_parts_are_not_looked_at() -> None:
    lists = [[0, 1], [0, 1], [0, 1, 2, 3], [0, 1, 2, 3]]
    cut = np.array([[2, 2], [2, 2], [2, 3], [2, 3]], np.int32)
    options: dict[str, Any] = {"num_items": 4, "partitions": 1, "min_overlap": 0.5, "min_users": 2}
    assert found_in(lists, cut, **options) == [(0, 1, 4)]


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_components(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 30))
    row = st.integers(0, size - 1)
    pairs = data.draw(st.lists(st.tuples(row, row), max_size=20))
    content = np.array([data.draw(st.integers(0, i)) for i in range(size)])
    content = content[content] if (content[content] == content).all() else np.arange(size)
    leader = list(range(size))
    for a, b in [*pairs, *enumerate(content.tolist())]:
        old, new = max(leader[a], leader[b]), min(leader[a], leader[b])
        leader = [new if x == old else x for x in leader]
    found = components(size, np.array(pairs, np.int64).reshape(-1, 2), content)
    assert found.tolist() == leader


def write_items(folder: Path, count: int) -> None:
    table = pa.table(
        {
            "domain": ["shop"] * count,
            "item_id": [f"i{row}" for row in range(count)],
            "title": [None if row == 1 else f"title {row}" for row in range(count)],
        }
    )
    with pa.OSFile(str(folder / "items.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as out:
        out.write_table(table, max_chunksize=3)


def test_the_list_names_both_items_and_the_reason(tmp_path: Path) -> None:
    write_items(tmp_path, 8)
    found = pa.table(
        {"a": [0, 2], "b": [1, 3], "common": [2, 9], "jaccard": [0.5, 0.75]},
        schema=OVERLAPS,
    )
    content = np.array([0, 1, 2, 2, 4, 4, 6, 7])
    chosen = np.array([0, 1, 3, 3, 4, 5, 6, 7])  # only 2 has been moved, to 3
    table, total = listing(tmp_path, found, content=content, chosen=chosen)
    assert total == 3
    assert table.to_pylist() == [
        {
            "domain": "shop", "item_id": "i2", "title": "title 2", "duplicate_item_id": "i3",
            "duplicate_title": "title 3", "reason": "content, overlap", "jaccard": 0.75, "users_in_common": 9,
            "collapsed_into": "i3",
        },
        {
            "domain": "shop", "item_id": "i0", "title": "title 0", "duplicate_item_id": "i1",
            "duplicate_title": None, "reason": "overlap", "jaccard": 0.5, "users_in_common": 2,
            "collapsed_into": None,
        },
        {
            "domain": "shop", "item_id": "i4", "title": "title 4", "duplicate_item_id": "i5",
            "duplicate_title": "title 5", "reason": "content", "jaccard": None, "users_in_common": None,
            "collapsed_into": None,
        },
    ]  # fmt: skip
    short, total = listing(tmp_path, found, content=content, chosen=chosen, limit=1)
    assert (short["item_id"].to_pylist(), total) == (["i2"], 3)
    none, total = listing(tmp_path, found.slice(0, 0), content=np.arange(8), chosen=np.arange(8))
    assert (none.num_rows, total) == (0, 0)
