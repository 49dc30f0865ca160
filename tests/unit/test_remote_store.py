"""The remote home of artifacts: what is there is whole, what comes is right, only what is touched comes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qbrec.config import parse_config
from qbrec.errors import ConfigError, DataError
from qbrec.stages import STAGES
from qbrec.storage import remote as remote_module
from qbrec.storage import transfer
from qbrec.storage.artifact import Artifact, ArtifactStore, artifact_key
from qbrec.storage.filesystem import Patience, filesystem
from qbrec.storage.machine import host_name, machine_id
from tests.support.s3_server import FaultProxy, free_port

KEY = artifact_key("demo", config={}, seed=0, inputs={})
QUICK = Patience(connect_s=1, silence_s=1, requests=1, attempts=3, pause_s=0.02)
FILES = ("a.npy", "b.npy", "sub/c.npy", "empty.bin", "big.bin")
BIG = 20 << 20  # more than one chunk, more than one part of an upload


def store(root: Path, remote: str, **how: Any) -> ArtifactStore:
    return ArtifactStore(root, remote=remote, patience=QUICK, **how)


def build(root: Path, remote: str | None = None, *, big: int = 1000, seed: int = 0) -> Artifact:
    writer = ArtifactStore(root).writer("demo", KEY)
    writer.prepare()
    for n, name in enumerate(FILES[:3]):
        writer.save_npy(name, np.arange(10 + n) + seed)
    writer.write_bytes("empty.bin", b"")
    writer.write_bytes("big.bin", np.random.default_rng(seed).bytes(big))
    artifact = writer.commit(meta={"n": 1}, inputs={}, config={}, seed=0)
    if remote is not None:
        assert store(root, remote).publish(artifact)
    return artifact


def second(tmp_path: Path, remote: str, **how: Any) -> Artifact:
    found = store(tmp_path / "second", remote, **how).find("demo", KEY)
    assert found is not None
    return found


def nothing_whole(folder: Path) -> bool:
    """Whether a cache entry holds no file under its final name, and no part of one."""
    left = {p.name for p in folder.rglob("*") if p.is_file()}
    return left == {"manifest.json", "remote.json"}


@pytest.fixture(scope="module")
def home(s3_proxy: FaultProxy, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Artifact]:
    """A remote home with one artifact, and that artifact where it was built."""
    remote = s3_proxy.bucket()
    return remote, build(tmp_path_factory.mktemp("home"), remote)


def test_another_machine_reads_what_was_published(s3: FaultProxy, tmp_path: Path) -> None:
    remote = s3.bucket() + "/some/prefix"
    first = build(tmp_path / "first", remote, big=BIG)
    found = second(tmp_path, remote)
    assert found.path == tmp_path / "second/cache/demo" / KEY[:16]
    assert (found.fingerprint, found.meta, found.key) == (first.fingerprint, first.meta, KEY)
    for name in FILES:
        assert found.file(name).read_bytes() == first.file(name).read_bytes()
    # Whoever has the path alone, on this machine or another that shares the storage, can go on.
    again = ArtifactStore(tmp_path / "second").open(found.path)
    assert again.load_npy("sub/c.npy").tolist() == list(range(12))
    assert not store(tmp_path / "first", remote).publish(first)
    s3.reset()
    other_rank = store(tmp_path / "second", remote).find_again("demo", KEY)
    assert other_rank is not None
    assert other_rank.path == found.path
    assert s3.requests == []


def test_order_of_an_upload(s3: FaultProxy, tmp_path: Path) -> None:
    build(tmp_path, s3.bucket())
    written = [path for method, path in s3.requests if method == "PUT"]
    assert "/manifest.json" in written[-1]
    assert len(written) == len(FILES) + 1


@settings(max_examples=10)
@given(touched=st.lists(st.sampled_from(FILES), max_size=8))
def test_only_what_is_touched_comes(
    s3_proxy: FaultProxy,
    home: tuple[str, Artifact],
    tmp_path_factory: pytest.TempPathFactory,
    touched: list[str],
) -> None:
    s3_proxy.reset()
    found = second(tmp_path_factory.mktemp("subset"), home[0])
    for name in touched:
        found.file(name)
    found.verify()  # of what is here: it fetches nothing
    asked = {p for method, p in s3_proxy.requests if not p.endswith("manifest.json")}
    assert {p.split(found.fingerprint[:16] + "/")[1] for p in asked} == set(touched)
    assert len(s3_proxy.fetched()) == 1 + len({*touched} - {"empty.bin"})  # each once; of it there is nothing
    here = {p.relative_to(found.path).as_posix() for p in found.path.rglob("*") if p.is_file()}
    assert here == {"manifest.json", "remote.json", *touched}


@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "drop", "times": 2},
        {"kind": "status", "code": 500, "times": 2},
        {"kind": "status", "code": 503, "times": 2},
        {"kind": "corrupt"},
        {"kind": "stall", "seconds": 2.5},
        {"kind": "status", "code": 503, "method": "HEAD", "times": 2},
    ],
    ids=lambda f: f"{f['kind']}{f.get('code', '')}{f.get('method', '')}",
)
def test_a_download_gets_over_a_passing_fault(
    s3: FaultProxy, home: tuple[str, Artifact], tmp_path: Path, fault: dict[str, Any]
) -> None:
    remote, first = home
    planned = s3.fault(match="big.bin", **fault)
    assert second(tmp_path, remote).file("big.bin").read_bytes() == first.file("big.bin").read_bytes()
    assert planned.fired == planned.times


def test_a_cut_large_download_asks_for_the_lost_chunk_only(s3: FaultProxy, tmp_path: Path) -> None:
    remote = s3.bucket()
    first = build(tmp_path / "first", remote, big=BIG)
    planned = s3.fault("drop", "big.bin")
    assert second(tmp_path, remote).file("big.bin").read_bytes() == first.file("big.bin").read_bytes()
    assert planned.fired == 1
    assert len(s3.fetched("big.bin")) == -(-BIG // transfer.CHUNK) + 1


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"kind": "drop"}, ["cannot fetch the file", "run the same command again"]),
        ({"kind": "status", "code": 500}, ["cannot fetch the file", "try again later"]),
        ({"kind": "status", "code": 403}, ["access is denied", "credentials"]),
        ({"kind": "status", "code": 404}, ["does not exist"]),
        ({"kind": "corrupt"}, ["damaged", "expected SHA-256", "found"]),
    ],
    ids=lambda f: f"{f['kind']}{f.get('code', '')}" if isinstance(f, dict) else "",
)
def test_a_fault_that_stays_is_told(
    s3: FaultProxy, home: tuple[str, Artifact], tmp_path: Path, fault: dict[str, Any], words: list[str]
) -> None:
    remote, _ = home
    found = second(tmp_path, remote)
    planned = s3.fault(match="big.bin", times=99, **fault)
    with pytest.raises(DataError) as caught:
        found.file("big.bin")
    for word in [f"{remote}/artifacts/demo/{KEY[:16]}", "big.bin", *words]:
        assert word in str(caught.value)
    tries = {"corrupt": 2, "drop": 3}.get(fault["kind"], 3 if fault.get("code") == 500 else 1)
    assert planned.fired == tries
    assert nothing_whole(found.path)
    s3.reset()
    found.file("big.bin")  # the fault is over


@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "cut", "method": "PUT", "times": 2},
        {"kind": "status", "code": 503, "method": "POST", "times": 2},
        {"kind": "status", "code": 500, "method": "PUT", "times": 2},
    ],
    ids=lambda f: f["kind"] + f["method"],
)
def test_an_upload_gets_over_a_passing_fault(s3: FaultProxy, tmp_path: Path, fault: dict[str, Any]) -> None:
    remote = s3.bucket()
    planned = s3.fault(match="big.bin", **fault)
    first = build(tmp_path / "first", remote)
    assert planned.fired == 2
    assert second(tmp_path, remote).file("big.bin").read_bytes() == first.file("big.bin").read_bytes()


def test_an_upload_that_fails_leaves_nothing_that_exists_and_goes_on(s3: FaultProxy, tmp_path: Path) -> None:
    remote = s3.bucket()
    first = build(tmp_path / "first")
    planned = s3.fault("status", "big.bin", method="PUT", code=403, times=99)
    with pytest.raises(DataError, match="access is denied") as caught:
        store(tmp_path / "first", remote).publish(first)
    assert "big.bin" in str(caught.value)
    assert planned.fired == 1
    assert store(tmp_path / "second", remote).find("demo", KEY) is None
    s3.reset()
    assert store(tmp_path / "first", remote).publish(first)
    written = {path.split("?")[0].rpartition("/")[2] for method, path in s3.requests if method == "PUT"}
    assert {"big.bin", "manifest.json"} <= written
    assert len(written) < len(FILES) + 1  # what had arrived was not sent again
    assert second(tmp_path, remote).file("big.bin").read_bytes() == first.file("big.bin").read_bytes()


def test_an_object_that_is_too_short_is_sent_again(s3: FaultProxy, tmp_path: Path) -> None:
    remote = s3.bucket()
    first = build(tmp_path / "first")
    bucket = remote.removeprefix("s3://")
    with s3.behind.open_output_stream(
        f"{bucket}/artifacts/demo/{KEY[:16]}/{first.fingerprint[:16]}/a.npy"
    ) as out:
        out.write(b"short")
    assert store(tmp_path / "first", remote).publish(first)
    assert second(tmp_path, remote).load_npy("a.npy").tolist() == list(range(10))


@pytest.mark.parametrize("times", [1, 99])
def test_a_damaged_manifest(s3: FaultProxy, home: tuple[str, Artifact], tmp_path: Path, times: int) -> None:
    remote, _ = home
    planned = s3.fault("corrupt", "manifest.json", times=times)
    if times == 1:
        assert second(tmp_path, remote).load_npy("a.npy").tolist() == list(range(10))
    else:
        with pytest.raises(DataError, match="manifest is damaged"):
            second(tmp_path, remote)
    assert planned.fired == min(times, 2)


def test_a_local_artifact_that_is_damaged_is_not_published(s3: FaultProxy, tmp_path: Path) -> None:
    remote = s3.bucket()
    first = build(tmp_path / "first")
    (first.path / "a.npy").write_bytes(b"0" * (first.path / "a.npy").stat().st_size)
    with pytest.raises(DataError, match="damaged"):
        store(tmp_path / "first", remote).publish(ArtifactStore(tmp_path / "first").open(first.path))
    assert store(tmp_path / "second", remote).find("demo", KEY) is None


def test_an_endpoint_that_nobody_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(DataError, match="cannot be reached") as caught:
        store(tmp_path, "s3://bucket/x").prepare()
    assert "AWS_ENDPOINT_URL" in str(caught.value)


def test_a_home_is_checked_before_any_work(s3: FaultProxy, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        store(tmp_path, "s3://no-such-bucket-here").prepare()
    remote = s3.bucket()
    planned = s3.fault("status", "qbrec.json", method="PUT", code=403)
    with pytest.raises(DataError, match="access is denied"):
        store(tmp_path, remote).prepare()
    assert planned.fired == 1
    store(tmp_path, remote).prepare()
    store(tmp_path, remote).prepare()
    with s3.behind.open_output_stream(remote.removeprefix("s3://") + "/qbrec.json") as out:
        out.write(b'{"format_version": 99}')
    with pytest.raises(DataError, match="format 99"):
        store(tmp_path, remote).prepare()


@pytest.mark.parametrize("place", ["s3://", "s3:///x", "s3://key:secret@bucket/x", "ftp://x/y", "file://x"])
def test_places_that_are_none(place: str) -> None:
    with pytest.raises(ConfigError) as caught:
        filesystem(place)
    assert "secret" not in str(caught.value)


def test_two_machines_with_different_bytes_do_not_mix(s3: FaultProxy, tmp_path: Path) -> None:
    remote = s3.bucket()
    one, two = build(tmp_path / "one"), build(tmp_path / "two", seed=1)
    planned = s3.fault("status", "manifest.json", method="PUT", code=403)
    with pytest.raises(DataError):
        store(tmp_path / "one", remote).publish(one)
    assert planned.fired == 1
    assert store(tmp_path / "two", remote).publish(two)
    assert not store(tmp_path / "one", remote).publish(one)  # the first to finish stays
    found = second(tmp_path, remote)
    assert found.fingerprint == two.fingerprint
    for name in FILES:
        assert found.file(name).read_bytes() == two.file(name).read_bytes()


def test_a_cache_entry_follows_the_remote_home(s3: FaultProxy, tmp_path: Path) -> None:
    remote, other = s3.bucket(), s3.bucket()
    build(tmp_path / "one", remote)
    build(tmp_path / "two", other, seed=1)
    second(tmp_path, remote).file("a.npy")
    assert second(tmp_path, other).load_npy("a.npy")[0] == 1  # another fingerprint: nothing old is left
    assert not list((tmp_path / "second/cache").rglob("*.old"))


def test_a_complete_cache_needs_no_remote_home_and_an_incomplete_one_does(
    s3: FaultProxy, tmp_path: Path
) -> None:
    remote = s3.bucket()
    build(tmp_path / "first", remote)
    found = second(tmp_path, remote)
    found.file("a.npy")
    s3.behind.delete_dir_contents(remote.removeprefix("s3://"))
    assert store(tmp_path / "second", remote).find("demo", KEY) is None
    assert store(tmp_path / "second", remote).find_again("demo", KEY) is None
    assert not found.path.exists()
    assert store(tmp_path / "first", remote).publish(ArtifactStore(tmp_path / "first").find("demo", KEY))  # type: ignore[arg-type]
    found = second(tmp_path, remote)
    for name in FILES:
        found.file(name)
    s3.reset()
    assert second(tmp_path, remote).fingerprint == found.fingerprint
    assert s3.requests == []


def test_a_flipped_bit_in_the_cache_is_found(s3: FaultProxy, tmp_path: Path) -> None:
    remote = s3.bucket()
    build(tmp_path / "first", remote, big=3 << 20)
    path = second(tmp_path, remote).file("big.bin")
    damaged = bytearray(path.read_bytes())
    damaged[1_500_000] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(DataError, match="damaged") as caught:
        second(tmp_path, remote).verify()
    assert str(path) in str(caught.value)
    path.unlink()  # as the message says
    second(tmp_path, remote).file("big.bin")


def test_many_at_once_fetch_a_file_once(s3: FaultProxy, home: tuple[str, Artifact], tmp_path: Path) -> None:
    remote, first = home
    slow = s3.fault("slow", "big.bin", seconds=0.3)
    found = [second(tmp_path, remote) for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        paths = list(pool.map(lambda artifact: artifact.file("big.bin"), found))
    assert {p.read_bytes() for p in paths} == {first.file("big.bin").read_bytes()}
    assert slow.fired == 1
    assert len(s3.fetched("big.bin")) == 1


def test_machines_that_share_a_cache_may_fetch_the_same(
    s3: FaultProxy, home: tuple[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote, first = home
    found = [second(tmp_path, remote) for _ in range(4)]
    # A lock of one machine is not seen on the others.
    monkeypatch.setattr(remote_module, "machine_id", lambda: f"machine{threading.get_ident()}")
    slow = s3.fault("slow", "big.bin", seconds=0.3, times=4)
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda artifact: artifact.file("big.bin"), found))
    assert slow.fired == 4
    assert {p.read_bytes() for p in paths} == {first.file("big.bin").read_bytes()}
    assert not list(found[0].path.glob("*.part"))


def test_a_manifest_that_points_outside_is_refused(s3: FaultProxy, tmp_path: Path) -> None:
    remote = s3.bucket()
    manifest = dict(build(tmp_path / "first").manifest)
    manifest["files"] = {"../../../../stolen": {"size": 1, "sha256": "0" * 64}}
    with s3.behind.open_output_stream(
        f"{remote.removeprefix('s3://')}/artifacts/demo/{KEY[:16]}/manifest.json"
    ) as out:
        out.write(remote_module._sealed(manifest))
    with pytest.raises(DataError, match="manifest is damaged"):
        second(tmp_path, remote)


def test_the_place_is_not_part_of_a_key() -> None:
    keys, shop = set(), {"items": "items", "interactions": "interactions"}
    for place in (None, "s3://bucket", "gs://bucket/prefix", "file:///mnt/share"):
        config = parse_config({"run": {"remote": place}, "data": {"domains": {"shop": shop}}})
        keys |= {stage.key(config, inputs={}, sources="x") for stage in STAGES.values() if not stage.inputs}
    assert len(keys) == 1
    for place in ("bucket", "s3://", "s3:///x", "s3://key@bucket", "file://x", "https://bucket"):
        with pytest.raises(ConfigError, match="remote"):
            parse_config({"run": {"remote": place}})


def test_progress_of_large_transfers(s3: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "SHOWN_BYTES", 1 << 20)
    meters: list[Any] = []

    class Meter:
        def __init__(self, total: int, label: str) -> None:
            self.total, self.label, self.done, self.closed = total, label, 0, False
            meters.append(self)

        def update(self, n: int = 1, /) -> None:
            self.done += n

        def close(self) -> None:
            self.closed = True

    remote = s3.bucket()
    first = build(tmp_path / "first", big=BIG)
    planned = s3.fault("cut", "big.bin", method="PUT")  # what a failed attempt sent is taken back
    assert store(tmp_path / "first", remote, progress=Meter).publish(first)
    found = second(tmp_path, remote, progress=Meter)
    found.file("a.npy")
    found.file("big.bin")
    assert planned.fired == 1
    assert [m.label.split(",")[0] for m in meters] == ["uploading demo", "fetching big.bin"]
    assert [m.done for m in meters] == [m.total for m in meters]
    assert all(m.closed for m in meters)
    assert meters[1].total == BIG


def test_a_folder_as_the_remote_home(tmp_path: Path) -> None:
    remote = f"file://{tmp_path}/shared home/50%"
    store(tmp_path / "first", remote).prepare()
    first = build(tmp_path / "first", remote)
    found = second(tmp_path, remote)
    assert found.file("sub/c.npy").read_bytes() == first.file("sub/c.npy").read_bytes()
    there = {p.name for p in (tmp_path / "shared home").rglob("*") if p.is_file()}
    assert there == {"qbrec.json", "manifest.json", "a.npy", "b.npy", "c.npy", "empty.bin", "big.bin"}


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.unit.test_remote_store import *
work, place, remote = sys.argv[1:]
if work == "upload":
    store(Path(place), remote).publish(ArtifactStore(place).find("demo", KEY))
else:
    store(Path(place), remote).find("demo", KEY).file("big.bin")
"""


def kill_when(fired: Callable[[], bool], *arguments: str) -> None:
    """Start the program above and kill it once the fault has fired."""
    code = KILLED.format(root=str(Path(__file__).parents[2]))
    process = subprocess.Popen([sys.executable, "-c", code, *arguments])
    try:
        until = time.monotonic() + 60
        while not fired() and time.monotonic() < until:
            time.sleep(0.02)
        time.sleep(0.2)
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


def test_killed_half_way_through_an_upload(s3: FaultProxy, tmp_path: Path) -> None:
    remote = s3.bucket()
    first = build(tmp_path / "first", big=BIG)
    planned = s3.fault("slow", "big.bin", method="PUT", skip=1, seconds=30)
    kill_when(lambda: planned.fired > 0, "upload", str(tmp_path / "first"), remote)
    assert planned.fired == 1
    assert store(tmp_path / "second", remote).find("demo", KEY) is None
    assert not [i for i in s3.behind.get_file_info(_all(remote)) if i.path.endswith("big.bin")]
    assert store(tmp_path / "first", remote).publish(first)
    assert second(tmp_path, remote).file("big.bin").read_bytes() == first.file("big.bin").read_bytes()


def test_killed_half_way_through_a_download(s3: FaultProxy, tmp_path: Path) -> None:
    remote = s3.bucket()
    first = build(tmp_path / "first", remote, big=6 * transfer.CHUNK)
    planned = s3.fault("slow", "big.bin", skip=3, seconds=30)
    kill_when(lambda: planned.fired > 0, "download", str(tmp_path / "second"), remote)
    assert planned.fired == 1
    entry = tmp_path / "second/cache/demo" / KEY[:16]
    (part,) = entry.glob("big.bin.*")
    assert part.name == f"big.bin.{machine_id()}.part"
    assert part.stat().st_size < 6 * transfer.CHUNK
    assert not (entry / "big.bin").exists()
    store(tmp_path / "second", remote).prepare()  # the next run begins with this
    assert nothing_whole(entry)
    s3.reset()
    assert second(tmp_path, remote).file("big.bin").read_bytes() == first.file("big.bin").read_bytes()
    assert not list(entry.glob("*.part"))


def test_what_dead_processes_left_is_removed_and_what_lives_is_not(
    s3: FaultProxy, home: tuple[str, Artifact], tmp_path: Path
) -> None:
    remote, _ = home
    found = second(tmp_path, remote)
    root, dead = tmp_path / "second", _dead_process()
    other = found.path / "x.bin.0123456789ab.part"  # of another machine, just now
    other.write_bytes(b"1")
    kept, gone = [], []
    for kind in ("artifacts", "cache"):
        for name, keep in [
            (f"{KEY[:16]}.{host_name()}.{dead}.old", False),
            (f"{KEY[:16]}.{host_name()}.{os.getpid()}.old", True),
            (f"{KEY[:16]}.another-host.{dead}.old", True),
        ]:
            folder = root / kind / "demo" / name
            (folder / "sub").mkdir(parents=True)
            (folder / "sub" / "file").write_bytes(b"1")
            (kept if keep else gone).append(folder)
    slow = s3.fault("slow", "big.bin", seconds=0.6)
    thread = threading.Thread(target=found.file, args=("big.bin",))
    thread.start()
    while not slow.fired:
        time.sleep(0.01)
    store(root, remote).prepare()
    (part,) = found.path.glob(f"big.bin.{machine_id()}.part")  # its process lives
    thread.join()
    assert not part.exists()
    assert (found.path / "big.bin").is_file()
    assert other.exists()
    assert all(folder.exists() for folder in kept)
    assert not any(folder.exists() for folder in gone)


def _dead_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def _all(remote: str) -> Any:
    import pyarrow.fs as pafs

    return pafs.FileSelector(remote.removeprefix("s3://"), recursive=True)


def test_a_damaged_note_of_the_source(s3: FaultProxy, home: tuple[str, Artifact], tmp_path: Path) -> None:
    remote, _ = home
    path = second(tmp_path, remote).path
    (path / "remote.json").write_text(json.dumps([]))
    with pytest.raises(DataError, match="comes from is damaged"):
        ArtifactStore(tmp_path / "second").open(path)


def test_credentials_that_have_expired(s3: FaultProxy, home: tuple[str, Artifact], tmp_path: Path) -> None:
    found = second(tmp_path, home[0])
    planned = s3.fault("status", "big.bin", method="HEAD", code=400, times=99)
    with pytest.raises(DataError, match="access is denied"):
        found.file("big.bin")
    assert planned.fired == 1
