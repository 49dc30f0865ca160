"""The one training loop: fusion, pretraining and fine-tuning run through it, on 1 to W ranks, ZeRO 0 to 3."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from qbrec.config.stages import TrainConfig
from qbrec.engine.checkpoint import load_latest, load_weights, save_checkpoint
from qbrec.engine.context import StageContext
from qbrec.engine.ds_engine import start_engine
from qbrec.engine.state import read_moments, read_weights, write_state
from qbrec.errors import CheckpointError, QbrecError

Evaluate = Callable[[nn.Module], Mapping[str, float]]
_LOG_EVERY = 20  # optimiser steps


class Task(Protocol):
    """What is trained: a module and a loss that is a sum over targets."""

    module: nn.Module

    def prepare(self, batch: Any, device: torch.device) -> tuple[Any, torch.Tensor]:
        """Move a micro-batch to the device, draw its masks; also its number of targets (float scalar)."""
        ...

    def loss(self, module: nn.Module, batch: Any) -> torch.Tensor:
        """Loss summed over the targets of a prepared micro-batch; `module` must be called as a function."""
        ...


class Loader(Protocol):
    """Global batches in micro-batches dealt to the ranks, in an order that seed and epoch fix."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of one epoch."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hash of the data and of its order in steps: a run only goes on in the order it began in."""
        ...

    def iterate(self, epoch: int, *, start: int = 0) -> Iterable[Sequence[Any]]:
        """Steps `start`… of an epoch: this rank's micro-batches, None where it has none, as many on all."""
        ...

    def first(self) -> Any:
        """Some micro-batch of the data: what a rank without one runs with weight 0."""
        ...


@dataclass
class TrainResult:
    """What training gave.

    Attributes:
        steps: Optimiser steps taken, those before a resume included.
        losses: Mean loss per target of every step since the last (re)start.
        curve: One entry per evaluation: {"step", "epoch", metric…}.
        best: The entry of `curve` with the best monitored metric, else the last one.
    """

    steps: int
    losses: list[float] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, float] = field(default_factory=dict)


def train(
    ctx: StageContext,
    task: Task,
    loader: Loader,
    *,
    config: TrainConfig,
    label: str,
    evaluate: Evaluate | None = None,
    monitor: str | None = None,
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

    Raises:
        QbrecError: The loss is not finite.
        CheckpointError: Checkpoints exist, and none can be read, or the newest belongs to other data or
            another order of it.
    """
    return _Loop(ctx, task, loader, config, evaluate, monitor).run(label)


class _Loop:
    def __init__(
        self,
        ctx: StageContext,
        task: Task,
        loader: Loader,
        config: TrainConfig,
        evaluate: Evaluate | None,
        monitor: str | None,
    ) -> None:
        self.ctx, self.task, self.loader, self.config = ctx, task, loader, config
        self.evaluate, self.monitor = evaluate, monitor
        self.total = config.epochs * loader.steps_per_epoch
        self.step, self.best_step, self.waited = 0, None, 0
        self.result = TrainResult(steps=0)
        self._idle: Any = None  # a prepared micro-batch for ranks that have none

    step: int
    best_step: int | None

    def run(self, label: str) -> TrainResult:
        checkpoint = load_latest(self.ctx)
        if checkpoint is not None and checkpoint.meta["finished"]:
            self._recall(checkpoint.meta)
            return self._finish(checkpoint.weights)
        self.engine = start_engine(copy.deepcopy(self.task.module), self.ctx, self.config)
        if checkpoint is not None:
            self._recall(checkpoint.meta)
            self._seed(0)
            write_state(
                self.engine,
                weights=checkpoint.weights,
                moments=checkpoint.moments,
                step=checkpoint.step,
                loss=lambda: self.task.loss(self.engine, self._idle_batch()),
            )
        progress = self.ctx.progress(self.total, label, done=self.step)
        per_epoch, stop = self.loader.steps_per_epoch, False
        for epoch in range(self.step // per_epoch, self.config.epochs):
            for micro_batches in self.loader.iterate(epoch, start=self.step - epoch * per_epoch):
                loss = self._step(micro_batches)
                progress.update(loss=loss, epoch=f"{epoch + 1}/{self.config.epochs}", **self._shown())
                if self.step % self.config.checkpoint_every == 0 and self.step % per_epoch:
                    self._save(finished=False)
            last = epoch + 1 == self.config.epochs
            if self.evaluate is not None and ((epoch + 1) % self.config.evaluate_every == 0 or last):
                stop = self._evaluate(epoch)
            if last or stop or self.evaluate is not None:
                self._save(finished=last or stop)
            if stop:
                break
        progress.close()
        weights = read_weights(self.engine)
        self.engine.destroy()
        return self._finish(weights)

    def _step(self, micro_batches: Sequence[Any]) -> float:
        ctx, engine = self.ctx, self.engine
        engine.module.train()
        prepared = [None if b is None else self.task.prepare(b, ctx.device) for b in micro_batches]
        count = sum((p[1].detach().double() for p in prepared if p is not None), start=self._zero())
        ctx.all_reduce(count)
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step, self.total)
        total = self._zero()
        for index, item in enumerate(prepared):
            # Dropout is drawn from the place of the micro-batch in the global batch: the same for any world
            # size.
            self._seed(index * ctx.world + ctx.rank)
            loss = self.task.loss(engine, self._idle_batch() if item is None else item[0])
            if item is None:
                loss = loss * 0.0
            seen = ctx.all_reduce(loss.detach().double().clone())
            if not torch.isfinite(seen):
                raise QbrecError(
                    f"the loss of stage {ctx.stage!r} is {float(seen)} at step {self.step}",
                    where=str(ctx.run_dir),
                    fix="lower its learning_rate or clip_norm, or use float32; earlier checkpoints are kept",
                )
            total += seen
            engine.set_gradient_accumulation_boundary(index + 1 == len(prepared))
            # DeepSpeed averages over the ranks; the loss is a sum over them.
            engine.backward(loss * (ctx.world / count.to(loss.dtype).clamp(min=1.0)), scale_wrt_gas=False)
            engine.step()
        self.step += 1
        mean = float(total / count.clamp(min=1.0))
        self.result.losses.append(mean)
        if self.step % _LOG_EVERY == 0 or self.step == self.total:
            recent = self.result.losses[-_LOG_EVERY:]
            rate = learning_rate(self.config, self.step - 1, self.total)
            ctx.log_metrics(self.step, {"loss": sum(recent) / len(recent), "learning_rate": rate})
        return mean

    def _evaluate(self, epoch: int) -> bool:
        assert self.evaluate is not None
        self.task.module.load_state_dict(read_weights(self.engine))
        self.task.module.to(self.ctx.device).eval()
        with torch.no_grad():
            metrics = {k: float(v) for k, v in self.evaluate(self.task.module).items()}
        entry = {"step": self.step, "epoch": epoch + 1, **metrics}
        self.ctx.log_metrics(self.step, metrics)
        self.result.curve.append(entry)
        if self.monitor is None:
            return False
        best = max(self.result.curve, key=lambda e: e[self.monitor or ""])
        self.waited = 0 if best is entry else self.waited + 1
        self.best_step = int(best["step"])
        return bool(self.config.patience) and self.waited >= self.config.patience

    def _save(self, *, finished: bool) -> None:
        save_checkpoint(
            self.ctx,
            step=self.step,
            weights=read_weights(self.engine),
            moments=read_moments(self.engine),
            meta={
                "finished": finished,
                "data": self.loader.fingerprint,
                "best_step": self.best_step,
                "waited": self.waited,
                "curve": self.result.curve,
            },
            keep=self.config.keep_checkpoints,
            best_step=self.best_step,
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
        self.result.curve = list(meta["curve"])

    def _finish(self, weights: dict[str, torch.Tensor]) -> TrainResult:
        if self.best_step is not None and self.best_step != self.step:
            weights = load_weights(self.ctx, self.best_step)
        self.task.module.load_state_dict(weights)
        self.task.module.to(self.ctx.device).eval()
        self.result.steps = self.step
        curve = self.result.curve
        if curve:
            self.result.best = next((e for e in curve if e["step"] == self.best_step), curve[-1])
        self.ctx.barrier()
        return self.result

    def _idle_batch(self) -> Any:
        if self._idle is None:
            self._idle = self.task.prepare(self.loader.first(), self.ctx.device)[0]
        return self._idle

    def _seed(self, place: int) -> None:
        torch.manual_seed(self.ctx.sub_seed(f"{self.ctx.stage}/dropout/{self.step}/{place}"))

    def _shown(self) -> dict[str, float]:
        curve = self.result.curve
        return {self.monitor: curve[-1][self.monitor]} if self.monitor and curve else {}

    def _zero(self) -> torch.Tensor:
        return torch.zeros((), dtype=torch.float64, device=self.ctx.device)


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """Linear warm-up, then a cosine down to `min_lr_fraction`."""
    warmup = max(int(config.warmup_fraction * total), 1)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    share = (step - warmup) / max(total - warmup, 1)
    floor = config.min_lr_fraction
    return config.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0))))
