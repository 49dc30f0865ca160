"""Histories against a plain Python reading of the same interactions."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qbrec.catalog import rejected
from qbrec.catalog.contract import Domain, SourceFile
from qbrec.catalog.exchange import range_of
from qbrec.catalog.histories import HistoryJob, ReadJob, _history_order, count_users
from qbrec.catalog.units import cut_units
from qbrec.config.sections import CatalogConfig
from qbrec.errors import DataError
from qbrec.storage.blocks import BlockSet, RaggedField, write_block_index
from qbrec.storage.hashing import combine64, hash64

ITEMS = [f"i{n}" for n in range(12)]
HASHES = np.sort(hash64("shop", ITEMS))


def read(folder: Path, table: pa.Table, *, partitions: int = 1, **options: Any) -> list[pa.Table]:
    path = folder / "interactions.parquet"
    pq.write_table(table, path)
    domain = Domain(0, "shop", (), (SourceFile(str(path), 0, 0),), (), interaction_rows=table.num_rows)
    units = cut_units([domain], role="interactions", unit_rows=10_000)
    values = {"hashes": HASHES, "refused": np.zeros(0, np.uint64)} | options
    job = ReadJob(folder, [domain], partitions, values["hashes"], values["refused"])
    tables, summary = job.split(units)
    assert summary["units"] == len(units)
    return tables


def build(
    folder: Path, tables: list[pa.Table], config: CatalogConfig, starts: Any = ((0, 0),)
) -> tuple[BlockSet, dict[str, Any]]:
    first_user = np.array([0, count_users(0, tables[1:])])
    job = HistoryJob(folder, config, first_user, np.array(starts), ("shop",), HASHES, config.block_bytes)
    result = job.write(0, tables)
    assert result is not None
    write_block_index(folder / "blocks.histories.npy", [result["records"]])
    return BlockSet.open(folder, "histories"), result


events = st.lists(
    st.tuples(st.integers(0, 6), st.integers(0, 11), st.integers(0, 5)), min_size=1, max_size=60, unique=True
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(rows=events, cap=st.integers(1, 8), late=st.booleans())
def test_against_plain_python(tmp_path: Path, rows: list[tuple[int, int, int]], cap: int, late: bool) -> None:
    table = pa.table(
        {
            "user_id": [f"u{u}" for u, _, _ in rows],
            "item_id": [ITEMS[i] for _, i, _ in rows],
            "timestamp": [t for _, _, t in rows],
        }
    )
    config = CatalogConfig(max_history=cap, block_bytes=120, split="global_time" if late else "leave_one_out")
    blocks, result = build(tmp_path, read(tmp_path, table), config, starts=((2, 4),))

    row_of = {name: int(np.searchsorted(HASHES, hash64("shop", [name])[0])) for name in ITEMS}
    plain: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
    for u, i, t in rows:
        user, item = hash64("shop", [f"u{u}"]), hash64("shop", [ITEMS[i]])
        plain[f"u{u}"].append((t, int(combine64(user, item)[0]), row_of[ITEMS[i]]))
    order = sorted(plain, key=lambda user: int(hash64("shop", [user])[0]))
    histories = [sorted(plain[user])[-cap:] for user in order]
    expected_cut = []
    for history in histories:
        n = len(history)
        if late:
            cut = [sum(t < 2 for t, _, _ in history), sum(t < 4 for t, _, _ in history)]
        else:
            cut = [n - 2, n - 1]
        expected_cut.append(cut if n >= 3 else [n, n])
    found = blocks.ragged(RaggedField("row", offsets="offset"))
    assert [found.row(u).tolist() for u in range(len(found))] == [[r for _, _, r in h] for h in histories]
    assert blocks.column("cut").tolist() == expected_cut
    assert blocks.column("user").tolist() == list(range(len(order)))
    assert result["kept"] + result["truncated"] == len(rows)
    counts = np.zeros(12, np.int64)
    counts[result["rows"]] = result["counts"]
    trained = [r for h, cut in zip(histories, expected_cut, strict=True) for _, _, r in h[: cut[0]]]
    assert counts.tolist() == np.bincount(trained, minlength=12).tolist()
    assert result["eval_users"][0] == sum(
        cut[1] < len(h) for h, cut in zip(histories, expected_cut, strict=True)
    )
    with pa.memory_map(str(tmp_path / "users.part-000000.tmp")) as source:
        assert pa.ipc.open_file(source).read_all()["user_id"].to_pylist() == order


def test_file_order_says_nothing(tmp_path: Path) -> None:
    """Equal timestamps: the same histories whatever the order of the rows."""
    table = pa.table({"user_id": ["u"] * 8, "item_id": ITEMS[:8], "timestamp": [5] * 8})
    seen = set()
    for seed in range(4):
        folder = tmp_path / str(seed)
        folder.mkdir()
        shuffled = table.take(pa.array(np.random.default_rng(seed).permutation(8)))
        blocks, _ = build(folder, read(folder, shuffled), CatalogConfig())
        seen.add(tuple(blocks.view(0, "row").tolist()))
    assert len(seen) == 1
    assert seen != {tuple(sorted(seen.pop()))}


@given(
    rows=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 11)), min_size=1, max_size=40),
    data=st.data(),
)
def test_the_order_is_that_of_one_stable_sort(rows: list[tuple[int, int]], data: st.DataObject) -> None:
    """Times of any width, many of them equal."""
    near = st.sampled_from([-(2**63), -1, 0, 1, 2**40, 2**40 + 1, 2**63 - 1])
    time = np.array([data.draw(near) for _ in rows], np.int64)
    user = hash64("shop", [f"u{u}" for u, _ in rows])
    item = np.array([i for _, i in rows])
    expected = np.lexsort((combine64(user, HASHES[item]), time, user))
    found = _history_order(user, time, HASHES, item)
    for values in (user, time, item):
        assert values[found].tolist() == values[expected].tolist()


def test_reasons(tmp_path: Path) -> None:
    table = pa.table(
        {
            "user_id": ["u", None, "", "u", "u", "u"],
            "item_id": ["i1", "i1", "i1", "nowhere", None, "i0"],
            "timestamp": pa.array([None, 1, 1, 1, 1, 1], pa.int64()),
        }
    )
    gone = hash64("shop", ["i0"])
    tables = read(tmp_path, table, hashes=HASHES[gone[0] != HASHES], refused=gone)
    assert [len(found) for found in tables] == [0, 0]
    domain = Domain(0, "shop", (), (SourceFile("in.parquet", 0, 0),), (), interaction_rows=6)
    with pytest.raises(DataError, match="6 of 6 rows of interactions"):
        rejected.settle(tmp_path, role="interactions", domains=[domain], max_fraction=0.5)
    found = pq.read_table(tmp_path / "rejected" / "interactions.parquet")
    assert found["reason"].to_pylist() == [
        "timestamp: is null", "user_id: is null", "user_id: is empty", "item_id: is not among the items",
        "item_id: is null", "item_id: belongs to a rejected item",
    ]  # fmt: skip
    assert found["row"].to_pylist() == list(range(6))


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_timestamps_of_any_unit_become_microseconds(tmp_path: Path, unit: str) -> None:
    times = pa.array([1_600_000_000], pa.timestamp("s", tz="UTC")).cast(pa.timestamp(unit, tz="UTC"))
    table = pa.table({"user_id": ["u"], "item_id": ["i0"], "timestamp": times})
    assert read(tmp_path, table)[0]["time"].to_pylist() == [1_600_000_000_000_000]


def test_two_users_with_one_hash_are_refused(tmp_path: Path) -> None:
    table = pa.table({"user_id": ["u", "v"], "item_id": ["i0", "i1"], "timestamp": [1, 2]})
    sevens = pa.array([7, 7], pa.uint64())
    forged = [t.set_column(t.column_names.index("user"), "user", sevens) for t in read(tmp_path, table)]
    with pytest.raises(DataError, match="'u' and 'v' share a 64-bit hash"):
        build(tmp_path, forged, CatalogConfig())


def test_a_user_of_several_units_is_one(tmp_path: Path) -> None:
    first = read(tmp_path, pa.table({"user_id": ["u", "v"], "item_id": ["i0", "i1"], "timestamp": [1, 2]}))
    second = read(tmp_path, pa.table({"user_id": ["w", "u"], "item_id": ["i2", "i3"], "timestamp": [3, 4]}))
    blocks, result = build(tmp_path, [first[0], second[0], first[1], second[1]], CatalogConfig())
    assert blocks.num_samples == 3
    assert result["kept"] == 4


def test_partitions_are_ranges_of_the_hash(tmp_path: Path) -> None:
    users = np.sort(np.random.default_rng(0).integers(0, 2**64, 5000, dtype=np.uint64))
    parts = range_of(users, 7)
    assert (np.diff(parts) >= 0).all()
    assert set(parts.tolist()) == set(range(7))
    assert np.bincount(parts).min() > 600
    assert range_of(np.array([2**64 - 1], np.uint64), 7)[0] == 6
    n = 50
    table = pa.table(
        {"user_id": [f"u{k % 20}" for k in range(n)], "item_id": ["i0"] * n, "timestamp": range(n)}
    )
    tables = read(tmp_path, table, partitions=4)
    assert sum(t.num_rows for t in tables[:4]) == n
    for number, (events, names) in enumerate(zip(tables[:4], tables[4:], strict=True)):
        keys = np.asarray(names["user"], dtype=np.uint64)
        assert set(keys.tolist()) == set(events["user"].to_pylist())
        assert (range_of(keys, 4) == number).all()


def test_block_numbers_stay_within_their_shard(tmp_path: Path) -> None:
    """A tiny block size must not run into the numbers of the next shard."""
    n = 9000
    table = pa.table({"user_id": [f"u{k}" for k in range(n)], "item_id": ["i0"] * n, "timestamp": [0] * n})
    blocks, _ = build(tmp_path, read(tmp_path, table), CatalogConfig(block_bytes=1))
    assert blocks.num_samples == n
    assert blocks.num_blocks < 4096
