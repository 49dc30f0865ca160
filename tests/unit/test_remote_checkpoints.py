"""Copies of checkpoints in the remote home: made beside training, fetched where the machine is a new one."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import pytest
import torch

from qbrec.engine import remote_checkpoints
from qbrec.engine.checkpoint import Checkpoints, Snapshot
from qbrec.engine.context import StageContext
from qbrec.errors import DataError
from qbrec.storage.artifact import ArtifactStore
from tests.support.s3_server import FaultProxy


def _context(folder: Path, remote: str, key: str = "k") -> StageContext:
    ctx = StageContext.local(ArtifactStore(folder), folder / "runs" / "mine", stage="toy", key=key * 64)
    return dataclasses.replace(ctx, remote=remote)


def _snapshot(step: int) -> Snapshot:
    return Snapshot(
        step, {"w": torch.full((5,), float(step))}, {"exp_avg.w": torch.ones(5)}, {"finished": False}
    )


def _save(ctx: StageContext, *steps: int) -> Checkpoints:
    checkpoints = Checkpoints(ctx, keep=2)
    for step in steps:
        checkpoints.save(_snapshot(step), best_step=None)
    checkpoints.close()
    return checkpoints


def _load(ctx: StageContext) -> Snapshot | None:
    checkpoints = Checkpoints(ctx, keep=2)
    try:
        return checkpoints.load_latest()
    finally:
        checkpoints.close()


def test_a_new_machine_goes_on_from_the_copy(s3: FaultProxy, tmp_path: Path) -> None:
    remote = s3.bucket() + "/home"
    _save(_context(tmp_path / "lost", remote), 3)
    _save(_context(tmp_path / "lost", remote), 6)
    there = _context(tmp_path / "new", remote)
    found = _load(there)
    assert found is not None
    assert (found.step, found.weights["w"].tolist(), found.meta["step"]) == (6, [6.0] * 5, 6)
    assert sorted(p.name for p in there.checkpoint_dir.iterdir()) == ["step-6"]
    assert _load(_context(tmp_path / "other", remote, key="x")) is None


def test_only_the_newest_copy_stays(s3: FaultProxy, tmp_path: Path) -> None:
    remote = s3.bucket()
    for step in (1, 2, 3):
        _save(_context(tmp_path, remote), step)
    copies = remote_checkpoints.RemoteCheckpoints(remote, run="mine", stage="toy", key="k" * 64)
    assert copies.steps() == [3]


def test_what_is_newer_here_wins(s3: FaultProxy, tmp_path: Path) -> None:
    remote = s3.bucket()
    _save(_context(tmp_path / "a", remote), 5)
    ctx = _context(tmp_path / "b", remote)
    Checkpoints(dataclasses.replace(ctx, remote=None), keep=2).save(_snapshot(8), best_step=None)
    found = _load(ctx)
    assert found is not None
    assert found.step == 8


def test_training_does_not_wait_and_what_is_on_its_way_is_not_deleted(
    s3: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote, may_go, begun = s3.bucket(), threading.Event(), threading.Event()
    upload = remote_checkpoints.RemoteCheckpoints._upload

    def slow(self: remote_checkpoints.RemoteCheckpoints, path: Path) -> None:
        begun.set()
        assert may_go.wait(30)
        upload(self, path)

    monkeypatch.setattr(remote_checkpoints.RemoteCheckpoints, "_upload", slow)
    ctx = _context(tmp_path, remote)
    checkpoints = Checkpoints(ctx, keep=1)
    checkpoints.save(_snapshot(1), best_step=None)
    assert begun.wait(30)
    for step in (2, 3, 4):
        checkpoints.save(_snapshot(step), best_step=None)
    assert sorted(p.name for p in ctx.checkpoint_dir.iterdir()) == ["step-1", "step-4"]
    may_go.set()
    checkpoints.close()
    copies = remote_checkpoints.RemoteCheckpoints(remote, run="mine", stage="toy", key="k" * 64)
    assert copies.steps() == [4], "the newest that waited is copied, those between are not"


def test_a_remote_home_that_fails_costs_no_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    ctx = _context(tmp_path / "run", f"file://{blocked}/home")
    checkpoints = _save(ctx, 1, 2)
    assert checkpoints.steps() == [1, 2]
    assert "was not copied to the remote home" in capsys.readouterr().err


def test_a_damaged_copy_is_refused(tmp_path: Path) -> None:
    home = tmp_path / "home"
    _save(_context(tmp_path / "a", f"file://{home}"), 4)
    (weights,) = home.rglob("weights.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    with pytest.raises(DataError, match="damaged"):
        _load(_context(tmp_path / "b", f"file://{home}"))
