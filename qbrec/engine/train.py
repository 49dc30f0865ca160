"""The one training loop: fusion, RQ-VAE, pretraining and fine-tuning, on 1 to W ranks, ZeRO 0 to 3."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from qbrec.config.stages import TrainConfig
from qbrec.engine.checkpoint import Checkpoints, Snapshot
from qbrec.engine.context import StageContext
from qbrec.engine.ds_config import resolve_precision
from qbrec.engine.ds_engine import start_engine
from qbrec.engine.heartbeat import Heartbeat, watch_collectives
from qbrec.engine.meter import StepMeter
from qbrec.engine.preemption import StopRequest
from qbrec.engine.rows import RowUse
from qbrec.engine.schedule import schedule
from qbrec.engine.state import loss_scale, read_counters, read_moments, read_weights, write_state
from qbrec.engine.step import Stepper
from qbrec.engine.task import Loader, Task
from qbrec.errors import CheckpointError, Preempted

Evaluate = Callable[[nn.Module], Mapping[str, float]]
_LOG_EVERY = 20  # optimiser steps


@dataclass
class TrainResult:
    """What training gave.

    Attributes:
        steps: Optimiser steps taken, those before a resume included.
        losses: Mean loss per target of every step since the last (re)start.
        curve: One entry per evaluation: {"step", "epoch", metric…}. `epoch` is how many are finished; 0: the
            weights that training started with.
        best: The entry of `curve` with the best monitored metric, else the last one.
        times: What the meter reported last, see `StepMeter.report`.
    """

    steps: int
    losses: list[float] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, float] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)


def train(
    ctx: StageContext,
    task: Task,
    loader: Loader,
    *,
    config: TrainConfig,
    label: str,
    evaluate: Evaluate | None = None,
    monitor: str | None = None,
    rows: RowUse | None = None,
    start_counts: bool = False,
) -> TrainResult:
    """Train `task.module` and leave the resulting weights (the best ones where `monitor` is set) in it.

    The loss of a step is the sum over all targets of the global batch divided by their number, so it does not
    depend on the world size, on how a batch is cut, or on the ZeRO stage. A run that was cut off goes on with
    the very next step, bit for bit on a CPU in float32.

    Args:
        ctx: The rank's context.
        task: Module and loss.
        loader: Where batches come from.
        config: Length, batch, optimiser, stopping.
        label: Shown with the progress.
        evaluate: Called on every rank, at the end of every `evaluate_every` epochs, with `task.module` on
            `ctx.device`.
        monitor: Name of the metric (higher is better) that picks the weights and stops early.
        rows: Rows beside the module that the task uses; they are trained, checkpointed and left in the best
            state with it.
        start_counts: The weights that the module comes with are evaluated too, and stay where nothing better
            comes of them; not beside `rows`.

    Raises:
        QbrecError: The loss is not finite.
        CheckpointError: Checkpoints exist, and none can be read, or the newest belongs to other data or
            another order of it.
        Preempted: This process was asked to stop, and has written a checkpoint.
        LaunchError: A rank is lost or does not move any more; the message names it.
    """
    with (
        StopRequest(ctx.run_dir, ctx.owner) as stop,
        Heartbeat(ctx) as heartbeat,
        watch_collectives(heartbeat),
    ):
        loop = _Loop(ctx, task, loader, config, evaluate, monitor, rows, start_counts)
        try:
            return loop.run(label, stop, heartbeat)
        finally:
            loop.checkpoints.close(wait=False)


class _Loop:
    def __init__(
        self,
        ctx: StageContext,
        task: Task,
        loader: Loader,
        config: TrainConfig,
        evaluate: Evaluate | None,
        monitor: str | None,
        rows: RowUse | None,
        start_counts: bool,
    ) -> None:
        self.ctx, self.task, self.loader, self.config = ctx, task, loader, config
        self.evaluate, self.monitor, self.rows = evaluate, monitor, rows
        assert not (start_counts and (evaluate is None or rows is not None))
        # They come with the module in every start of the stage, so they need no checkpoint.
        self.start = copy.deepcopy(task.module.state_dict()) if start_counts else None
        self.total = config.epochs * loader.steps_per_epoch
        self.step, self.best_step, self.waited = 0, None, 0
        self.skipped = {"skipped_steps": 0, "skipped_row_steps": 0}
        self.result = TrainResult(steps=0)
        self.checkpoints = Checkpoints(
            ctx, keep=config.keep_checkpoints, keep_every=config.keep_every, rows=rows.table if rows else None
        )

    step: int
    best_step: int | None

    def run(self, label: str, stop: StopRequest, heartbeat: Heartbeat) -> TrainResult:
        found = self.checkpoints.load_latest()
        if found is not None and found.meta["finished"]:
            self._recall(found.meta)
            return self._finish(found.weights)
        self.meter = StepMeter(
            self.ctx.device, precision=resolve_precision(self.ctx.compute), window=_LOG_EVERY
        )
        self.engine = start_engine(copy.deepcopy(self.task.module), self.ctx, self.config)
        self.stepper = Stepper(
            self.ctx,
            self.engine,
            self.task,
            self.loader,
            self.config,
            total=self.total,
            rows=self.rows,
            meter=self.meter,
        )
        if found is not None:
            self._resume(found)
        elif self.start is not None:
            heartbeat.beat(self.step, phase="evaluation")
            self._evaluate()
        progress = self.ctx.progress(self.total, label, done=self.step)
        per_epoch, ended, stopped = self.loader.steps_per_epoch, False, False
        for epoch in range(self.step // per_epoch, self.config.epochs):
            steps = self.loader.iterate(epoch, start=self.step - epoch * per_epoch)
            for micro_batches in self.meter.waiting(steps):
                heartbeat.beat(self.step)
                with self.meter.step():
                    done = self.stepper(micro_batches, self.step, stop=bool(stop))
                self.step += 1
                self.skipped["skipped_steps"] += not done.applied
                self.skipped["skipped_row_steps"] += not done.rows_applied
                self.result.losses.append(done.loss)
                progress.update(loss=done.loss, epoch=f"{epoch + 1}/{self.config.epochs}", **self._shown())
                if self.step % _LOG_EVERY == 0 or self.step == self.total:
                    self._log()
                stopped = done.stop
                if self.step % per_epoch and (stopped or self._due()):
                    with self.meter.outside():
                        self._save(finished=False)
                    self._end_if(stopped)
            last = epoch + 1 == self.config.epochs
            with self.meter.outside():
                if self.evaluate is not None and ((epoch + 1) % self.config.evaluate_every == 0 or last):
                    heartbeat.beat(self.step, phase="evaluation")
                    ended = self._evaluate()
                if last or ended or stopped or self.evaluate is not None or self._due():
                    self._save(finished=last or ended)
            # Not before the epoch's evaluation: a run that goes on would never make up for it.
            self._end_if(stopped)
            if ended:
                break
        progress.close()
        weights = read_weights(self.engine)
        self.engine.destroy()
        return self._finish(weights)

    def _end_if(self, stopped: bool) -> None:
        if stopped:
            # All ranks wait for the remote copy: a launcher that sees one of them end ends the others.
            self.checkpoints.close(wait=True)
            self.ctx.barrier()
            raise Preempted(
                f"stage {self.ctx.stage!r} was asked to stop, and saved step {self.step}",
                where=str(self.ctx.checkpoint_dir),
                fix="run the same command again: it goes on with the next step",
            )

    def _due(self) -> bool:
        every = self.config.keep_every
        return self.step % self.config.checkpoint_every == 0 or bool(every and self.step % every == 0)

    def _log(self) -> None:
        recent = self.result.losses[-_LOG_EVERY:]
        self.result.times = self.meter.report()
        metrics = {
            "loss": sum(recent) / len(recent),
            "learning_rate": self.config.learning_rate * schedule(self.config, self.step - 1, self.total),
            **self.result.times,
        }
        if self.engine.fp16_enabled():
            metrics |= {"loss_scale": loss_scale(self.engine), **self.skipped}
        self.ctx.log_metrics(self.step, metrics)

    def _evaluate(self) -> bool:
        assert self.evaluate is not None
        self.task.module.load_state_dict(read_weights(self.engine))
        self.task.module.to(self.ctx.device).eval()
        with torch.no_grad():
            # Rank 0's: they decide what all ranks do next.
            metrics = self.ctx.broadcast_json(
                {k: float(v) for k, v in self.evaluate(self.task.module).items()}
            )
        finished = self.step // self.loader.steps_per_epoch
        entry = {"step": self.step, "epoch": finished, **metrics}
        self.ctx.log_metrics(self.step, metrics)
        self.result.curve.append(entry)
        if self.monitor is None:
            return False
        best = max(self.result.curve, key=lambda e: e[self.monitor or ""])
        self.waited = 0 if best is entry else self.waited + 1
        self.best_step = int(best["step"])
        return bool(self.config.patience) and self.waited >= self.config.patience

    def _save(self, *, finished: bool) -> None:
        snapshot = Snapshot(
            step=self.step,
            weights=read_weights(self.engine),
            moments=read_moments(self.engine),
            meta={
                "finished": finished,
                "data": self.loader.fingerprint,
                "best_step": self.best_step,
                "waited": self.waited,
                "skipped": self.skipped,
                "counters": read_counters(self.engine),
                "curve": self.result.curve,
            },
        )
        self.checkpoints.save(snapshot, best_step=self.best_step or None)  # 0: the weights it started with

    def _resume(self, found: Snapshot) -> None:
        self._recall(found.meta)
        self.stepper.seed(self.step, 0)
        if self.rows is not None:
            self.checkpoints.load_rows(found.step)
        write_state(
            self.engine,
            weights=found.weights,
            moments=found.moments,
            counters=found.meta["counters"],
            loss=lambda: self.task.loss(self.engine, self.stepper.idle_batch()),
        )

    def _recall(self, meta: Mapping[str, Any]) -> None:
        if meta.get("data") != self.loader.fingerprint:
            raise CheckpointError(
                "the checkpoint belongs to other data or another order of it: its next step is not known",
                where=f"{self.ctx.checkpoint_dir}, step {meta['step']}",
                fix="resume with the same catalogue, seed and batch size, or delete that folder to start the "
                "stage anew",
            )
        self.step, self.best_step, self.waited = meta["step"], meta["best_step"], meta["waited"]
        self.skipped = dict(meta["skipped"])
        self.result.curve = list(meta["curve"])

    def _finish(self, weights: dict[str, torch.Tensor]) -> TrainResult:
        chosen = self.step if self.best_step is None else self.best_step
        if chosen == 0 and self.start is not None:
            weights = self.start
        elif chosen != self.step:
            weights = self.checkpoints.load_weights(chosen)
        if self.rows is not None:
            self.checkpoints.load_rows(chosen)
        self.task.module.load_state_dict(weights)
        self.task.module.to(self.ctx.device).eval()
        self.result.steps = self.step
        curve = self.result.curve
        if curve:
            self.result.best = next((e for e in curve if e["step"] == self.best_step), curve[-1])
        self.ctx.barrier()
        return self.result

    def _shown(self) -> dict[str, str | float]:
        curve = self.result.curve
        judged = {self.monitor: curve[-1][self.monitor]} if self.monitor and curve else {}
        return {"step": f"{self.step}/{self.total}", **judged}
