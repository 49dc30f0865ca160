"""A stage that trains the toy task slowly, and a driver for it: what a run is when machines come and go.

python -m tests.support.toy_stage FOLDER         with FOLDER/order.json from `write_order`
"""

from __future__ import annotations

import json
import os
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from qbrec.config import RootConfig, parse_config
from qbrec.config.stages import TrainConfig
from qbrec.engine.context import OWNER, StageContext
from qbrec.engine.launch import launch
from qbrec.engine.preemption import stop_on_sigterm
from qbrec.engine.progress import Progress
from qbrec.engine.train import train
from qbrec.engine.worker import Order
from qbrec.errors import QbrecError
from qbrec.storage.artifact import Artifact
from qbrec.storage.atomic import write_atomic
from tests.support.training import ToyLoader, ToyTask

STEPS_PER_EPOCH = 5
LOSSES = "losses.jsonl"


class _Recorder(Progress):
    """Notes every step of rank 0."""

    def __init__(self, file: Path, world: int, total: int, done: int) -> None:
        super().__init__(total, "toy", silent=True, done=done)
        self._losses, self._world = file, world

    def update(self, n: int = 1, /, **info: float | str) -> None:
        super().update(n, **info)
        line = {"step": self.done, "loss": info["loss"], "world": self._world, "pid": os.getpid()}
        with open(self._losses, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


@dataclass
class _Context(StageContext):
    def progress(self, total: int, label: str, *, done: int = 0) -> Progress:
        if not self.is_main:
            return super().progress(total, label, done=done)
        return _Recorder(self.run_dir / LOSSES, self.world, total, done)


class _SlowLoader(ToyLoader):
    """Takes its time for every step; at one step it may stall one rank once."""

    def __init__(self, rank: int, world: int, folder: Path) -> None:
        super().__init__(rank, world)
        self.folder = folder

    def iterate(self, epoch: int, *, start: int = 0) -> Iterator[list[Any]]:
        for step, batches in enumerate(super().iterate(epoch, start=start), start):
            drill = _drill(self.folder)
            time.sleep(drill["seconds"])
            stalled = self.folder / "stalled"
            number = epoch * self.steps_per_epoch + step
            if drill["stall"] == [self.rank, number] and not stalled.exists():
                stalled.touch()
                time.sleep(600)
            yield batches


def run(ctx: StageContext, config: RootConfig, inputs: Mapping[str, Artifact]) -> Artifact:
    """The stage's entry point."""
    ctx = _Context(**{field.name: getattr(ctx, field.name) for field in fields(ctx)})
    drill = _drill(ctx.run_dir.parent)
    task, loader = ToyTask(), _SlowLoader(ctx.rank, ctx.world, ctx.run_dir.parent)
    train_config = TrainConfig(
        epochs=drill["epochs"],
        batch_size=8,
        micro_batch=2,
        learning_rate=0.01,
        checkpoint_every=drill["checkpoint_every"],
    )
    result = train(ctx, task, loader, config=train_config, label="toy")
    writer = ctx.writer()
    if ctx.is_main:
        weights = {k: v.detach().cpu() for k, v in task.module.state_dict().items()}
        writer.save_safetensors("weights.safetensors", weights)
    return ctx.commit(writer, meta={"steps": result.steps}, inputs=inputs)


def write_order(folder: Path, compute: Mapping[str, Any], **drill: Any) -> None:
    """Write what `python -m tests.support.toy_stage FOLDER` runs.

    Args:
        folder: Storage of the run.
        compute: Section of the configuration.
        drill: `epochs`, `checkpoint_every`, `seconds` per step, `stall` (rank and step where one rank stalls
            once, else None), `hidden` (workers do not find the run's files).
    """
    (folder / "run").mkdir(parents=True, exist_ok=True)
    (folder / "order.json").write_text(json.dumps({"device": "cpu", "threads_per_worker": 1, **compute}))
    default = {"epochs": 4, "checkpoint_every": 3, "seconds": 0.0, "stall": None, "hidden": False}
    write_atomic(folder / "drill.json", json.dumps(default | drill).encode())


def change_drill(folder: Path, **drill: Any) -> None:
    """Another pace from the next step on."""
    write_atomic(folder / "drill.json", json.dumps(_drill(folder) | drill).encode())


def _drill(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "drill.json").read_text()))


def losses(folder: Path) -> list[dict[str, Any]]:
    """Steps in the order in which they were taken."""
    file = folder / "run" / LOSSES
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def weights_file(folder: Path) -> Path:
    """Weights of the finished stage."""
    return next((folder / "artifacts" / "toy").glob("*/weights.safetensors"))


def checkpoints(folder: Path) -> list[int]:
    """Steps of the checkpoints that are whole."""
    found = (folder / "run" / "checkpoints" / "toy").glob("step-*/manifest.json")
    return sorted(int(path.parent.name.removeprefix("step-")) for path in found)


def drive(folder: Path, config: RootConfig, *, entry: str, key: str = "ab" * 32, hidden: bool = False) -> int:
    """Run a toy stage as the pipeline does; an exit code.

    Args:
        folder: Storage of the run.
        config: The run's.
        entry: The stage, `module:function`.
        key: Key of its artifact.
        hidden: Workers do not find the run's files.
    """
    owner = ""
    if os.environ.get("RANK", "0") == "0":
        owner = uuid.uuid4().hex
        if not hidden:
            (folder / "run" / OWNER).write_text(owner)
    order: Order = {
        "stage": "toy",
        "entry": entry,
        "key": key,
        "config": config.model_dump(mode="json"),
        "recipe": {},
        "inputs": {},
        "storage": str(folder),
        "run_dir": str(folder / "run"),
        "owner": owner,
        "progress_file": None,
    }
    try:
        with stop_on_sigterm():
            launch(order)
    except QbrecError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


def main(folder: Path) -> int:
    """Drive the stage of this module."""
    config = parse_config({"compute": json.loads((folder / "order.json").read_text())})
    return drive(folder, config, entry="tests.support.toy_stage:run", hidden=_drill(folder)["hidden"])


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
