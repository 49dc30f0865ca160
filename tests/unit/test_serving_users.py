"""Which users a batch is for: looked up without an index, cut into units, refused with the column named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qbrec.catalog.sources import list_files
from qbrec.errors import DataError
from qbrec.serving.users import file_units
from qbrec.storage.folder import Folder
from qbrec.storage.hashing import hash64
from qbrec.storage.user_index import users_of


def table_of(users: dict[str, list[str]]) -> pa.Table:
    """users.arrow of some domains, in several chunks."""
    names = [(domain, user) for domain, mine in users.items() for user in mine]
    hashes = np.concatenate([hash64(domain, mine) for domain, mine in users.items()])
    order = np.argsort(hashes)
    rows = {"domain": [names[i][0] for i in order], "user_id": [names[i][1] for i in order]}
    table = pa.table(rows)
    return pa.concat_tables([table.slice(i, 37) for i in range(0, table.num_rows, 37)])


@pytest.mark.parametrize("count", [1, 2, 3000])
def test_every_user_is_found_and_no_other(count: int) -> None:
    table = table_of({"shop": [f"u{i}" for i in range(count)], "b": [f"u{i}" for i in range(0, count, 2)]})
    asked = [f"u{i}" for i in range(count + 50)]
    numbers = users_of(table, "shop", asked)
    assert (numbers[:count] >= 0).all()
    assert (numbers[count:] == -1).all()
    found = table.take(numbers[:count]).to_pylist()
    assert found == [{"domain": "shop", "user_id": user} for user in asked[:count]]
    assert users_of(table, "shop", []).tolist() == []
    assert (users_of(table, "elsewhere", asked) == -1).all()


def test_hashes_that_lie_badly_are_found_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guessing by proportion is no use here; halving has to end the search."""
    import qbrec.storage.user_index as user_index

    hashes = np.uint64(2) ** np.arange(60, dtype=np.uint64)
    table = pa.table({"domain": ["shop"] * 60, "user_id": [str(i) for i in range(60)]})

    def hash_of(_: str, ids: Any) -> Any:
        return np.array([hashes[int(i)] if int(i) < 60 else 3 for i in ids], np.uint64)

    monkeypatch.setattr(user_index, "hash64", hash_of)
    assert users_of(table, "shop", [str(i) for i in range(61)]).tolist() == [*range(60), -1]


def write(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=4)
    return path


def test_units_follow_the_files(tmp_path: Path) -> None:
    write(tmp_path / "b.parquet", user_id=[str(i) for i in range(10)])
    write(tmp_path / "a.parquet", user_id=["x"])
    units, with_history = file_units(list_files(str(tmp_path), where="--users"), unit_rows=3)
    assert not with_history
    assert [unit["number"] for unit in units] == list(range(6))
    assert [unit["rows"] for unit in units] == [1, 3, 1, 3, 1, 2]
    assert [Path(unit["path"]).name for unit in units] == ["a.parquet"] + ["b.parquet"] * 5


@pytest.mark.parametrize(
    ("columns", "what"),
    [
        ({"user": ["a"]}, "no column 'user_id'"),
        ({"user_id": [1]}, "'user_id' is int64, not string"),
        ({"user_id": ["a"], "history": ["b"]}, "'history' is string, not list<string>"),
        ({"user_id": ["a"], "history": [[1]]}, "'history' is list<.*int64>, not list<string>"),
    ],
)
def test_wrong_columns_are_named(tmp_path: Path, columns: dict[str, Any], what: str) -> None:
    path = write(tmp_path / "users.parquet", **columns)
    with pytest.raises(DataError, match=what) as caught:
        file_units(list_files(str(path), where="--users"))
    assert str(path) in str(caught.value)


def test_files_have_to_agree(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", user_id=["a"])
    write(tmp_path / "b.parquet", user_id=["b"], history=[["i"]])
    with pytest.raises(DataError, match="some of the files have a column `history`"):
        file_units(list_files(str(tmp_path), where="--users"))


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_folder_of_results(tmp_path: Path, scheme: str) -> None:
    folder = Folder(f"{scheme}{tmp_path}/deep/down")
    assert folder.read("a.json") is None
    assert folder.sizes() == {}
    folder.write("a.json", b"one")
    folder.write("a.json", b"three")
    assert folder.read("a.json") == b"three"
    assert folder.sizes() == {"a.json": 5}
    assert Path(folder.place("a.json")) == tmp_path / "deep" / "down" / "a.json"
