"""Stage 1 from artifact to artifact: a catalogue in, one fused vector per item out."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qbrec.config.root import RootConfig
from qbrec.config.stages import FusionConfig
from qbrec.engine.context import StageContext
from qbrec.engine.rows import ShardedRows, rows_file
from qbrec.errors import ConfigError, DataError
from qbrec.fusion.batches import Collator
from qbrec.fusion.behaviour import behaviour_vectors, training_histories
from qbrec.fusion.catalog_pass import embed_catalog
from qbrec.fusion.embed import FusionEncoder
from qbrec.fusion.model import BEHAVIOUR, QUERY_STD, STRUCTURE, FusionModel, ModalitySpec
from qbrec.fusion.training import train_fusion
from qbrec.ranking.counted import COUNTED
from qbrec.storage.artifact import Artifact, write_atomic
from qbrec.storage.block_reader import BlockSet

TABLE_LIMIT = 10_000_000  # items up to which `id_embedding: auto` gives every item its own ID row


def run(ctx: StageContext, config: RootConfig, inputs: Mapping[str, Artifact]) -> Artifact:
    """Train the fusion network on the catalogue and embed every item with the hard gate.

    Called on every rank. Training goes on from its last checkpoint; embedding is one cheap pass.

    Args:
        ctx: Rank, device, storage.
        config: The whole configuration; `fusion` counts.
        inputs: `catalog`.

    Returns:
        The fusion artifact: model.safetensors, rows-*.safetensors (if it has an ID table),
        statistics.safetensors, behaviour.npy (float16 [N, d], if it has that view), fused-*.tar of `row`,
        `fused`, `depth`.

    Raises:
        ConfigError: A modality of the catalogue is called like one of ours, or `fusion.modalities` names one
            that there is not.
        DataError: No item has any modality.
    """
    fusion, catalog = config.fusion, inputs["catalog"]
    items = BlockSet.open(catalog, "items")
    behaviour = _behaviour(ctx, fusion, catalog, num_items=items.num_samples)
    modalities = _chosen(_modalities(catalog, items, behaviour), fusion.modalities)
    statistics = _statistics(catalog, modalities, behaviour)
    identity = _identity(fusion, items.num_samples)
    torch.manual_seed(ctx.sub_seed("fusion.init"))
    model = FusionModel(
        modalities,
        width=fusion.width,
        depth=fusion.depth,
        heads=fusion.heads,
        alignment_temperature=fusion.alignment_temperature,
        gated=fusion.gate,
        hashed_rows=identity == "hashed",
        statistics=statistics,
    )
    rows = None
    if identity == "table":
        rows = ShardedRows(
            ctx,
            num_rows=items.num_samples,
            width=fusion.width,
            std=QUERY_STD,
            clip_norm=fusion.train.clip_norm,
        )
    plain = Collator(modalities, behaviour=behaviour, own_rows=identity != "shared", dropout=None)
    result = train_fusion(ctx, fusion, model, items=items, plain=plain, rows=rows)
    writer = ctx.writer()
    encoder = FusionEncoder(model, device=ctx.device)
    embedded = embed_catalog(ctx, writer, items, encoder, plain, rows=rows)
    if rows is not None:
        for first, vectors, _ in rows.chunks():
            writer.save_safetensors(rows_file(first), {"rows": vectors})
    if ctx.is_main:
        writer.save_safetensors("model.safetensors", model.state_dict())
        writer.save_safetensors("statistics.safetensors", statistics)
        if behaviour is not None:
            writer.save_npy("behaviour.npy", behaviour)
        ctx.log_metrics(
            result.steps,
            {
                "embed/mean_depth": embedded.mean_depth,
                "embed/items_per_second": items.num_samples / embedded.seconds,
            },
        )
    meta = {
        "width": fusion.width,
        "depth": fusion.depth,
        "heads": fusion.heads,
        "alignment_temperature": fusion.alignment_temperature,
        "gated": fusion.gate,
        "modalities": [{"name": s.name, "kind": s.kind, "dim": s.dim} for s in modalities],
        "id_embedding": identity,
        "num_items": items.num_samples,
        "mean_depth": embedded.mean_depth,
        "steps": result.steps,
        "alignment": {k: v for k, v in result.best.items() if k not in ("step", "epoch")},
    }
    artifact = ctx.commit(writer, meta=meta, inputs=inputs)
    if ctx.is_main:
        _behaviour_file(ctx).unlink(missing_ok=True)  # the artifact holds it
    return artifact


def _identity(fusion: FusionConfig, num_items: int) -> str:
    """What `id_embedding` comes to."""
    if fusion.id_embedding == "auto":
        return "table" if num_items < TABLE_LIMIT else "shared"
    return fusion.id_embedding


def _modalities(catalog: Artifact, items: BlockSet, behaviour: NDArray[Any] | None) -> list[ModalitySpec]:
    meta = catalog.meta
    found = [
        ModalitySpec(name, "dense", facts["dim"])
        for name, facts in sorted(meta["modalities"].items())
        if facts["present"]
    ]
    # Ours, and the names of item graphs, beside which content views stand later.
    for name in (BEHAVIOUR, STRUCTURE, *COUNTED, "fused"):
        if any(spec.name == name for spec in found):
            raise ConfigError(
                f"a modality of the catalogue is called {name!r}, which we use ourselves",
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


def _chosen(found: list[ModalitySpec], names: tuple[str, ...]) -> list[ModalitySpec]:
    known = [spec.name for spec in found]
    missing = [name for name in names if name not in known]
    if missing:
        raise ConfigError(
            f"there is no view {missing[0]!r} to fuse",
            where="fusion.modalities",
            fix=f"name some of {', '.join(known)}, or none for all",
        )
    return [spec for spec in found if not names or spec.name in names]


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
    if not fusion.behaviour_dim or (fusion.modalities and BEHAVIOUR not in fusion.modalities):
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
