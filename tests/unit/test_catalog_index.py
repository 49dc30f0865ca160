"""Ids that occur twice, hashes that collide, rows that are bad: found, named, counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qbrec.catalog import rejected
from qbrec.catalog.contract import Domain, SourceFile
from qbrec.catalog.index import Uniqueness
from qbrec.catalog.items import ScanJob
from qbrec.catalog.units import cut_units
from qbrec.errors import DataError
from qbrec.storage.hashing import hash64


def domain_of(folder: Path, ids: list[str | None]) -> Domain:
    path = folder / "items.parquet"
    pq.write_table(pa.table({"item_id": pa.array(ids, pa.string())}), path)
    return Domain(0, "shop", (SourceFile(str(path), 0, 0),), (), ("item_id",), item_rows=len(ids))


def check(domain: Domain, *, partitions: int = 1, forge: Any = None) -> int:
    units = cut_units([domain], role="items", unit_rows=2)
    job = ScanJob([domain], partitions, count_words=False)
    parts = [job.split([unit])[0] for unit in units]
    if forge is not None:
        hashes = pa.array(forge, pa.uint64())
        (table,) = (pa.concat_tables(part[0] for part in parts),)
        parts = [[table.set_column(0, "hash", hashes)]]
    uniqueness = Uniqueness(units, [domain])
    return sum(uniqueness.check(n, [part[n] for part in parts]) for n in range(partitions))


def test_duplicate_ids_name_both_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'a' occurs twice") as caught:
        check(domain_of(tmp_path, ["a", "b", "a"]), partitions=3)
    assert "row 0" in str(caught.value)
    assert "row 2" in str(caught.value)


def test_equal_hashes_of_different_ids_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'a' and 'c' have the same 64-bit hash"):
        check(domain_of(tmp_path, ["a", "b", "c"]), forge=[7, 8, 7])


def test_every_item_with_an_id_is_in_one_range(tmp_path: Path) -> None:
    ids = [f"i{n}" for n in range(50)]
    assert check(domain_of(tmp_path, [*ids, None, ""]), partitions=4) == 50


BAD = pa.table(
    [[0, 0], [0, 0], [1, 2], [None, "c"], ["item_id: is null", "image: cannot be decoded"]],
    schema=rejected.ITEMS,
)


def test_bad_rows_are_joined_in_order_and_counted(tmp_path: Path) -> None:
    domain = domain_of(tmp_path, ["a", None, "c"])
    assert rejected.settle(tmp_path, role="items", domains=[domain], max_fraction=0.0) == {}
    assert pq.read_table(tmp_path / "rejected" / "items.parquet").num_rows == 0
    for number in (1, 0):
        rejected.write_part(tmp_path, "items", number, BAD.slice(number, 1))
    counts = rejected.settle(tmp_path, role="items", domains=[domain], max_fraction=0.7)
    assert counts == {"item_id: is null": 1, "image: cannot be decoded": 1}
    written = pq.read_table(tmp_path / "rejected" / "items.parquet").to_pylist()
    assert [row["row"] for row in written] == [1, 2]
    assert {row["domain"] for row in written} == {"shop"}
    assert written[0]["file"].endswith("items.parquet")
    assert rejected.item_hashes(tmp_path).tolist() == hash64("shop", ["c"]).tolist()
    assert not list(tmp_path.rglob("*.tmp"))


def test_too_many_bad_rows_stop_the_run(tmp_path: Path) -> None:
    domain = domain_of(tmp_path, ["a", None, "c"])
    rejected.write_part(tmp_path, "items", 0, BAD)
    with pytest.raises(DataError) as caught:
        rejected.settle(tmp_path, role="items", domains=[domain], max_fraction=0.5)
    for word in (
        "2 of 3 rows",
        "items.parquet, row 1",
        "item_id",
        "max_rejected_fraction",
        "rejected/items.parquet",
    ):
        assert word in str(caught.value)
