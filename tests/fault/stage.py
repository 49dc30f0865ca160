"""A stage that trains a toy task with faults, and its driver: python -m tests.fault.stage FOLDER."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qbrec.config import RootConfig, parse_config
from qbrec.config.stages import TrainConfig
from qbrec.engine.context import StageContext
from qbrec.engine.rows import rows_file
from qbrec.engine.train import train
from qbrec.storage.artifact import Artifact
from tests.support import toy_stage
from tests.support.faults import DRIVER, Injector
from tests.support.rows import RowLoader, RowTask, row_use
from tests.support.training import ToyLoader, ToyTask

STEPS = 20
CHECKPOINT_EVERY = 3
_ORDER = "order.json"


def write_order(
    folder: Path, *, rows: bool = False, seed: int = 0, key: str = "ab" * 32, **compute: Any
) -> None:
    """Write what the driver of a folder runs.

    Args:
        folder: Storage of the run.
        rows: Train the task with ID rows, which is evaluated and keeps its best checkpoint.
        seed: The run's; what rows start from depends on it.
        key: Key of the stage's artifact.
        compute: Section of the configuration.
    """
    (folder / "run").mkdir(parents=True, exist_ok=True)
    given = {"launcher": "inprocess", "device": "cpu", "threads_per_worker": 1, **compute}
    (folder / _ORDER).write_text(json.dumps({"rows": rows, "seed": seed, "key": key, "compute": given}))


def run(ctx: StageContext, config: RootConfig, inputs: Mapping[str, Artifact]) -> Artifact:
    """The stage's entry point."""
    folder = ctx.run_dir.parent
    injector = Injector(folder, rank=ctx.rank, world=ctx.world)
    injector.install()
    with_rows = json.loads((folder / _ORDER).read_text())["rows"]
    task: Any = RowTask() if with_rows else ToyTask()
    loader: Any = (RowLoader if with_rows else ToyLoader)(ctx.rank, ctx.world)
    task.loss = injector.loss(task.loss)
    use = row_use(ctx) if with_rows else None
    result = train(
        ctx,
        task,
        loader,
        config=TrainConfig(
            epochs=4, batch_size=8, micro_batch=2, learning_rate=0.01, checkpoint_every=CHECKPOINT_EVERY
        ),
        label="toy",
        evaluate=_smallness if with_rows else None,
        monitor="smallness" if with_rows else None,
        rows=use,
    )
    writer = ctx.writer()
    if ctx.is_main:
        weights = {name: tensor.detach().cpu() for name, tensor in task.module.state_dict().items()}
        writer.save_safetensors("weights.safetensors", weights)
    if use is not None:
        for first, rows, accumulator in use.table.chunks():
            writer.save_safetensors(rows_file(first), {"rows": rows, "accumulator": accumulator})
    return ctx.commit(writer, meta={"steps": result.steps}, inputs=inputs)


def _smallness(module: nn.Module) -> dict[str, float]:
    """Weights grow, so that the best state is an early one, whose checkpoint has to be kept till the end."""
    return {"smallness": -float(sum(p.detach().square().sum() for p in module.parameters()))}


def drive(folder: Path) -> int:
    """Run the stage as the pipeline does; an exit code."""
    given = json.loads((folder / _ORDER).read_text())
    config = parse_config(
        {"run": {"storage": str(folder), "seed": given["seed"]}, "compute": given["compute"]}
    )
    if os.environ.get("RANK", "0") == "0":
        (folder / DRIVER).write_text(str(os.getpid()))
    return toy_stage.drive(folder, config, entry="tests.fault.stage:run", key=given["key"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(drive(Path(sys.argv[1])))
