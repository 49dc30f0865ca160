"""Fused vectors of stage 1 as this stage reads them: a rank's rows in memory, any rows from disk."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qbrec.engine.context import StageContext
from qbrec.errors import DataError
from qbrec.quantizer.kmeans.chunks import Shard, split_rows, standardise, stratified
from qbrec.storage.blocks import BlockSet

Standard = tuple[Tensor, Tensor]


def load_shard(ctx: StageContext, blocks: BlockSet, *, held_out: float) -> tuple[Shard, Standard]:
    """This rank's rows, standardised per dimension, with the held-out ones marked; mean and deviation.

    Args:
        ctx: Rank, devices.
        blocks: Of the fusion artifact.
        held_out: Share of the items that a fit must not see.

    Raises:
        DataError: A vector is not finite.
    """
    total = blocks.num_samples
    start, stop = split_rows(total, rank=ctx.rank, world=ctx.world)
    fused = torch.from_numpy(blocks.column("fused", start, stop)).float().to(ctx.device)
    bad = (~torch.isfinite(fused).all(1)).nonzero()
    # Every rank learns of it, so that all stop together.
    first = torch.tensor([total if not len(bad) else start + int(bad[0])], device=ctx.device)
    ctx.all_reduce(first, op="min")
    if int(first) < total:
        raise DataError(
            f"the fused vector of item row {int(first)} is not finite",
            where=f"artifact {blocks.fingerprint[:16]}",
            fix="the fusion training has diverged: lower fusion.train.learning_rate and run again",
        )
    train = None
    held = held_out_rows(ctx, total, held_out)
    if len(held):
        train = torch.ones(stop - start, dtype=torch.bool, device=ctx.device)
        train[torch.from_numpy(held[(held >= start) & (held < stop)] - start).to(ctx.device)] = False
    standard = standardise(Shard(fused, start, total), ctx)
    return Shard(fused, start, total, train), standard


def held_out_rows(ctx: StageContext, total: int, share: float) -> NDArray[np.int64]:
    """Rows that a fit must not see, ascending, the same on every rank."""
    count = int(total * share)
    return stratified(total, count, seed=ctx.sub_seed("quantizer.held_out"))


def take_fused(blocks: BlockSet, rows: NDArray[np.int64], device: torch.device) -> Tensor:
    """Fused vectors of any rows, float32 [n, D]."""
    fused = blocks.take(rows, ["fused"])["fused"]
    assert isinstance(fused, np.ndarray)
    return torch.from_numpy(fused).float().to(device)
