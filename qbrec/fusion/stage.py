"""Stage 1 from artifact to artifact: a catalogue in, one fused vector per item out."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qbrec.config.root import RootConfig
from qbrec.config.stages import FusionConfig
from qbrec.engine.context import StageContext
from qbrec.engine.train import TrainResult, train
from qbrec.errors import ConfigError, DataError
from qbrec.fusion.batches import Collator, Dropout, item_fields
from qbrec.fusion.behaviour import behaviour_vectors, training_histories
from qbrec.fusion.embed import CHUNK, FusionEncoder, retrieval
from qbrec.fusion.loss import count_anchors, multi_view_loss, pair_weights, view_pairs
from qbrec.fusion.model import BEHAVIOUR, STRUCTURE, FusionBatch, FusionModel, ModalitySpec
from qbrec.storage.artifact import Artifact, ArtifactWriter, write_atomic
from qbrec.storage.block_format import index_dtype
from qbrec.storage.block_reader import BlockSet
from qbrec.storage.blocks import BlockTarWriter, write_block_index
from qbrec.storage.loader import BatchLoader

TABLE_LIMIT = 10_000_000  # items up to which `id_embedding: auto` gives every item its own ID row
_FIELDS = ("depth", "fused", "row")
_SHARD_BLOCKS = 32  # of CHUNK rows: tars of about 32 MB
_PARTS = 16  # small catalogues are cut into about this many tars, so that every rank has some to write


class FusionTask:
    """What `engine.train` optimises: the multi-view loss of one group of items per micro-batch."""

    def __init__(self, model: FusionModel, config: FusionConfig) -> None:
        self.module: nn.Module = model
        self.pairs = view_pairs(model.modalities)
        self.weights = pair_weights(
            model.modalities, self.pairs, behaviour=config.behaviour_weight, cross=config.cross_weight
        )
        self.temperature = config.loss_temperature

    def prepare(self, batch: FusionBatch, device: torch.device) -> tuple[FusionBatch, Tensor]:
        """The batch on the device and its weighted number of anchors."""
        batch = batch.to(device)
        return batch, count_anchors(batch.present, pairs=self.pairs, weights=self.weights)

    def loss(self, module: nn.Module, batch: FusionBatch) -> Tensor:
        """Sum over the anchors of all pairs of views."""
        fused, views, _ = module(batch)
        total, _ = multi_view_loss(
            fused,
            views,
            present=batch.present,
            content=batch.content,
            pairs=self.pairs,
            weights=self.weights,
            temperature=self.temperature,
        )
        return total


def run(ctx: StageContext, config: RootConfig, inputs: Mapping[str, Artifact]) -> Artifact:
    """Train the fusion network on the catalogue and embed every item with the hard gate.

    Called on every rank. Training goes on from its last checkpoint; embedding is one cheap pass.

    Args:
        ctx: Rank, device, storage.
        config: The whole configuration; `fusion` counts.
        inputs: `catalog`.

    Returns:
        The fusion artifact: model.safetensors, id_rows.safetensors (if it has an ID table),
        statistics.safetensors, behaviour.npy (float16 [N, d], if it has that view), fused-*.tar of `row`,
        `fused`, `depth`.

    Raises:
        ConfigError: A modality of the catalogue is called like one of ours.
        DataError: No item has any modality.
    """
    fusion, catalog = config.fusion, inputs["catalog"]
    items = BlockSet.open(catalog, "items")
    behaviour = _behaviour(ctx, fusion, catalog, num_items=items.num_samples)
    modalities = _modalities(catalog, items, behaviour)
    statistics = _statistics(catalog, modalities, behaviour)
    small = items.num_samples < TABLE_LIMIT
    table = fusion.id_embedding == "table" or (fusion.id_embedding == "auto" and small)
    torch.manual_seed(ctx.sub_seed("fusion.init"))
    model = FusionModel(
        modalities,
        width=fusion.width,
        depth=fusion.depth,
        heads=fusion.heads,
        alignment_temperature=fusion.alignment_temperature,
        num_rows=items.num_samples if table else 0,
        statistics=statistics,
    )
    plain = Collator(modalities, behaviour=behaviour, own_rows=table, dropout=None)
    result = _train(ctx, fusion, model, items, plain)
    encoder = FusionEncoder(model, device=ctx.device)
    writer = ctx.writer()
    mean_depth = _embed_catalog(ctx, writer, items, encoder, plain)
    if ctx.is_main:
        weights = {k: v for k, v in model.state_dict().items() if not k.startswith("id_rows.")}
        writer.save_safetensors("model.safetensors", weights)
        writer.save_safetensors("statistics.safetensors", statistics)
        if table:
            assert model.id_rows is not None
            writer.save_safetensors("id_rows.safetensors", {"id_rows.weight": model.id_rows.weight})
        if behaviour is not None:
            writer.save_npy("behaviour.npy", behaviour)
    meta = {
        "width": fusion.width,
        "depth": fusion.depth,
        "heads": fusion.heads,
        "alignment_temperature": fusion.alignment_temperature,
        "modalities": [{"name": s.name, "kind": s.kind, "dim": s.dim} for s in modalities],
        "id_embedding": "table" if table else "shared",
        "num_items": items.num_samples,
        "mean_depth": mean_depth,
        "steps": result.steps,
        "alignment": {k: v for k, v in result.best.items() if k not in ("step", "epoch")},
    }
    artifact = ctx.commit(writer, meta=meta, inputs=inputs)
    if ctx.is_main:
        _behaviour_file(ctx).unlink(missing_ok=True)  # the artifact holds it
    return artifact


def _train(
    ctx: StageContext, fusion: FusionConfig, model: FusionModel, items: BlockSet, plain: Collator
) -> TrainResult:
    fields = item_fields(model.modalities)
    hide = Dropout(fusion.id_dropout, fusion.modality_dropout, seed=ctx.sub_seed("fusion.dropout"))
    loader = BatchLoader(
        items,
        batch_size=fusion.train.batch_size,
        micro_batch=fusion.train.micro_batch,
        seed=ctx.sub_seed("fusion.order"),
        rank=ctx.rank,
        world=ctx.world,
        collate=Collator(model.modalities, behaviour=plain.behaviour, own_rows=plain.own_rows, dropout=hide),
        fields=fields,
        pin=ctx.device.type == "cuda",
    )
    # Rows are in hash order, so the first ones are a random sample.
    rows = np.arange(min(items.num_samples, CHUNK), dtype=np.int64)
    sample = plain(items.take(rows, fields), rows, 0).to(ctx.device)

    def evaluate(module: nn.Module) -> dict[str, float]:
        fused, depth, views = cast(FusionModel, module).embed(sample)
        hits = retrieval(fused, views, sample, model.modalities)
        return {**hits, "retrieval": sum(hits.values()) / len(hits), "depth": float(depth.float().mean())}

    monitor = "retrieval" if fusion.train.patience else None
    task = FusionTask(model, fusion)
    return train(ctx, task, loader, config=fusion.train, label="fusion", evaluate=evaluate, monitor=monitor)


def _modalities(catalog: Artifact, items: BlockSet, behaviour: NDArray[Any] | None) -> list[ModalitySpec]:
    meta = catalog.meta
    found = [
        ModalitySpec(name, "dense", facts["dim"])
        for name, facts in sorted(meta["modalities"].items())
        if facts["present"]
    ]
    for name in (BEHAVIOUR, STRUCTURE):
        if any(spec.name == name for spec in found):
            raise ConfigError(
                f"a modality of the catalogue is called {name!r}, which the fusion stage uses itself",
                where=f"items, column {name}_embedding",
                fix="rename the column",
            )
    # Stops at the first block that has any: a catalogue without categories and brands is the rare case.
    if any((items.view(block, STRUCTURE) >= 0).any() for block in range(items.num_blocks)):
        found.append(ModalitySpec(STRUCTURE, "bag", meta["structure_buckets"]))
    if not found:
        raise DataError(
            "no item has text, image, embedding, category or brand: there is nothing to fuse",
            where=str(catalog.path),
            fix="bring at least one of these columns in the items",
        )
    if behaviour is not None:
        found.append(ModalitySpec(BEHAVIOUR, "dense", behaviour.shape[1]))
    return found


def _statistics(
    catalog: Artifact, modalities: list[ModalitySpec], behaviour: NDArray[Any] | None
) -> dict[str, Tensor]:
    stored = catalog.load_safetensors("statistics.safetensors")
    frozen = {}
    for spec in modalities:
        if spec.name == BEHAVIOUR:
            assert behaviour is not None
            # Rows have unit root mean square already; scaling each dimension would blow up the weak ones.
            frozen[f"mean.{BEHAVIOUR}"] = torch.zeros(spec.dim)
            frozen[f"std.{BEHAVIOUR}"] = torch.ones(spec.dim)
        elif spec.kind == "dense":
            for part in ("mean", "std"):
                frozen[f"{part}.{spec.name}"] = stored[f"{part}.{spec.name}"]
    return frozen


def _behaviour_file(ctx: StageContext) -> Any:
    return ctx.checkpoint_dir / f"behaviour-{ctx.key[:16]}.npy"


def _behaviour(
    ctx: StageContext, fusion: FusionConfig, catalog: Artifact, *, num_items: int
) -> NDArray[Any] | None:
    """Behaviour features of all items, computed once by rank 0 and mapped by the others."""
    if not fusion.behaviour_dim:
        return None
    path = _behaviour_file(ctx)
    if ctx.is_main and not path.exists():
        seed = ctx.sub_seed("fusion.behaviour")
        histories = training_histories(
            BlockSet.open(catalog, "histories"), max_interactions=fusion.behaviour_interactions, seed=seed
        )
        dim, window = fusion.behaviour_dim, fusion.behaviour_window
        vectors = behaviour_vectors(histories, num_items=num_items, dim=dim, window=window, seed=seed)
        buffer = io.BytesIO()
        np.save(buffer, vectors.astype(np.float16), allow_pickle=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, buffer.getvalue())
    ctx.barrier()
    mapped: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return mapped


def _embed_catalog(
    ctx: StageContext, writer: ArtifactWriter, items: BlockSet, encoder: FusionEncoder, plain: Collator
) -> float:
    """Write the fused vectors of this rank's shards and the index of all; the mean depth over all items.

    Shards and blocks are cut on the global row grid, so the files do not depend on the number of ranks.
    """
    fields = item_fields(encoder.model.modalities)
    blocks = -(-items.num_samples // CHUNK)
    per_shard = min(-(-blocks // _PARTS), _SHARD_BLOCKS)
    shards = -(-blocks // per_shard)
    own = range(shards * ctx.rank // ctx.world, shards * (ctx.rank + 1) // ctx.world)
    progress = ctx.progress(len(own) * per_shard, "embed items")
    depths, records = 0, []
    for shard in own:
        with BlockTarWriter(writer.path, prefix="fused", first_shard=shard, shard_bytes=1 << 40) as tar:
            for block in range(shard * per_shard, min((shard + 1) * per_shard, blocks)):
                rows = np.arange(block * CHUNK, min((block + 1) * CHUNK, items.num_samples), dtype=np.int64)
                fused, depth = encoder.embed_batch(plain(items.take(rows, fields), rows, 0))
                tar.add({"row": rows, "fused": fused, "depth": depth}, len(rows))
                depths += int(depth.sum(dtype=np.int64))
                progress.update()
            records.append(tar.close())
    progress.close()
    data = b"".join(part.tobytes() for part in records)
    # A rank without shards still takes part in the exchange.
    mine = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)
    parts = ctx.gather_bytes(mine.to(ctx.device))
    total = ctx.all_reduce(torch.tensor(depths, dtype=torch.int64, device=ctx.device))
    if ctx.is_main:
        dtype = index_dtype(list(_FIELDS))
        index = [np.frombuffer(part.cpu().numpy().tobytes(), dtype=dtype) for part in parts]
        write_block_index(writer.path / "blocks.fused.npy", index)
    return float(total) / items.num_samples
