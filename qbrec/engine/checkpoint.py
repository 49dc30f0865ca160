"""Checkpoints: artifacts independent of world size and ZeRO stage, the last good one always whole.

`<run>/checkpoints/<stage>/step-N/{weights.safetensors, moments.safetensors, manifest.json}`; loader position,
best result and curve are in the manifest's `meta`. Nothing here is unpickled.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qbrec.engine.context import StageContext
from qbrec.errors import CheckpointError, DataError
from qbrec.storage.artifact import MANIFEST, Artifact, ArtifactStore, ArtifactWriter


@dataclass(frozen=True)
class Checkpoint:
    """What a training loop goes on from."""

    step: int
    weights: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]
    meta: dict[str, Any]


def save_checkpoint(
    ctx: StageContext,
    *,
    step: int,
    weights: dict[str, torch.Tensor],
    moments: dict[str, torch.Tensor],
    meta: dict[str, Any],
    keep: int,
    best_step: int | None,
) -> None:
    """Write `step-N` and drop old ones, except the best. Called on every rank; rank 0 writes."""
    if ctx.is_main:
        ctx.check_owner()
        writer = ArtifactWriter(ctx.checkpoint_dir / f"step-{step}", kind="checkpoint", key=ctx.key)
        if not (writer.path / MANIFEST).exists():  # a step is deterministic: what is there is the same
            writer.prepare()
            writer.save_safetensors("weights.safetensors", weights)
            writer.save_safetensors("moments.safetensors", moments)
            writer.commit(meta={**meta, "step": step}, inputs={}, config={}, seed=ctx.seed)
        finished = [n for n in _steps(ctx.checkpoint_dir) if n != best_step]
        for old in finished[: max(len(finished) - keep, 0)]:
            shutil.rmtree(ctx.checkpoint_dir / f"step-{old}")
    ctx.barrier()


def load_latest(ctx: StageContext) -> Checkpoint | None:
    """The newest checkpoint that is whole and belongs to this stage's key, or None to start afresh.

    Raises:
        CheckpointError: Checkpoints exist and every one of them is damaged.
    """
    damaged: list[str] = []
    for step in reversed(_steps(ctx.checkpoint_dir)):
        path = ctx.checkpoint_dir / f"step-{step}"
        try:
            artifact = ArtifactStore(ctx.store.root).open(path)
            if artifact.key != ctx.key:
                continue  # left by an earlier configuration of this run
            return _read(artifact, step)
        except DataError as error:
            damaged.append(str(error))
    if damaged:
        raise CheckpointError(
            f"no usable checkpoint: {damaged[0]}",
            where=str(ctx.checkpoint_dir),
            fix="delete that folder to train this stage from its start",
        )
    return None


def load_weights(ctx: StageContext, step: int) -> dict[str, torch.Tensor]:
    """Only the weights of one checkpoint."""
    return (
        ArtifactStore(ctx.store.root)
        .open(ctx.checkpoint_dir / f"step-{step}")
        .load_safetensors("weights.safetensors")
    )


def _read(artifact: Artifact, step: int) -> Checkpoint:
    return Checkpoint(
        step=step,
        weights=artifact.load_safetensors("weights.safetensors"),
        moments=artifact.load_safetensors("moments.safetensors"),
        meta=artifact.meta,
    )


def _steps(directory: Path) -> list[int]:
    found = [int(p.parent.name.removeprefix("step-")) for p in directory.glob(f"step-*/{MANIFEST}")]
    return sorted(found)
