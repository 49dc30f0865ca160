"""A small task that uses rows: some samples have none, rows repeat, batches are uneven."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from qbrec.config.stages import TrainConfig
from qbrec.engine.context import StageContext
from qbrec.engine.rows import RowUse, ShardedRows
from tests.support.training import ToyLoader

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


class RowLoader(ToyLoader):
    """The same samples in the same order, most of them with a row."""

    def __init__(self, rank: int, world: int, *, n: int = 37, stop_at: int = 0) -> None:
        super().__init__(rank, world, n=n, stop_at=stop_at)
        self.rows = torch.randint(-1, NUM_ROWS, (n,), generator=self.generator)
        self.rows[::5] = -1
        self.fingerprint = f"rows of {n}"

    def batch(self, samples: torch.Tensor) -> RowBatch:
        return RowBatch(self.rows[samples], self.x[samples], self.y[samples])
