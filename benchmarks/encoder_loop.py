"""The training loop around the encoder's step: what DeepSpeed costs, and the wait for data.

Part of `encoder.py`, which says what is measured.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from made_up import write_histories
from torch import nn

from qbrec.config import RootConfig, parse_config
from qbrec.config.stages import TrainConfig
from qbrec.engine.context import StageContext
from qbrec.engine.history_loader import history_loader
from qbrec.engine.schedule import schedule
from qbrec.engine.train import train as engine_train
from qbrec.engine.worker import join_group, leave_group
from qbrec.sequence.packing import PackedRows
from qbrec.sequence.tasks import HistoryCollate, MaskedTask
from qbrec.storage.artifact import Artifact, ArtifactStore
from qbrec.storage.catalog_view import CatalogView

CPU = torch.device("cpu")
BLOCK = 2500  # users; small enough for several windows of shuffling
Steps = list[list[PackedRows]]
Run = tuple[list[float], list[float]]  # seconds and loss of every step


def own_step(task: MaskedTask, module: nn.Module) -> Callable[[PackedRows], None]:
    optimizer = torch.optim.AdamW(module.parameters(), 1e-3, fused=True)

    def step(batch: PackedRows) -> None:
        prepared, count = task.prepare(batch, CPU)
        (task.loss(module, prepared) / count).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def best(rounds: list[list[float]]) -> float:
    """Seconds of all steps, each in its best round: other work on the machine only ever adds to a time."""
    return sum(map(min, zip(*rounds, strict=True)))


def ratios(ours: list[list[float]], rival: list[list[float]]) -> list[float]:
    return [sum(a) / sum(b) for a, b in zip(ours, rival, strict=True)]


def spread(found: list[float]) -> str:
    return f"rounds {min(found):.2f} to {max(found):.2f}"


class FixedBatches:
    """`engine.task.Loader` over given steps; notes when each step is asked for."""

    def __init__(self, steps: list[list[PackedRows]]) -> None:
        self.steps, self.steps_per_epoch, self.fingerprint = steps, len(steps), "fixed"
        self.asked: list[float] = []

    def iterate(self, epoch: int, *, start: int = 0) -> Iterator[list[PackedRows]]:
        for step in self.steps[start:]:
            self.asked.append(time.perf_counter())
            yield step
        self.asked.append(time.perf_counter())

    def first(self) -> PackedRows:
        return self.steps[0][0]


def plain_torch(
    ctx: StageContext, task: MaskedTask, steps: list[list[PackedRows]], train: TrainConfig
) -> Run:
    """What `engine.train` does, without DeepSpeed, ranks, finiteness checks, meter or checkpoints."""
    module = copy.deepcopy(task.module).train()
    groups = [
        {"params": [p for p in module.parameters() if p.ndim >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in module.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=train.learning_rate, betas=train.betas, eps=1e-8, fused=True)
    seconds, losses = [], []
    for number, step in enumerate(steps):
        began = time.perf_counter()
        prepared = [task.prepare(batch, CPU) for batch in step]
        count = sum(targets for _, targets in prepared)
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate * schedule(train, number, len(steps))
        total = torch.zeros(())
        for place, (batch, _) in enumerate(prepared):
            torch.manual_seed(ctx.sub_seed(f"{ctx.stage}/dropout/{number}/{place}"))
            loss = task.loss(module, batch)
            total += loss.detach()
            (loss / count).backward()
        nn.utils.clip_grad_norm_(module.parameters(), train.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(total / count))
        seconds.append(time.perf_counter() - began)
    return seconds, losses


def with_engine(root: RootConfig, task: MaskedTask, steps: Steps, train: TrainConfig, *, stage: int) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        ctx = StageContext.local(ArtifactStore(folder), folder, stage="encoder")
        ctx.compute = root.compute.model_copy(update={"zero_stage": stage})
        ctx.progress_file = Path(folder) / "progress"  # rather than draw it
        loader = FixedBatches(steps)
        result = engine_train(ctx, copy.deepcopy(task), loader, config=train, label="encoder")
    return np.diff(loader.asked).tolist(), result.losses


def compare_engines(task: MaskedTask, batches: list[PackedRows], *, rounds: int) -> dict[int, float]:
    """Overhead of `engine.train` by ZeRO stage; a step is two micro-batches."""
    size = len(batches[0].lengths)
    root = parse_config({"data": {"domains": {"shop": {"items": "-", "interactions": "-"}}}})
    train = TrainConfig(epochs=1, batch_size=2 * size, micro_batch=size, checkpoint_every=10**6)
    steps = [batches[i : i + 2] for i in range(0, len(batches), 2)]
    seconds: dict[int, list[list[float]]] = {stage: [] for stage in (-1, 0, 1, 2, 3)}  # -1: plain torch
    joined = join_group(root)
    try:
        with tempfile.TemporaryDirectory() as folder:
            ctx = StageContext.local(ArtifactStore(folder), folder, stage="encoder")
            for _ in range(rounds):
                times, expected = plain_torch(ctx, task, steps, train)
                seconds[-1].append(times[1:])  # the first step warms up
                for stage in range(4):
                    times, losses = with_engine(root, task, steps, train, stage=stage)
                    np.testing.assert_allclose(losses, expected, rtol=1e-3)
                    seconds[stage].append(times[1:])
    finally:
        if joined:
            leave_group()
    overhead = {stage: best(seconds[stage]) / best(seconds[-1]) - 1 for stage in range(4)}
    shown = [f"ZeRO {z} {1 + v:.2f} ({spread(ratios(seconds[z], seconds[-1]))})" for z, v in overhead.items()]
    print("  engine / plain torch:", ", ".join(shown))
    return overhead


def histories_artifact(store: ArtifactStore, lengths: np.ndarray, *, num_items: int) -> Artifact:
    """An artifact with histories whose training parts have these lengths."""
    writer = store.writer("catalog", "c" * 64)
    writer.prepare()
    rng = np.random.default_rng(3)
    write_histories(writer.path, lengths + 2, num_items=num_items, block=BLOCK, rng=rng)
    return writer.commit(meta={"num_items": num_items, "domains": ["shop"]}, inputs={}, config={}, seed=0)


def data_wait(
    task: MaskedTask, lengths: np.ndarray, *, num_items: int, size: int, steps: int, rounds: int
) -> float:
    """Share of a training loop that waits for the loader, which reads, shuffles and packs in its thread."""
    step, max_items = own_step(task, task.module), int(lengths.max())
    train = TrainConfig(batch_size=2 * size, micro_batch=size)
    shares, firsts = [], []
    with tempfile.TemporaryDirectory() as folder:
        store = ArtifactStore(folder)
        catalog = CatalogView(histories_artifact(store, lengths, num_items=num_items))
        ctx = StageContext.local(store, folder, stage="encoder")
        collate = HistoryCollate(max_items=max_items, seed=0, prefix=0.5)
        loader = history_loader(ctx, catalog, train, collate=collate, domain=None)
        for epoch in range(rounds):
            waits, worked = [], []
            prepared = iter(loader.iterate(epoch))
            for _ in range(steps + 1):
                asked = time.perf_counter()
                batches = next(prepared)
                given = time.perf_counter()
                for batch in batches:
                    assert batch is not None
                    step(batch)
                waits.append(given - asked)
                worked.append(time.perf_counter() - given)
            del prepared  # ends the thread
            shares.append(sum(waits[1:]) / (sum(waits[1:]) + sum(worked[1:])))
            firsts.append(waits[0])
    share = statistics.median(shares)
    print(f"  waits for data: {share:.4f} of the time, rounds {min(shares):.4f} to {max(shares):.4f}; "
          f"first batch after {statistics.median(firsts) * 1e3:.0f} ms")  # fmt: skip
    return share
