"""A small task and loader with what the loop must handle: dropout, uneven last batches, masked targets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


class Interrupted(Exception):
    """Stands for a machine that is lost in the middle of an epoch."""


class ToyTask:
    """Regression with dropout; every sample has a different number of targets."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module: nn.Module = nn.Sequential(nn.Linear(6, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, 3))

    def prepare(
        self, batch: tuple[torch.Tensor, torch.Tensor], device: torch.device
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        x, y = batch
        mask = (x[:, :1] > -0.5).float()
        return (x.to(device), y.to(device), mask.to(device)), mask.sum()

    def loss(self, module: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        x, y, mask = batch
        inner = module.module if hasattr(module, "module") else module  # DeepSpeed's engine holds it
        kind = next(inner.parameters()).dtype
        return (((module(x.to(kind)).float() - y) ** 2).sum(1, keepdim=True) * mask).sum()


class ToyLoader:
    """`n` samples in batches of 8, micro-batches of 2, dealt to the ranks in turn; the last is small."""

    def __init__(self, rank: int, world: int, *, n: int = 37, stop_at: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(n, 6, generator=self.generator)
        self.y = torch.randn(n, 3, generator=self.generator)
        self.stop_at = stop_at  # optimiser step before which the machine is lost; 0: never
        self.rank, self.world, self.steps_per_epoch = rank, world, -(-n // 8)
        self.fingerprint = f"toy of {n}"

    def iterate(self, epoch: int, *, start: int = 0) -> Iterator[list[Any]]:
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(100 + epoch))
        for step in range(start, self.steps_per_epoch):
            if self.stop_at and epoch * self.steps_per_epoch + step == self.stop_at:
                raise Interrupted
            micro = list(order[step * 8 : step * 8 + 8].split(2))
            rounds = -(-len(micro) // self.world)
            mine = [index * self.world + self.rank for index in range(rounds)]
            yield [self.batch(micro[j]) if j < len(micro) else None for j in mine]

    def first(self) -> Any:
        return self.batch(torch.arange(2))

    def batch(self, samples: torch.Tensor) -> Any:
        return self.x[samples], self.y[samples]
