"""A checkpoint that finds no room: the file and what to do are named, and with room the run goes on."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fault.checks import assert_equal_end, checkpoint_dir, repeated_steps, whole_checkpoints
from tests.fault.processes import attempt, must
from tests.fault.stage import write_order
from tests.support.cli import ROOT, environment
from tests.support.faults import FULL, RENAME, SYNC, WRITE, Fault, plan, struck

FILES = {
    "weights": Fault(WRITE, FULL, step=9, file="weights.safetensors"),
    "moments": Fault(SYNC, FULL, step=9, file="moments.safetensors"),
    "rows": Fault(WRITE, FULL, step=9, file="rows-000000000021.safetensors"),
    "manifest": Fault(WRITE, FULL, step=9, file="manifest.json"),
    "manifest-at-its-rename": Fault(RENAME, FULL, step=9, file="manifest.json"),
    "metrics": Fault(WRITE, FULL, file="metrics.jsonl"),
    "result": Fault(WRITE, FULL, file="artifacts/toy/*/weights.safetensors"),
}


@pytest.mark.parametrize("file", FILES)
def test_a_file_without_room_is_named(file: str, alone: Path, tmp_path: Path) -> None:
    fault = FILES[file]
    write_order(tmp_path, rows=True)
    plan(tmp_path, fault)
    codes, text = attempt(tmp_path)
    assert struck(tmp_path), "the fault did not fire"
    assert codes == [3], text
    assert "error: the disk is full\n" in text
    name = fault.file.rpartition("/")[2]
    where = rf"where: {re.escape(str(tmp_path))}\S+/{name} \([0-9.]+ of [0-9.]+ GB free\)"
    assert re.search(where, text), text
    assert "free space there or move the storage to a larger disk, then run the same command again" in text
    assert not list(tmp_path.rglob("*.tmp"))
    assert whole_checkpoints(tmp_path)[-1] == {"metrics": 3, "result": 20}.get(file, 6)
    must(tmp_path)
    assert repeated_steps(tmp_path) <= 3
    assert_equal_end(tmp_path, alone)


def test_a_rank_without_room_stops_the_other(tmp_path: Path) -> None:
    write_order(tmp_path, rows=True, launcher="torchrun")
    plan(tmp_path, Fault(WRITE, FULL, rank=1, step=9, file="rows-*"))
    codes, text = attempt(tmp_path, world=2)
    assert struck(tmp_path), "the fault did not fire"
    assert codes == [5, 3], text
    assert "the disk is full" in text
    assert whole_checkpoints(tmp_path)[-1] == 6
    must(tmp_path, world=2)
    assert repeated_steps(tmp_path) == 3


def test_a_limit_of_the_kernel(alone: Path, tmp_path: Path) -> None:
    """`ulimit -f`: the kernel itself takes the first half of the moments and refuses the rest."""
    sizes = {f.name: f.stat().st_size for f in (checkpoint_dir(alone) / "step-20").iterdir()}
    limit = (max(sizes["weights.safetensors"], sizes["manifest.json"]) + sizes["moments.safetensors"]) // 2
    write_order(tmp_path, rows=True)
    done = _drive(tmp_path, limit=limit)
    assert done.returncode == 3, done.stderr
    assert "the file would exceed the largest size that is allowed here" in done.stderr
    assert f"step-3{os.sep}moments.safetensors" in done.stderr
    assert "ulimit -f" in done.stderr
    assert whole_checkpoints(tmp_path) == []
    must(tmp_path)
    assert_equal_end(tmp_path, alone)


def test_a_file_system_that_is_really_full(alone: Path, tmp_path: Path) -> None:
    """A small tmpfs, seen by these processes only; then it is made larger."""
    if not _may_mount():
        pytest.skip("this user may not mount a tmpfs in a namespace of its own")
    script = f"""
    mkdir {tmp_path}/small && mount -t tmpfs -o size=256k none {tmp_path}/small || exit 90
    cp -r {tmp_path}/start/. {tmp_path}/small
    {sys.executable} -m tests.fault.stage {tmp_path}/small 2> {tmp_path}/error; echo $? > {tmp_path}/code
    cp -r {tmp_path}/small/. {tmp_path}/full
    mount -o remount,size=4m {tmp_path}/small || exit 91
    {sys.executable} -m tests.fault.stage {tmp_path}/small || exit 92
    cp -r {tmp_path}/small/. {tmp_path}/end
    """
    start, full, end = (tmp_path / name for name in ("start", "full", "end"))
    full.mkdir()
    end.mkdir()
    write_order(start, rows=True)
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    text = (tmp_path / "error").read_text() if (tmp_path / "error").exists() else ""
    assert done.returncode == 0, f"{done.returncode}\n{done.stderr}\n{text}"
    assert (tmp_path / "code").read_text() == "3\n", text
    assert re.search(r"error: the disk is full\n  where: \S+/step-\d+/\S+ \(0.00 of 0.00 GB free\)", text), (
        text
    )
    assert whole_checkpoints(full), "the disk was full before the first checkpoint"
    assert not list(full.rglob("*.tmp"))
    assert repeated_steps(end) <= 3
    assert_equal_end(end, alone)


def _drive(folder: Path, *, limit: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.fault.stage", str(folder)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )


def _may_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    script = "mount -t tmpfs -o size=64k none /mnt"
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script]
    return subprocess.run(command, capture_output=True).returncode == 0
