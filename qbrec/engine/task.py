"""What the training loop asks of those who bring a model and data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import nn


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
