"""Checkpoints: artifacts independent of world size and ZeRO stage, the last good one always whole.

    <run>/checkpoints/<stage>/step-N/
      weights.safetensors           float32, by parameter name
      moments.safetensors           both moments of AdamW, by parameter name
      rows-<first row>.safetensors  chunks of ID rows and of their accumulators, written by their owners
      manifest.json                 last: hashes, and in `meta` the position in the data, counters, curve

Nothing here is unpickled. A directory without a manifest is what a death while writing left: it is never
read, and removed by the next writer.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qbrec.engine.context import StageContext
from qbrec.engine.remote_checkpoints import RemoteCheckpoints
from qbrec.engine.rows import ShardedRows, rows_file
from qbrec.errors import CheckpointError, DataError
from qbrec.storage.artifact import MANIFEST, Artifact, ArtifactStore, ArtifactWriter
from qbrec.storage.cache import set_aside

_PREFIX = "step-"


@dataclass(frozen=True)
class Snapshot:
    """What a training loop goes on from, besides ID rows.

    Attributes:
        step: Optimiser steps taken.
        weights: float32, by name.
        moments: float32, by moment and name.
        meta: JSON-able: position, counters, curve.
    """

    step: int
    weights: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]
    meta: Mapping[str, Any]


class Checkpoints:
    """The checkpoints of one stage of a run. All ranks hold one; `save` is collective.

    Args:
        ctx: The rank's context.
        keep: How many of the last ones stay.
        keep_every: Those at multiples of so many steps stay for good; 0: none do.
        rows: ID rows to save with the module's weights.
    """

    def __init__(
        self, ctx: StageContext, *, keep: int, keep_every: int = 0, rows: ShardedRows | None = None
    ) -> None:
        self.ctx, self.keep, self.keep_every, self.rows = ctx, keep, keep_every, rows
        self.directory = ctx.checkpoint_dir
        self._remote = None
        if ctx.remote is not None and ctx.is_main:
            self._remote = RemoteCheckpoints(ctx.remote, run=ctx.run_dir.name, stage=ctx.stage, key=ctx.key)

    def save(self, snapshot: Snapshot, *, best_step: int | None) -> None:
        """Write `step-N`, then drop old ones, except the best and the permanent ones.

        Rank 0 writes the module's state, every rank its own rows; the manifest follows when all have.
        """
        ctx, path = self.ctx, self.directory / f"{_PREFIX}{snapshot.step}"
        writer = ArtifactWriter(path, kind="checkpoint", key=ctx.key)
        # A step is deterministic: what is there and whole is the same.
        there = torch.tensor(int(ctx.is_main and self._is_own_and_whole(snapshot.step)), device=ctx.device)
        if not int(ctx.broadcast(there)):
            if ctx.is_main:
                ctx.check_owner()
                (path / MANIFEST).unlink(missing_ok=True)  # damaged, or of an earlier configuration
                writer.prepare()
            ctx.barrier()
            if self.rows is not None:
                for first, rows, accumulator in self.rows.chunks():
                    writer.save_safetensors(rows_file(first), {"rows": rows, "accumulator": accumulator})
            if ctx.is_main:
                writer.save_safetensors("weights.safetensors", snapshot.weights)
                writer.save_safetensors("moments.safetensors", snapshot.moments)
            ctx.barrier()
            if ctx.is_main:
                ctx.check_owner()
                writer.commit(
                    meta={**snapshot.meta, "step": snapshot.step}, inputs={}, config={}, seed=ctx.seed
                )
        if ctx.is_main:
            self._drop_old(best_step)
            if self._remote is not None:
                self._remote.submit(path)
        ctx.barrier()

    def load_latest(self) -> Snapshot | None:
        """The newest checkpoint that is whole and belongs to this stage's key, or None to start afresh.

        Where the remote home has a newer one it is fetched first.

        Raises:
            CheckpointError: Checkpoints exist and every one of them is damaged.
            DataError: The remote home cannot be read.
        """
        if self._remote is not None:
            newest = max(self._remote.steps(), default=-1)
            if newest > max(self._own_steps(), default=-1):
                path = self.directory / f"{_PREFIX}{newest}"
                shutil.rmtree(path, ignore_errors=True)  # what a death while fetching left
                self._remote.fetch(newest, path)
        damaged: list[str] = []
        for step in reversed(self.ctx.broadcast_json({"steps": self.steps()})["steps"]):
            found, problem = self._load(step)
            # A rank alone knows whether its own rows are whole: all go on from one step, or none.
            usable = torch.tensor(int(problem is None), device=self.ctx.device)
            if int(self.ctx.all_reduce(usable, "min")):
                if found is not None:
                    return found
                continue  # left by an earlier configuration of this run
            damaged.append(problem or f"step {step} is damaged for another rank")
        if damaged:
            raise CheckpointError(
                f"no usable checkpoint: {damaged[0]}",
                where=str(self.directory),
                fix="delete that folder to train this stage from its start",
            )
        return None

    def _load(self, step: int) -> tuple[Snapshot | None, str | None]:
        """A checkpoint, None for that of another configuration; and what is wrong with it."""
        try:
            artifact = self._open(step)
            if artifact.key != self.ctx.key:
                return None, None
            if self.rows is not None:
                for first, _, _ in self.rows.chunks():
                    artifact.file(rows_file(first))  # verifies it
            weights, moments = (artifact.load_safetensors(f"{n}.safetensors") for n in ("weights", "moments"))
            return Snapshot(step, weights, moments, artifact.meta), None
        except DataError as error:
            return None, str(error)

    def load_weights(self, step: int) -> dict[str, torch.Tensor]:
        """Only the weights of one checkpoint."""
        return self._open(step).load_safetensors("weights.safetensors")

    def load_rows(self, step: int) -> None:
        """Put this rank's part of the rows of one checkpoint where they are trained."""
        assert self.rows is not None
        artifact = self._open(step)
        self.rows.load(lambda first: artifact.load_safetensors(rows_file(first)))

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, ascending."""
        found = self.directory.glob(f"{_PREFIX}*/{MANIFEST}")
        return sorted(int(path.parent.name.removeprefix(_PREFIX)) for path in found)

    def close(self) -> None:
        """Nothing more will be saved: wait for what is on its way to the remote home."""
        if self._remote is not None:
            self._remote.close()

    def _is_own_and_whole(self, step: int) -> bool:
        try:
            artifact = self._open(step)
            artifact.verify()
        except DataError:
            return False
        return artifact.key == self.ctx.key

    def _own_steps(self) -> list[int]:
        """Steps of the finished checkpoints of this very stage, those of other configurations left out."""
        return [step for step in self.steps() if self._key_of(step) == self.ctx.key]

    def _key_of(self, step: int) -> str | None:
        try:
            return self._open(step).key
        except DataError:
            return None

    def _open(self, step: int) -> Artifact:
        return ArtifactStore(self.ctx.store.root).open(self.directory / f"{_PREFIX}{step}")

    def _drop_old(self, best_step: int | None) -> None:
        def permanent(step: int) -> bool:
            return step == best_step or (bool(self.keep_every) and step % self.keep_every == 0)

        # Not those of an earlier configuration: newer ones among them would push ours out.
        passing = [step for step in self._own_steps() if not permanent(step)]
        for step in passing[: max(len(passing) - self.keep, 0)]:
            path: Path = self.directory / f"{_PREFIX}{step}"
            if self._remote is not None and self._remote.uploading == path:
                continue  # the next checkpoint drops it
            # First the manifest: what is half deleted must not look like a checkpoint.
            (path / MANIFEST).unlink()
            set_aside(path)
        for path in self.directory.iterdir():
            if not (path / MANIFEST).is_file():  # a death while writing or deleting left it
                set_aside(path)
