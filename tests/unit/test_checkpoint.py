"""Checkpoints: the newest whole one is found, damage is passed over or said, retention keeps the best."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from qbrec.engine.checkpoint import Checkpoints, Snapshot
from qbrec.engine.context import StageContext
from qbrec.errors import CheckpointError
from qbrec.storage.artifact import ArtifactStore


@pytest.fixture
def ctx(tmp_path: Path) -> StageContext:
    return StageContext.local(ArtifactStore(tmp_path), tmp_path / "run", stage="toy", key="k" * 64)


def _save(
    ctx: StageContext, step: int, *, keep: int = 9, keep_every: int = 0, best_step: int | None = None
) -> None:
    snapshot = Snapshot(
        step=step,
        weights={"w": torch.full((3,), float(step))},
        moments={"exp_avg.w": torch.zeros(3), "exp_avg_sq.w": torch.ones(3)},
        meta={"finished": False, "best_step": best_step, "waited": 0, "curve": []},
    )
    Checkpoints(ctx, keep=keep, keep_every=keep_every).save(snapshot, best_step=best_step)


def load_latest(ctx: StageContext) -> Snapshot | None:
    return Checkpoints(ctx, keep=9).load_latest()


def _damage(ctx: StageContext, step: int) -> None:
    path = ctx.checkpoint_dir / f"step-{step}" / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")


def test_the_newest_whole_one_is_loaded(ctx: StageContext) -> None:
    assert load_latest(ctx) is None
    for step in (2, 9, 10):
        _save(ctx, step)
    found = load_latest(ctx)
    assert found is not None
    assert (found.step, found.weights["w"].tolist(), found.meta["step"]) == (10, [10.0] * 3, 10)


def test_one_without_a_manifest_does_not_exist(ctx: StageContext) -> None:
    _save(ctx, 1)
    _save(ctx, 2)
    (ctx.checkpoint_dir / "step-2" / "manifest.json").unlink()  # what a kill while writing leaves
    found = load_latest(ctx)
    assert found is not None
    assert found.step == 1
    _save(ctx, 2)  # the next attempt at that step writes it anew
    assert load_latest(ctx).step == 2  # type: ignore[union-attr]


def test_a_damaged_one_is_passed_over_and_all_damaged_is_said(ctx: StageContext) -> None:
    _save(ctx, 1)
    _save(ctx, 2)
    _damage(ctx, 2)
    assert load_latest(ctx).step == 1  # type: ignore[union-attr]
    _damage(ctx, 1)
    with pytest.raises(CheckpointError, match=r"step-2/weights\.safetensors") as caught:
        load_latest(ctx)
    assert caught.value.exit_code == 4


def test_one_of_another_configuration_is_not_taken(ctx: StageContext) -> None:
    _save(ctx, 5)
    assert load_latest(dataclasses.replace(ctx, key="x" * 64)) is None


def test_retention_keeps_the_last_and_the_best(ctx: StageContext) -> None:
    for step in range(1, 7):
        _save(ctx, step, keep=2, best_step=2 if step >= 2 else None)
    kept = sorted(p.name for p in ctx.checkpoint_dir.iterdir())
    assert kept == ["step-2", "step-5", "step-6"]


def test_retention_keeps_multiples_for_good(ctx: StageContext) -> None:
    for step in range(1, 10):
        _save(ctx, step, keep=1, keep_every=4)
    assert sorted(p.name for p in ctx.checkpoint_dir.iterdir()) == ["step-4", "step-8", "step-9"]


def test_what_is_no_checkpoint_is_left_alone(ctx: StageContext) -> None:
    ctx.checkpoint_dir.mkdir(parents=True)
    (ctx.checkpoint_dir / "behaviour-0123.npy").write_bytes(b"features")
    for step in range(1, 30):
        _save(ctx, step, keep=1)
    assert sorted(p.name for p in ctx.checkpoint_dir.iterdir()) == ["behaviour-0123.npy", "step-29"]


def test_damaged_later_ones_do_not_push_out_what_is_saved(ctx: StageContext) -> None:
    _save(ctx, 100)
    _save(ctx, 200)
    _damage(ctx, 200)
    _save(ctx, 150, keep=1)
    found = load_latest(ctx)
    assert found is not None
    assert found.step == 150
    assert sorted(p.name for p in ctx.checkpoint_dir.iterdir()) == ["step-150"]
