"""What all importers share: filters, hashes, streams, addresses, commit, command line."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qbrec.catalog.importers import filters, http_bytes, source
from qbrec.catalog.importers import run as run_module
from qbrec.catalog.importers.amazon_2018 import amazon_2018
from qbrec.catalog.importers.ids import HashSet, hash_ids
from qbrec.catalog.importers.records import MAX_LITERAL, decode
from qbrec.catalog.importers.values import integer, number, price, text
from qbrec.errors import ConfigError, DataError
from qbrec.storage.ahead import ahead
from tests.support.cli import environment
from tests.support.import_files import (
    Faults,
    flaky_server,
    interactions_of,
    items_of,
    review_2018,
    run,
    write_lines,
)

EDGES = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8), st.integers(0, 5)), max_size=80)


def spooled(folder: Path, edges: list[tuple[int, int, int]]) -> filters.Spool:
    """A spool of (user, item, time), handed over in two parts."""
    spool = filters.Spool(folder)
    for part in (edges[: len(edges) // 3], edges[len(edges) // 3 :]):
        columns = np.array(part, dtype=np.int64).reshape(-1, 3)
        user, item = (
            hash_ids(pa.array([f"u{u}" for u in columns[:, 0]])),
            hash_ids(pa.array([f"i{i}" for i in columns[:, 1]])),
        )
        spool.append(user=user, item=item, time=columns[:, 2])
    spool.close()
    return spool


def core_of(edges: list[tuple[int, int, int]], k: int) -> list[bool]:
    keep = [True] * len(edges)
    while True:
        users = Counter(u for (u, _, _), fine in zip(edges, keep, strict=True) if fine)
        items = Counter(i for (_, i, _), fine in zip(edges, keep, strict=True) if fine)
        again = [
            fine and users[u] >= k and items[i] >= k for (u, i, _), fine in zip(edges, keep, strict=True)
        ]
        if again == keep:
            return keep
        keep = again


@given(edges=EDGES, k=st.integers(1, 4), chunk=st.sampled_from([3, 1 << 22]))
def test_core_is_that_of_brute_force(
    tmp_path_factory: pytest.TempPathFactory, edges: list[tuple[int, int, int]], k: int, chunk: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filters, "CHUNK", chunk)
        spool = spooled(tmp_path_factory.mktemp("core"), edges)
        keep = filters.new_mask(spool)
        dropped = filters.keep_core(spool, keep, k=k)
    assert list(keep) == core_of(edges, k)
    assert dropped == len(edges) - sum(keep)


@given(edges=EDGES, bucket=st.sampled_from([4, 1 << 21]), chunk=st.sampled_from([5, 1 << 22]))
def test_the_earliest_of_repeats_stays(
    tmp_path_factory: pytest.TempPathFactory, edges: list[tuple[int, int, int]], bucket: int, chunk: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filters, "CHUNK", chunk)
        patch.setattr(filters, "_BUCKET", bucket)
        spool = spooled(tmp_path_factory.mktemp("repeats"), edges)
        keep = filters.new_mask(spool)
        dropped = filters.drop_repeats(spool, keep)
    earliest: dict[tuple[int, int], int] = {}
    for row, (user, item, when) in enumerate(edges):
        best = earliest.setdefault((user, item), row)
        if when < edges[best][2]:
            earliest[user, item] = row
    assert np.flatnonzero(keep).tolist() == sorted(earliest.values())
    assert dropped == len(edges) - len(earliest)


def test_filters_reach_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "_BATCH_ROWS", 64)
    monkeypatch.setattr(source, "BLOCK_BYTES", 1 << 12)
    rng = random.Random(3)
    rows = [(rng.randrange(60), rng.randrange(40), rng.randrange(1000)) for _ in range(600)]
    reviews = write_lines(tmp_path / "r.json.gz", [review_2018(f"u{u}", f"i{i}", t) for u, i, t in rows])
    metadata = write_lines(tmp_path / "m.json.gz", [{"asin": f"i{i}", "title": f"t{i}"} for i in range(50)])
    earliest: dict[tuple[int, int], int] = {}
    for user, item, when in rows:
        earliest[user, item] = min(when, earliest.get((user, item), when))
    unique = [(user, item, when) for (user, item), when in earliest.items()]
    fine = core_of(unique, 6)
    expected = [edge for edge, stays in zip(unique, fine, strict=True) if stays]
    assert 0 < len(expected) < len(unique)
    dataset = amazon_2018(reviews=[reviews], metadata=[metadata])
    summary = run(dataset, tmp_path / "out", core=6, repeats="earliest")
    assert interactions_of(summary) == sorted((f"u{u}", f"i{i}", t * 10**6) for u, i, t in expected)
    assert set(items_of(summary)) == {f"i{i}" for _, i, _ in expected}
    assert summary.record["left_out"]["interactions: repeat of user and item"] == len(rows) - len(unique)
    assert summary.record["left_out"]["interactions: below the 6-core"] == len(unique) - len(expected)
    with pytest.raises(DataError, match="not one interaction is left"):
        run(dataset, tmp_path / "none", core=1000)
    assert list((tmp_path / "none").iterdir()) == []


@settings(max_examples=40)
@given(ids=st.lists(st.text(max_size=40), max_size=30), cut=st.integers(0, 5))
def test_hashes_tell_ids_apart_wherever_they_stand(ids: list[str], cut: int) -> None:
    ids = [name for name in ids if name.isascii() or "\ud800" not in name]
    hashes = hash_ids(pa.chunked_array([pa.array(ids, pa.string())]))
    assert len(set(hashes.tolist())) == len(set(ids))
    assert np.array_equal(hash_ids(pa.array(ids, pa.string()).slice(cut)), hashes[cut:])
    # The bytes behind an id are not part of it.
    assert [int(hash_ids(pa.array([name, "tail"]))[0]) for name in ids] == hashes.tolist()


def test_many_hashes_do_not_collide() -> None:
    assert len(np.unique(hash_ids(pa.array([f"A{n:013X}" for n in range(200_000)])))) == 200_000


@given(st.lists(st.lists(st.integers(0, 50), max_size=20), max_size=12))
def test_hash_set_against_set(batches: list[list[int]]) -> None:
    ours, plain = HashSet(), set[int]()
    for turn, batch in enumerate(batches):
        if turn % 3 == 2:
            ours.update(np.array(batch, dtype=np.uint64))
            plain.update(batch)
            continue
        fresh = ours.add(np.array(batch, dtype=np.uint64))
        for value, is_new in zip(batch, fresh, strict=True):
            assert is_new == (value not in plain)
            plain.add(value)
        assert len(ours) == len(plain)
    assert ours.sorted().tolist() == sorted(plain)
    assert ours.contains(np.arange(60, dtype=np.uint64)).tolist() == [n in plain for n in range(60)]


def test_values_that_do_not_fit_are_none() -> None:
    assert [integer(v) for v in (7, "7", "-7.0", 7.0, 7.5, "x", True, None, 2**63, 1e300, [7])] == [
        7, 7, -7, 7, None, None, None, None, None, None, None
    ]  # fmt: skip
    assert [number(v) for v in (1, "2.5", "nan", float("inf"), True, {}, 10**400)] == [
        1.0, 2.5, None, None, None, None, None
    ]  # fmt: skip
    prices = ("$12.99", "1,299", "$5 - $10", ".a-box{width:5px}", "", "7up", 3, None)
    assert [price(v) for v in prices] == [12.99, 1299.0, 5.0, None, None, None, 3.0, None]
    assert text("a\ud800b", clean=False) == "a?b"
    assert text("1 < 2 &amp; 3 > 2 &lt;br&gt; <!-- x --> y", clean=True) == "1 < 2 & 3 > 2 y"


def test_python_literals_are_read_and_nothing_else_is_run() -> None:
    assert decode(b"{'a': 'it\\'s', 'b': None, 'c': [1.5, True]}\r") == {
        "a": "it's",
        "b": None,
        "c": [1.5, True],
    }
    for line in (
        b"{'a': open('x')}",
        b"{'a': 1}; x",
        b"{1: [}",
        b"{**{}}",
        b"{[]: 1}",
        b"\x00",
        b"[" * 100_000,
    ):
        assert decode(line) is None
    assert decode(b"{'a': '" + b"x" * MAX_LITERAL + b"'}") is None
    assert decode(b"{" + b"'a': {" * 50_000) is None


def test_damaged_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = gzip.compress(
        b"".join(json.dumps(review_2018(f"u{i}", "B", i)).encode() + b"\n" for i in range(900))
    )
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    for name, content in (("cut", whole[:-9]), ("flipped", bytes(flipped)), ("tail", whole + b"garbage")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match="cut off or damaged"):
            run(amazon_2018(reviews=[str(tmp_path / name)]), tmp_path / "out")
        assert list((tmp_path / "out").iterdir()) == []
    (tmp_path / "twice").write_bytes(whole + whole)
    assert run(amazon_2018(reviews=[str(tmp_path / "twice")]), tmp_path / "out").record["read"] == {
        "interactions": 1800
    }
    monkeypatch.setattr(source, "BLOCK_BYTES", 1 << 10)
    monkeypatch.setattr(source, "LONGEST_LINE", 1 << 14)
    (tmp_path / "long").write_bytes(b"x" * (1 << 16))
    with pytest.raises(DataError, match="a line is longer"):
        run(amazon_2018(reviews=[str(tmp_path / "long")]), tmp_path / "long_out")


def test_reading_ahead_hands_errors_over_and_stops_when_left() -> None:
    closed = []

    def numbers() -> Generator[int, None, None]:
        try:
            yield from range(100)
            raise DataError("the end")
        finally:
            closed.append(True)

    seen: list[int] = []
    with pytest.raises(DataError, match="the end"):
        seen.extend(ahead(numbers()))
    assert seen == list(range(100))
    left = ahead(numbers())
    assert next(left) == 0
    left.close()  # type: ignore[attr-defined]
    assert closed == [True, True]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries without their pauses."""
    monkeypatch.setattr(http_bytes, "_pause", lambda _: None)


LINES = [review_2018(f"user{i % 50}", f"item{i % 31}", 1_400_000_000 + i) for i in range(3000)]


@pytest.mark.usefixtures("quick")
def test_an_address_is_read_on_where_the_connection_broke(tmp_path: Path) -> None:
    local = write_lines(tmp_path / "r.json.gz", LINES)
    expected = interactions_of(run(amazon_2018(reviews=[local]), tmp_path / "local"))
    data = Path(local).read_bytes()
    faults = Faults({"r.json.gz": data}, cut_after=len(data) // 4, cuts=4)
    with flaky_server(faults) as address:
        dataset = amazon_2018(reviews=[f"{address}/r.json.gz"])
        faults.seen.clear()
        faults.cuts, faults.errors = 3, 2
        summary = run(dataset, tmp_path / "remote")
    assert faults.cuts == faults.errors == 0
    step = len(data) // 4
    assert faults.seen == [None, None, None, *(f"bytes={step * n}-" for n in (1, 2, 3))]
    assert interactions_of(summary) == expected
    assert summary.record["sources"] == [
        {"what": "interactions", "place": f"{address}/r.json.gz", "bytes": len(data)}
    ]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"ranges": False, "cuts": 1}, "cannot go on in the middle"),
        ({"etag_after_cut": '"two"', "cuts": 1}, "cannot go on in the middle"),
        ({"errors": 100}, "503"),
        ({"cuts": 1000, "cut_after": 0}, "the connection ended after 0 of"),
    ],
)
def test_a_server_that_fails_for_good_is_an_error(
    tmp_path: Path, fault: dict[str, object], message: str
) -> None:
    data = Path(write_lines(tmp_path / "r.json.gz", LINES)).read_bytes()
    faults = Faults({"r.json.gz": data})
    with flaky_server(faults) as address:
        dataset = amazon_2018(reviews=[f"{address}/r.json.gz"])
        faults.cut_after = len(data) // 2
        for name, value in fault.items():
            setattr(faults, name, value)
        with pytest.raises(DataError, match=message):
            run(dataset, tmp_path / "out")
        faults.errors = faults.cuts = 0
        with pytest.raises(DataError, match="404"):
            amazon_2018(reviews=[f"{address}/nothing"])
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(DataError, match="cannot be reached"):
        amazon_2018(reviews=["http://127.0.0.1:9/r.json.gz"])


def test_a_finished_import_is_replaced_on_request_only(tmp_path: Path) -> None:
    first = write_lines(tmp_path / "a.json", [review_2018("u", "a", 1)])
    second = write_lines(tmp_path / "b.json", [review_2018("u", "b", 1), review_2018("u", "c", 1)])
    out = tmp_path / "out"
    run(amazon_2018(reviews=[first]), out)
    with pytest.raises(ConfigError, match="holds a finished import"):
        run(amazon_2018(reviews=[second]), out)
    # One that fails leaves the old one alone.
    with pytest.raises(DataError, match="not one interaction"):
        run(amazon_2018(reviews=[second]), out, force=True, min_rating=6)
    assert set(pq.read_table(out / "items.parquet")["item_id"].to_pylist()) == {"a"}
    assert set(items_of(run(amazon_2018(reviews=[second]), out, force=True))) == {"b", "c"}
    (out / "import.json").unlink()
    with pytest.raises(ConfigError, match=r"holds items\.parquet, but no finished import"):
        run(amazon_2018(reviews=[second]), out)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot write here"):
        run(amazon_2018(reviews=[second]), tmp_path / "file" / "below")


def qbrec(*args: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "qbrec", "import", *map(str, args)]
    return subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_import_leaves_nothing_that_looks_whole(tmp_path: Path, sent: signal.Signals) -> None:
    lines = write_lines(tmp_path / "r.json", LINES * 10)
    pipe = tmp_path / "pipe.json"
    os.mkfifo(pipe)
    out = tmp_path / "out"
    process = qbrec("amazon-2018", "--reviews", pipe, "--core", 2, "--out", out)
    with open(pipe, "wb", buffering=0) as file:
        file.write(Path(lines).read_bytes())
        # It is in the middle now, waiting for more, and stays there.
        deadline = time.monotonic() + 60
        while not (out / ".import.tmp" / "unfiltered.parquet").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        rival = qbrec("amazon-2018", "--reviews", lines, "--out", out)
        assert "another import is writing here" in rival.communicate(timeout=60)[1]
        assert rival.returncode == 3
        process.send_signal(sent)
        if sent == signal.SIGINT:
            time.sleep(0.2)
    process.communicate(timeout=60)
    assert process.returncode == (-9 if sent == signal.SIGKILL else 130)
    assert {path.name for path in out.iterdir()} <= {".import.tmp"}
    assert (sent == signal.SIGINT) == (list(out.iterdir()) == [])
    again = qbrec("amazon-2018", "--reviews", lines, "--out", out)
    printed, errors = again.communicate(timeout=60)
    assert again.returncode == 0, errors
    assert f"{len(LINES) * 10:,}" in printed
    assert json.loads((out / "import.json").read_text())["written"]["interactions"] == len(LINES) * 10


def test_the_command_line(tmp_path: Path) -> None:
    """Every option of every format arrives; the next command is printed."""
    from click.testing import CliRunner

    from qbrec.cli.main import cli

    def call(*args: object, fails: str | None = None) -> str:
        result = CliRunner().invoke(cli, ["import", *map(str, args)])
        if fails is not None:
            assert fails in f"{result.exception} {result.output}"
            return ""
        assert result.exit_code == 0, (result.output, result.exception)
        return result.output

    reviews = write_lines(tmp_path / "r.json.gz", [review_2018("u", "B1", 1), review_2018("u", "B2", 1, 2.0)])
    meta = write_lines(
        tmp_path / "m.json.gz",
        [{"asin": "B1", "title": "a &amp; b", "imageURL": ["https://pictures.example.com/a.jpg"],
          "also_buy": ["B2"]}, {"asin": "B3"}],
    )  # fmt: skip
    out = tmp_path / "out"
    amazon = ("amazon-2018", "--reviews", reviews, "--meta", meta, "--out", out)
    printed = call(
        *amazon, "--min-rating", 3, "--repeats", "earliest", "--core", 1, "--all-items", "--also-buy"
    )
    assert "catalog.image.hosts=[pictures.example.com]" in printed
    assert "interactions: rating below 3" in printed
    bare = call("amazon-2018", "--reviews", reviews, "--out", tmp_path / "bare")
    assert "nothing but ids" in bare
    options = json.loads((out / "import.json").read_text())["options"]
    assert options == {
        "images": True, "keep_html": False, "also_buy": True, "min_rating": 3.0, "core": 1,
        "repeats": "earliest", "all_items": True,
    }  # fmt: skip
    call(*amazon, fails="finished import")
    call(*amazon, "--force", "--no-images", "--keep-html")
    assert items_of_file(out)["B1"]["title"] == "a &amp; b"

    lines = write_lines(tmp_path / "c.txt", ["u|i|2020-01-01T00:00:00Z|5", "v|i|2020-01-01|1"])
    things = write_lines(tmp_path / "t.txt", ["i|Hat|A>B"])
    named = ("--user-column", 1, "--item-column", 2, "--time-column", 3, "--time-unit", "iso", "--no-header")
    csv = ("csv", "--interactions", lines, "--delimiter", "|", *named, "--out", tmp_path / "csv")
    call(*csv, "--min-rating", 2, fails="no column of ratings")
    call(*csv, "--title-column", 2, fails="columns of items are named")
    call(*csv, "--delimiter", "::", fails="is no delimiter")
    call(
        *csv, "--rating-column", 4, "--min-rating", 2, "--items", things, "--items-item-column", 1,
        "--title-column", 2, "--categories-column", 3, "--categories-separator", ">",
    )  # fmt: skip
    assert items_of_file(tmp_path / "csv") == {"i": {"title": "Hat", "categories": ["A", "B"]}}

    with zipfile.ZipFile(tmp_path / "ml.zip", "w") as archive:
        archive.writestr("ml/ratings.csv", "userId,movieId,rating,timestamp\n1,2,3,4\n")
        archive.writestr("ml/movies.csv", "movieId,title,genres\n2,A (1999),X|Y\n")
    faults = Faults({"ml.zip": (tmp_path / "ml.zip").read_bytes()})
    with flaky_server(faults) as address:
        call("movielens", f"{address}/ml.zip", "--out", tmp_path / "ml")
    assert items_of_file(tmp_path / "ml") == {
        "2": {"title": "A (1999)", "categories": ["X", "Y"], "year": 1999}
    }
    record = json.loads((tmp_path / "ml" / "import.json").read_text())
    assert record["sources"][0]["place"] == f"{address}/ml.zip:ml/ratings.csv"


def items_of_file(out: Path) -> dict[str, dict[str, object]]:
    rows = pq.read_table(out / "items.parquet").to_pylist()
    return {row.pop("item_id"): row for row in rows}
