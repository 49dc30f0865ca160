"""Gather tensors of neighbouring ranks on all of them, with gradients back to where they came from."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qbrec.engine.context import StageContext


class Neighbours:
    """Blocks of `size` consecutive ranks, each a process group of its own. Made on every rank.

    Args:
        ctx: The rank's context.
        size: Ranks of a block; it divides the world size.
    """

    def __init__(self, ctx: StageContext, size: int) -> None:
        assert ctx.world % size == 0
        self.size, self.place = size, ctx.rank % size
        self._group: Any = None
        if 1 < size < ctx.world:
            blocks = [list(range(first, first + size)) for first in range(0, ctx.world, size)]
            # Every rank has to take part in making every group.
            groups = [dist.new_group(block) for block in blocks]
            self._group = groups[ctx.rank // size]

    @classmethod
    def sharing(cls, ctx: StageContext, parts: int) -> Neighbours:
        """Blocks in which as many ranks as possible share `parts` equal parts of something evenly."""
        return cls(ctx, math.gcd(ctx.world, parts))

    def gather(self, tensor: Tensor) -> Tensor:
        """Tensors of the block, concatenated along the first dimension; they have one shape. Collective."""
        if self.size == 1:
            return tensor
        gathered: Tensor = _Gather.apply(tensor, self)  # type: ignore[no-untyped-call]
        return gathered

    def gather_now(self, tensor: Tensor) -> Tensor:
        """The same without gradients."""
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous(), group=self._group)
        return torch.cat(parts)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the block, in place. Collective."""
        dist.all_reduce(tensor, group=self._group)
        return tensor


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, tensor: Tensor, neighbours: Neighbours) -> Tensor:
        context.neighbours, context.length = neighbours, len(tensor)
        return neighbours.gather_now(tensor)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # What this rank gave has an effect on the loss of every rank of the block.
        total = context.neighbours.sum(gradients[0].contiguous().clone())
        begin = context.neighbours.place * context.length
        return total[begin : begin + context.length], None
