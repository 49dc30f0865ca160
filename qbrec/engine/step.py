"""One optimiser step: micro-batches of all ranks in, one move of the weights (and of ID rows) out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qbrec.config.stages import TrainConfig
from qbrec.engine.context import StageContext
from qbrec.engine.meter import StepMeter
from qbrec.engine.rows import RowUse, RowWindow
from qbrec.engine.schedule import schedule
from qbrec.engine.state import loss_scale
from qbrec.engine.task import Loader, Task
from qbrec.errors import QbrecError


@dataclass(frozen=True)
class StepResult:
    """What a step did.

    Attributes:
        loss: Mean loss per target of the global batch.
        stop: Whether any rank has been asked to stop.
        applied: Whether the weights moved; fp16 leaves out a step whose scaled gradients overflow.
        rows_applied: Whether the rows moved, if there are any: not where weights did not, nor where a
            gradient of theirs is not finite.
    """

    loss: float
    stop: bool
    applied: bool
    rows_applied: bool


class Stepper:
    """Takes the steps of one training.

    Args:
        ctx: The rank's context.
        engine: What `deepspeed.initialize` gave.
        task: Module and loss.
        loader: Gives a micro-batch for ranks that have none.
        config: Schedule.
        total: Steps of the whole training.
        rows: ID rows that the task uses, or None.
        meter: Told where time goes.
    """

    def __init__(
        self,
        ctx: StageContext,
        engine: Any,
        task: Task,
        loader: Loader,
        config: TrainConfig,
        *,
        total: int,
        rows: RowUse | None,
        meter: StepMeter,
    ) -> None:
        self.ctx, self.engine, self.task, self.loader, self.config = ctx, engine, task, loader, config
        self.total, self.rows, self.meter = total, rows, meter
        self._idle: Any = None  # a prepared micro-batch for ranks that have none

    def __call__(self, micro_batches: Sequence[Any], step: int, *, stop: bool) -> StepResult:
        """Take one step; a collective call.

        Args:
            micro_batches: Of this rank, None where it has none; as many on all ranks.
            step: Steps taken before it.
            stop: Whether this rank has been asked to stop.

        Raises:
            QbrecError: The loss is not finite.
        """
        ctx, engine, meter = self.ctx, self.engine, self.meter
        engine.module.train()
        with meter.phase("prepare"):
            prepared = [None if b is None else self.task.prepare(b, ctx.device) for b in micro_batches]
        agreed = torch.zeros(2, dtype=torch.float64, device=ctx.device)  # targets, ranks asked to stop
        for item in prepared:
            if item is not None:
                agreed[0] += item[1].detach()
        agreed[1] = float(stop)
        with meter.phase("communication"):
            ctx.all_reduce(agreed)
        count = agreed[0].clamp(min=1.0)
        batches = [None if item is None else item[0] for item in prepared]
        window = None
        if self.rows is not None:
            with meter.phase("communication"):
                window = RowWindow(self.rows, batches)
            batches = window.batches
        factor = schedule(self.config, step, self.total)
        for group in engine.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * factor
        total = torch.zeros((), dtype=torch.float64, device=ctx.device)
        scale = loss_scale(engine)
        for index, batch in enumerate(batches):
            total += self._micro_step(batch, index, step, count, last=index + 1 == len(batches))
        applied = bool(engine.was_step_applied())
        moved = applied
        if window is not None:
            with meter.phase("optimizer"):
                # The loss was multiplied by the number of ranks, for DeepSpeed's averaging, and by the scale.
                moved = window.apply(divisor=ctx.world * scale, factor=factor, wanted=applied)
        return StepResult(float(total / count), bool(agreed[1] > 0), applied, moved)

    def _micro_step(
        self, batch: Any, index: int, step: int, count: torch.Tensor, *, last: bool
    ) -> torch.Tensor:
        """Forward and backward of one micro-batch, the optimiser after the last; the loss over all ranks."""
        ctx, engine, meter = self.ctx, self.engine, self.meter
        # Dropout is drawn from the place of the micro-batch in the global batch: the same for any world size.
        self.seed(step, index * ctx.world + ctx.rank)
        with meter.phase("forward"):
            loss = self.task.loss(engine, self.idle_batch() if batch is None else batch)
            if batch is None:
                loss = loss * 0.0
        with meter.phase("communication"):
            seen = ctx.all_reduce(loss.detach().double().clone())
            if not torch.isfinite(seen):
                raise QbrecError(
                    f"the loss of stage {ctx.stage!r} is {float(seen)} at step {step}",
                    where=str(ctx.run_dir),
                    fix="lower its learning_rate or clip_norm, or use float32; earlier checkpoints are kept",
                )
        engine.set_gradient_accumulation_boundary(last)
        with meter.phase("backward"):
            # DeepSpeed averages over the ranks; the loss is a sum over them.
            engine.backward(loss * (ctx.world / count).to(loss.dtype), scale_wrt_gas=False)
        with meter.phase("optimizer"):
            engine.step()
        return seen

    def idle_batch(self) -> Any:
        """A prepared micro-batch of the data, made once: what a rank without one runs with weight 0."""
        if self._idle is None:
            batch = self.task.prepare(self.loader.first(), self.ctx.device)[0]
            if self.rows is not None:
                size, width = len(self.rows.ids(batch)), self.rows.table.width
                batch = self.rows.bind(batch, torch.zeros(size, width, device=self.ctx.device))
            self._idle = batch
        return self._idle

    def seed(self, step: int, place: int) -> None:
        """Seed torch for one micro-batch."""
        torch.manual_seed(self.ctx.sub_seed(f"{self.ctx.stage}/dropout/{step}/{place}"))
