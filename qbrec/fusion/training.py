"""What the engine trains in stage 1: groups of items, their ID rows, the multi-view loss."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from qbrec.config.stages import FusionConfig
from qbrec.engine.context import StageContext
from qbrec.engine.gather import Neighbours
from qbrec.engine.rows import RowUse, ShardedRows
from qbrec.engine.train import TrainResult, train
from qbrec.fusion.batches import Collator, Dropout, item_fields
from qbrec.fusion.embed import CHUNK, retrieval
from qbrec.fusion.loss import GroupViews, count_anchors, multi_view_loss, pair_weights, view_pairs
from qbrec.fusion.model import FusionBatch, FusionModel
from qbrec.storage.block_reader import BlockSet
from qbrec.storage.loader import BatchLoader


class FusionTask:
    """The loss of a group of items; a micro-batch is a whole group, or what one of several ranks has of it.

    Args:
        model: The network.
        config: Weights and temperature of the loss.
        neighbours: Ranks that share a group.
        micro_batch: Items of a full micro-batch: what shorter ones are padded to where groups are shared.
    """

    def __init__(
        self, model: FusionModel, config: FusionConfig, *, neighbours: Neighbours, micro_batch: int
    ) -> None:
        self.module: nn.Module = model
        self.pairs = view_pairs(model.modalities)
        self.weights = pair_weights(
            model.modalities, self.pairs, behaviour=config.behaviour_weight, cross=config.cross_weight
        )
        self.temperature = config.loss_temperature
        self.neighbours, self.micro_batch = neighbours, micro_batch

    def prepare(self, batch: FusionBatch, device: torch.device) -> tuple[FusionBatch, Tensor]:
        """The batch on the device and its weighted number of anchors."""
        batch = batch.to(device)
        return batch, count_anchors(batch.present, pairs=self.pairs, weights=self.weights)

    def loss(self, module: nn.Module, batch: FusionBatch) -> Tensor:
        """Sum over this rank's anchors of all pairs of views."""
        fused, views, _ = module(batch)
        vectors = torch.cat([views, fused[None].to(views.dtype)])
        own = group = GroupViews(vectors, batch.present, batch.content)
        if self.neighbours.size > 1:
            own = self._padded(own)
            group = self._gathered(own)
        total, _ = multi_view_loss(
            own,
            group,
            first=self.neighbours.place * len(own.present) if group is not own else 0,
            pairs=self.pairs,
            weights=self.weights,
            temperature=self.temperature,
        )
        return total

    def _padded(self, own: GroupViews) -> GroupViews:
        """The last micro-batch of an epoch may be short; padding is present in no view."""
        missing = self.micro_batch - len(own.present)
        if not missing:
            return own
        return GroupViews(
            nn.functional.pad(own.vectors, (0, 0, 0, missing)),
            nn.functional.pad(own.present, (0, 0, 0, missing)),
            nn.functional.pad(own.content, (0, 0, 0, missing)),
        )

    def _gathered(self, own: GroupViews) -> GroupViews:
        # gloo knows neither bool nor bfloat16 in every operation, and the loss computes in float32.
        vectors = self.neighbours.gather(own.vectors.float().transpose(0, 1).contiguous())
        present = self.neighbours.gather_now(own.present.to(torch.uint8))
        content = self.neighbours.gather_now(own.content)
        return GroupViews(vectors.transpose(0, 1), present.bool(), content)


class GroupLoader(BatchLoader[FusionBatch]):
    """Micro-batches of items; what a rank without one runs takes part in no group."""

    def first(self) -> FusionBatch:
        """The first items, present in no view: negatives of nobody."""
        batch = super().first()
        return replace(batch, present=torch.zeros_like(batch.present))


def train_fusion(
    ctx: StageContext,
    fusion: FusionConfig,
    model: FusionModel,
    *,
    items: BlockSet,
    plain: Collator,
    rows: ShardedRows | None,
) -> TrainResult:
    """Train the network, and the ID rows where there are any; both are left in their final state.

    Args:
        ctx: The rank's context.
        fusion: Sizes, dropout, schedule.
        model: The network; its weights are replaced.
        items: Blocks of the catalogue's items.
        plain: Makes batches without dropout.
        rows: ID rows of the items, or None.
    """
    fields = item_fields(model.modalities)
    hide = Dropout(fusion.id_dropout, fusion.modality_dropout, seed=ctx.sub_seed("fusion.dropout"))
    neighbours = Neighbours.sharing(ctx, fusion.group // fusion.train.micro_batch)
    micro_batch = fusion.group // neighbours.size
    loader = GroupLoader(
        items,
        batch_size=fusion.train.batch_size,
        micro_batch=micro_batch,
        seed=ctx.sub_seed("fusion.order"),
        rank=ctx.rank,
        world=ctx.world,
        collate=Collator(model.modalities, behaviour=plain.behaviour, own_rows=plain.own_rows, dropout=hide),
        fields=fields,
        pin=ctx.device.type == "cuda",
    )
    # Rows are in hash order, so the first ones are a random sample.
    sampled = np.arange(min(items.num_samples, CHUNK), dtype=np.int64)
    sample = plain(items.take(sampled, fields), sampled, 0).to(ctx.device)

    def evaluate(module: nn.Module) -> dict[str, float]:
        batch = sample if rows is None else replace(sample, own=rows.lookup(rows.route(sample.rows)))
        fused, depth, views = cast(FusionModel, module).embed(batch)
        hits = retrieval(fused, views, batch, model.modalities)
        return {**hits, "retrieval": sum(hits.values()) / len(hits), "depth": float(depth.float().mean())}

    use = None
    if rows is not None:
        use = RowUse(
            rows,
            ids=lambda batch: batch.rows,
            bind=lambda batch, vectors: replace(batch, own=vectors),
            learning_rate=fusion.row_learning_rate,
        )
    return train(
        ctx,
        FusionTask(model, fusion, neighbours=neighbours, micro_batch=micro_batch),
        loader,
        config=fusion.train,
        label="fusion",
        evaluate=evaluate,
        monitor="retrieval" if fusion.train.patience else None,
        rows=use,
    )
