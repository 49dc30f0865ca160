"""Parquet on an object store: read in spite of faults, refused by name where that cannot be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qbrec.catalog.sources import list_files, open_parquet
from qbrec.errors import DataError
from qbrec.storage.filesystem import Patience
from qbrec.storage.remote_input import RemoteInput
from tests.support.s3_server import FaultProxy

QUICK = Patience(connect_s=1, silence_s=1, requests=1, attempts=3, pause_s=0.02)
ROWS, GROUP = 20_000, 5_000


def put(s3: FaultProxy, uri: str, *, seed: int = 0) -> pa.Table:
    rng = np.random.default_rng(seed)
    table = pa.table({"a": rng.random(ROWS), "b": rng.random(ROWS), "c": np.arange(ROWS)})
    with s3.behind.open_output_stream(uri.removeprefix("s3://")) as out:
        pq.write_table(table, out, row_group_size=GROUP)
    s3.requests.clear()
    return table


def quick(uri: str) -> pq.ParquetFile:
    return pq.ParquetFile(pa.PythonFile(RemoteInput(uri, patience=QUICK), mode="r"), pre_buffer=True)


def test_files_folders_and_globs(s3: FaultProxy) -> None:
    bucket = s3.bucket()
    names = [
        "in/a.parquet",
        "in/b.parquet",
        "in/sub/day=1%2F2 #3/c.parquet",
        "in/_SUCCESS",
        "in/_x/d.parquet",
    ]
    for name in names:
        put(s3, f"{bucket}/{name}")

    def found(place: str) -> list[str]:
        return [file.path.removeprefix(f"{bucket}/") for file in list_files(f"{bucket}/{place}", where="x")]

    assert found("in") == found("in/") == names[:3]
    assert found("in/?.parquet") == names[:2]
    assert found("in/a.parquet") == names[:1]
    assert found("in/*/*/c.parquet") == names[2:3]
    for file in list_files(f"{bucket}/in", where="x"):
        assert open_parquet(file.path).metadata.num_rows == ROWS  # by the very name that the listing gave
    with pytest.raises(DataError, match="no Parquet file"):
        found("elsewhere")
    with pytest.raises(DataError, match="no Parquet file"):
        list_files("s3://no-such-bucket-here/in", where="x")


def test_a_group_is_what_was_written_and_little_else_is_read(s3: FaultProxy) -> None:
    uri = f"{s3.bucket()}/t.parquet"
    table = put(s3, uri)
    file = open_parquet(uri)
    s3.requests.clear()
    batches = file.iter_batches(row_groups=[2], columns=["a", "b"], use_threads=False)
    assert pa.Table.from_batches(batches).equals(table.select(["a", "b"]).slice(2 * GROUP, GROUP))
    assert len(s3.fetched()) == 1  # neighbouring columns are one request
    assert file.read().equals(table)


@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "drop"},
        {"kind": "status", "code": 500},
        {"kind": "status", "code": 503, "times": 2},
    ],
    ids=lambda f: f"{f['kind']}{f.get('code', '')}",
)
def test_reading_gets_over_a_passing_fault(s3: FaultProxy, fault: dict[str, Any]) -> None:
    uri = f"{s3.bucket()}/t.parquet"
    table, file = put(s3, uri), quick(uri)
    planned = s3.fault(match="t.parquet", **fault)
    assert file.read_row_group(1).equals(table.slice(GROUP, GROUP))
    assert planned.fired == planned.times


@pytest.mark.parametrize(
    ("code", "tries", "words"),
    [(500, 3, "store fails"), (403, 1, "access is denied"), (404, 1, "does not exist")],
)
def test_a_fault_that_stays_names_the_object(s3: FaultProxy, code: int, tries: int, words: str) -> None:
    uri = f"{s3.bucket()}/t.parquet"
    put(s3, uri)
    file = quick(uri)
    planned = s3.fault("status", "t.parquet", code=code, times=99)
    with pytest.raises(DataError, match=words) as caught:
        file.read_row_group(1)
    assert caught.value.where == uri
    assert planned.fired == tries


def test_a_name_that_reads_like_an_error(s3: FaultProxy) -> None:
    uri = f"{s3.bucket()}/ACCESS_DENIED/NO_SUCH_KEY.parquet"
    put(s3, uri)
    planned = s3.fault("status", "NO_SUCH_KEY", code=500, method="HEAD")
    assert quick(uri).metadata.num_rows == ROWS  # the error tells the name, and is repeated none the less
    assert planned.fired == 1


def test_a_fault_while_listing(s3: FaultProxy) -> None:
    bucket = s3.bucket()
    put(s3, f"{bucket}/in/t.parquet")
    planned = s3.fault("status", "list-type", code=403)
    with pytest.raises(DataError, match="cannot list the input: access is denied") as caught:
        list_files(f"{bucket}/in", where="data.domains.x.items")
    assert caught.value.where == f"data.domains.x.items: {bucket}/in"
    assert planned.fired == 1
    planned = s3.fault("status", "list-type", code=503)
    assert len(list_files(f"{bucket}/in", where="x")) == 1
    assert planned.fired == 1


def test_an_object_that_goes_while_it_is_read(s3: FaultProxy) -> None:
    uri = f"{s3.bucket()}/t.parquet"
    put(s3, uri)
    file = quick(uri)
    file.read_row_group(0)
    s3.behind.delete_file(uri.removeprefix("s3://"))
    with pytest.raises(DataError, match="does not exist") as caught:
        file.read_row_group(1)
    assert caught.value.where == uri


def test_an_object_that_is_replaced_between_two_reads(s3: FaultProxy) -> None:
    uri = f"{s3.bucket()}/t.parquet"
    put(s3, uri)
    file = quick(uri)
    file.read_row_group(0)
    put(s3, uri, seed=1)  # of the same size
    with pytest.raises(DataError, match="replaced while it was read") as caught:
        file.read_row_group(1)
    assert caught.value.where == uri


def test_an_object_that_is_replaced_during_a_read(s3: FaultProxy) -> None:
    uri = f"{s3.bucket()}/t.parquet"
    put(s3, uri)
    file = quick(uri)
    planned = s3.fault("meanwhile", "t.parquet", action=lambda: put(s3, uri, seed=1))
    with pytest.raises(DataError, match="replaced while it was read"):
        file.read_row_group(0)
    assert planned.fired == 1


def test_what_is_no_parquet(s3: FaultProxy) -> None:
    uri = f"{s3.bucket()}/t.parquet"
    with s3.behind.open_output_stream(uri.removeprefix("s3://")) as out:
        out.write(b"no such thing" * 10)
    with pytest.raises(DataError, match="not a readable Parquet file") as caught:
        open_parquet(uri)
    assert caught.value.where == uri
    with pytest.raises(DataError, match="does not exist"):
        open_parquet(f"{uri}.gone")
