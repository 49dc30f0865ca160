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


def _snapshot(step: int, best_step: int | None = None) -> Snapshot:
    weights = {"w": torch.full((5,), float(step))}
    return Snapshot(step, weights, {"exp_avg.w": torch.ones(5)}, {"finished": False, "best_step": best_step})


def _save(ctx: StageContext, *steps: int, best_step: int | None = None) -> Checkpoints:
    checkpoints = Checkpoints(ctx, keep=2)
    for step in steps:
        checkpoints.save(_snapshot(step, best_step), best_step=best_step)
    checkpoints.close(wait=True)
    return checkpoints


def _load(ctx: StageContext) -> Snapshot | None:
    checkpoints = Checkpoints(ctx, keep=2)
    try:
        return checkpoints.load_latest()
    finally:
        checkpoints.close(wait=True)


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

    def slow(self: remote_checkpoints.RemoteCheckpoints, paths: tuple[Path, ...]) -> None:
        begun.set()
        assert may_go.wait(30)
        upload(self, paths)

    monkeypatch.setattr(remote_checkpoints.RemoteCheckpoints, "_upload", slow)
    ctx = _context(tmp_path, remote)
    checkpoints = Checkpoints(ctx, keep=1)
    checkpoints.save(_snapshot(1), best_step=None)
    assert begun.wait(30)
    for step in (2, 3, 4):
        checkpoints.save(_snapshot(step), best_step=None)
    assert sorted(p.name for p in ctx.checkpoint_dir.iterdir()) == ["step-1", "step-4"]
    may_go.set()
    checkpoints.close(wait=True)
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
    assert "no copy of a checkpoint in the remote home" in capsys.readouterr().err


def test_a_damaged_copy_is_refused(tmp_path: Path) -> None:
    home = tmp_path / "home"
    _save(_context(tmp_path / "a", f"file://{home}"), 4)
    (weights,) = home.rglob("weights.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    with pytest.raises(DataError, match="damaged"):
        _load(_context(tmp_path / "b", f"file://{home}"))


def test_the_best_travels_with_the_newest(s3: FaultProxy, tmp_path: Path) -> None:
    remote = s3.bucket()
    for step in (2, 3, 4, 5):
        _save(_context(tmp_path / "lost", remote), step, best_step=2)
    ctx = _context(tmp_path / "new", remote)
    checkpoints = Checkpoints(ctx, keep=2)
    found = checkpoints.load_latest()
    assert found is not None
    assert (found.step, found.meta["best_step"]) == (5, 2)
    assert checkpoints.load_weights(2)["w"].tolist() == [2.0] * 5
    assert checkpoints.steps() == [2, 5]
    checkpoints.close(wait=True)


def test_a_home_that_is_away_is_no_reason_to_forget_what_is_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "home"
    ctx = _context(tmp_path / "a", f"file://{home}")
    _save(dataclasses.replace(ctx, remote=None), 3)
    _save(_context(tmp_path / "b", f"file://{home}"), 9)
    (weights,) = home.rglob("weights.safetensors")
    weights.write_bytes(b"")
    found = _load(ctx)
    assert found is not None
    assert found.step == 3
    assert "no checkpoint was fetched" in capsys.readouterr().err


def test_copies_of_a_finished_stage_are_removed(tmp_path: Path) -> None:
    remote = f"file://{tmp_path / 'home'}"
    _save(_context(tmp_path / "a", remote), 3)
    assert remote_checkpoints.has_copies(remote, run="mine")
    remote_checkpoints.forget_copies(remote, run="mine", stage="toy")
    assert not remote_checkpoints.has_copies(remote, run="mine")
