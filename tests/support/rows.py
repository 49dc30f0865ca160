"""A small task that uses rows: some samples have none, rows repeat, batches are uneven."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from qbrec.config.stages import TrainConfig
from qbrec.engine.context import StageContext
from qbrec.engine.rows import RowUse, ShardedRows
from tests.support.training import Interrupted

CONFIG = TrainConfig(
    epochs=4, batch_size=8, micro_batch=2, learning_rate=1e-2, clip_norm=0.3, checkpoint_every=3
)
ROW_RATE = 0.05
NUM_ROWS, WIDTH = 40, 6


@dataclass(frozen=True)
class RowBatch:
    rows: torch.Tensor  # int64 [b], -1 for none
    x: torch.Tensor  # [b, 6]
    y: torch.Tensor  # [b, 3]
    own: torch.Tensor | None = None  # [b, 6]


class RowTask:
    """Regression on features and the row of a sample."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module: nn.Module = nn.Sequential(nn.Linear(6 + WIDTH, 32), nn.GELU(), nn.Linear(32, 3))

    def prepare(self, batch: RowBatch, device: torch.device) -> tuple[RowBatch, torch.Tensor]:
        return batch, torch.tensor(float(len(batch.x)))

    def bind(self, batch: RowBatch, vectors: torch.Tensor) -> RowBatch:
        return replace(batch, own=vectors)

    def loss(self, module: nn.Module, batch: RowBatch) -> torch.Tensor:
        assert batch.own is not None
        kind = next(self.module.parameters() if module is self.module else module.module.parameters()).dtype
        predicted = module(torch.cat([batch.x, batch.own], dim=1).to(kind))
        return (predicted.float() - batch.y).square().sum()


def row_use(ctx: StageContext) -> RowUse:
    table = ShardedRows(ctx, num_rows=NUM_ROWS, width=WIDTH, std=0.1, clip_norm=CONFIG.clip_norm)
    return RowUse(table, ids=lambda batch: batch.rows, bind=RowTask().bind, learning_rate=ROW_RATE)


class RowLoader:
    """37 samples in batches of 8, micro-batches of 2, dealt to the ranks in turn; the last is small."""

    def __init__(self, rank: int, world: int, *, n: int = 37, stop_at: int = 0) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(n, 6, generator=generator)
        self.y = torch.randn(n, 3, generator=generator)
        self.rows = torch.randint(-1, NUM_ROWS, (n,), generator=generator)
        self.rows[::5] = -1
        self.stop_at = stop_at  # optimiser step before which the machine is lost; 0: never
        self.rank, self.world, self.steps_per_epoch = rank, world, -(-n // 8)
        self.fingerprint = f"rows of {n}"

    def iterate(self, epoch: int, *, start: int = 0) -> Iterator[list[RowBatch | None]]:
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(100 + epoch))
        for step in range(start, self.steps_per_epoch):
            if self.stop_at and epoch * self.steps_per_epoch + step == self.stop_at:
                raise Interrupted
            micro = list(order[step * 8 : step * 8 + 8].split(2))
            rounds = -(-len(micro) // self.world)
            mine = [index * self.world + self.rank for index in range(rounds)]
            yield [self._batch(micro[j]) if j < len(micro) else None for j in mine]

    def first(self) -> RowBatch:
        return self._batch(torch.arange(2))

    def _batch(self, samples: torch.Tensor) -> RowBatch:
        return RowBatch(self.rows[samples], self.x[samples], self.y[samples])
