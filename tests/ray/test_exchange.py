"""The all-to-all on a real Ray: everything arrives once, in order, and errors are what they were."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest

from qbrec.catalog import exchange as module
from qbrec.catalog.exchange import exchange, group_size, range_of, reduce, split_by
from qbrec.errors import DataError

pytestmark = pytest.mark.usefixtures("ray_session")


def tables(count: int) -> list[pa.Table]:
    rng = np.random.default_rng(0)
    return [
        pa.table({"key": rng.integers(0, 2**64, 100, dtype=np.uint64), "source": [n] * 100})
        for n in range(count)
    ]


@pytest.mark.parametrize(("partitions", "group"), [(1, 1), (5, 1), (3, 4)])
def test_every_row_arrives_once_in_order(partitions: int, group: int) -> None:
    sources = tables(10)

    def split(mine: list[pa.Table]) -> tuple[list[pa.Table], int]:
        table = pa.concat_tables(mine)
        return split_by(table, range_of(np.asarray(table["key"]), partitions), partitions), len(mine)

    seen: list[int] = []
    parts = exchange(iter(sources), split, partitions=partitions, group=group, add=seen.append)
    assert sum(seen) == 10
    assert len(seen) == -(-10 // group)
    results = list(reduce(parts, lambda number, mine: (number, pa.concat_tables(mine).to_pylist())))
    assert [number for number, _ in results] == list(range(partitions))
    expected = pa.concat_tables(sources)
    owner = range_of(np.asarray(expected["key"]), partitions)
    for number, found in results:
        assert found == expected.filter(pa.array(owner == number)).to_pylist()
    assert parts == [[] for _ in range(partitions)]  # let go of


def test_sources_are_asked_for_as_the_cluster_works() -> None:
    """An endless supply of sources must not be drawn into memory ahead of the tasks."""
    asked: list[int] = []
    ended: list[int] = []
    most = 0

    def supply() -> Iterator[int]:
        nonlocal most
        for n in range(30):
            asked.append(n)
            most = max(most, len(asked) - len(ended))
            yield n

    exchange(supply(), lambda mine: ([mine[0]], mine[0]), partitions=1, add=ended.append)
    assert sorted(ended) == list(range(30))
    assert most <= module._in_flight() + 1


def test_no_source_leaves_empty_partitions() -> None:
    parts = exchange([], lambda mine: ([mine], None), partitions=2)
    assert list(reduce(parts, lambda number, mine: (number, mine))) == [(0, []), (1, [])]


def test_errors_of_tasks_come_out() -> None:
    def split(mine: list[int]) -> tuple[list[int], None]:
        if mine[0] == 3:
            raise DataError("three is bad", where="here", fix="use two")
        return mine, None

    with pytest.raises(DataError, match="three is bad"):
        exchange(range(6), split, partitions=1)


def test_groups_bound_the_number_of_parts() -> None:
    assert group_size(10, 10) == 1
    sources, partitions = 3_000, 600
    size = group_size(sources, partitions)
    assert -(-sources // size) * partitions <= module.MAX_OBJECTS + partitions
