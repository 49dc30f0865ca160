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
import sys
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
            if self._remote is not None:
                best = path if best_step is None else self.directory / f"{_PREFIX}{best_step}"
                self._remote.submit(path, best)
            self._drop_old(snapshot.step, best_step)
        ctx.barrier()

    def load_latest(self) -> Snapshot | None:
        """The newest checkpoint that is whole and belongs to this stage's key, or None to start afresh.

        Where the remote home has a newer one it is fetched first; where that fails, one that is here will do.

        Raises:
            CheckpointError: Checkpoints exist and every one of them is damaged.
            DataError: The remote home cannot be read, and there is none here.
        """
        known = self.ctx.broadcast_json({"problem": self._fetch_newer(), "steps": self.steps()})
        if known["problem"] is not None and not known["steps"]:
            what, where, fix = known["problem"]
            raise DataError(what, where=where, fix=fix)
        damaged: list[str] = []
        for step in reversed(known["steps"]):
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

    def _fetch_newer(self) -> list[str | None] | None:
        """Bring the newest remote copy here if it is newer; what went wrong, for rank 0 alone finds out."""
        if self._remote is None:
            return None
        try:
            copies = self._remote.steps()
            newest = max(copies, default=-1)
            if newest > max(self._own_steps(), default=-1):
                self._fetch(newest)
                best = self._open(newest).meta.get("best_step")
                if best in copies and best not in self._own_steps():
                    self._fetch(best)
        except DataError as error:
            print(f"warning: no checkpoint was fetched from the remote home\n{error}", file=sys.stderr)
            return [error.what, error.where, error.fix]
        return None

    def _fetch(self, step: int) -> None:
        assert self._remote is not None
        path = self.directory / f"{_PREFIX}{step}"
        shutil.rmtree(path, ignore_errors=True)  # what a death while fetching left
        self._remote.fetch(step, path)

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
        """Put this rank's part of the rows of one checkpoint where they are trained. A collective call.

        Raises:
            CheckpointError: A file is damaged, of this rank's or of another's.
        """
        assert self.rows is not None
        problem = None
        try:
            artifact = self._open(step)
            self.rows.load(lambda first: artifact.load_safetensors(rows_file(first)))
        except DataError as error:
            problem = str(error)
        whole = torch.tensor(int(problem is None), device=self.ctx.device)
        if not int(self.ctx.all_reduce(whole, "min")):
            raise CheckpointError(
                f"the ID rows of step {step} cannot be read: {problem or 'those of another rank'}",
                where=str(self.directory / f"{_PREFIX}{step}"),
                fix="delete the checkpoints of this stage to train it from its start",
            )

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, ascending."""
        found = self.directory.glob(f"{_PREFIX}*/{MANIFEST}")
        return sorted(int(path.parent.name.removeprefix(_PREFIX)) for path in found)

    def close(self, *, wait: bool) -> None:
        """Nothing more will be saved; `wait` for the copy that is on its way to the remote home."""
        if self._remote is not None:
            self._remote.close(wait=wait)

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

    def _drop_old(self, newest: int, best_step: int | None) -> None:
        def permanent(step: int) -> bool:
            return step == best_step or (bool(self.keep_every) and step % self.keep_every == 0)

        # Not those of an earlier configuration. A later one of ours could not be read, or we were beyond it.
        own = self._own_steps()
        passing = [step for step in own if step <= newest and not permanent(step)]
        for step in [*passing[: max(len(passing) - self.keep, 0)], *(step for step in own if step > newest)]:
            path: Path = self.directory / f"{_PREFIX}{step}"
            if self._remote is not None and path in self._remote.uploading:
                continue  # the next checkpoint drops it
            # First the manifest: what is half deleted must not look like a checkpoint.
            (path / MANIFEST).unlink()
            set_aside(path)
        for path in self.directory.glob(f"{_PREFIX}*"):
            if path.is_dir() and not (path / MANIFEST).is_file():  # a death while writing or deleting left it
                set_aside(path)
