"""Items of a generation fused by the frozen network: an artifact of the kind `fused_generation`.

    fused-*.tar, blocks.fused.npy           `row`, `fused`, `depth`: new items by row, then changed ones
    reference.row.npy int64 [S]             a sample of the catalogue's items, ascending
    reference.fused.npy float16 [S, D]      these, fused in the very same way

Files about nothing are left out. New items have no row of the ID table and no behaviour yet: they take the
shared query. So do changed ones, whose fused vector is refreshed, and the reference, so that what is said
about new items is measured against old items that came the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qbrec.config.root import RootConfig
from qbrec.engine.context import StageContext
from qbrec.fusion.batches import item_fields
from qbrec.fusion.embed import FusionEncoder
from qbrec.fusion.model import BEHAVIOUR, STRUCTURE, ModalitySpec
from qbrec.storage.artifact import Artifact, ArtifactWriter
from qbrec.storage.blocks import BlockTarWriter, write_block_index
from qbrec.storage.catalog_view import CatalogView
from qbrec.storage.generations import GenerationsView
from qbrec.storage.id_table import GENERATION, numbered
from qbrec.storage.ragged import Ragged

REFERENCE_ROWS = 8192
_SHARD_BYTES = 32 << 20


def run(ctx: StageContext, config: RootConfig, inputs: Mapping[str, Artifact]) -> Artifact:
    """Fuse what is new or changed in the last of the generations, block by block; one rank.

    Args:
        ctx: Device and storage.
        config: Nothing of it counts: network and statistics are the artifact's.
        inputs: `catalog`, `generation-1` … `generation-n`, `fusion`. A modality that the network was not
            trained on is not read.

    Raises:
        DataError: A file is damaged.
    """
    view = GenerationsView(inputs["catalog"], numbered(inputs, GENERATION))
    generation = view.generations[-1]
    encoder = FusionEncoder.load(inputs["fusion"], device=ctx.device)
    writer = ctx.writer()
    if generation.num_added or len(generation.changed):
        _fuse(ctx, writer, view, encoder)
    rows, fused = _reference(view.base, encoder)
    writer.save_npy("reference.row.npy", rows)
    writer.save_npy("reference.fused.npy", fused)
    meta = {
        "parent": inputs["fusion"].fingerprint,
        "first_row": generation.first_row,
        "num_added": generation.num_added,
        "num_changed": len(generation.changed),
        "width": encoder.model.width,
        "num_reference": len(rows),
    }
    return ctx.commit(writer, meta=meta, inputs=inputs)


def _fuse(ctx: StageContext, writer: ArtifactWriter, view: GenerationsView, encoder: FusionEncoder) -> None:
    """Write the vectors of what the last generation has features of, block by block."""
    generation, modalities = view.generations[-1], encoder.model.modalities
    total = generation.num_added + len(generation.changed)
    with (
        ctx.progress(total, f"fuse generation {len(view.generations)}") as progress,
        BlockTarWriter(writer.path, prefix="fused", shard_bytes=_SHARD_BYTES) as tar,
    ):
        for block in view.new_features(len(view.generations), _stored(modalities)):
            rows = block["row"]
            features, structure = _features(block, modalities), block.get(STRUCTURE)
            fused, depth = encoder.embed(features, size=len(rows), structure=structure)
            tar.add({"row": rows, "fused": fused, "depth": depth}, len(rows))
            progress.update(len(rows))
        records = tar.close()
    write_block_index(writer.path / "blocks.fused.npy", [records])


def _stored(modalities: Sequence[ModalitySpec]) -> list[str]:
    """Fields of the blocks that these modalities are read from."""
    fields = ["row"]
    for spec in modalities:
        if spec.kind == "bag":
            fields.append(STRUCTURE)
        elif spec.name != BEHAVIOUR:
            fields += [f"feature.{spec.name}", f"tokens.{spec.name}"]
    return fields


def _features(block: Mapping[str, NDArray[Any]], modalities: Sequence[ModalitySpec]) -> dict[str, Ragged]:
    return {
        spec.name: Ragged.from_lengths(
            block[f"feature.{spec.name}"], block[f"tokens.{spec.name}"].astype(np.int64)
        )
        for spec in modalities
        if spec.kind == "dense" and spec.name != BEHAVIOUR
    }


def _reference(catalog: CatalogView, encoder: FusionEncoder) -> tuple[NDArray[np.int64], NDArray[np.float16]]:
    """Rows and vectors of a sample of the catalogue's items that are on offer."""
    modalities = encoder.model.modalities
    # Rows are in hash order, so the first ones are a random sample.
    rows = np.flatnonzero(~np.asarray(catalog.retired))[:REFERENCE_ROWS].astype(np.int64)
    found = catalog.items().take(rows, item_fields(modalities))
    features = {
        name.removeprefix("feature."): tokens for name, tokens in found.items() if isinstance(tokens, Ragged)
    }
    structure = found.get(STRUCTURE)
    assert structure is None or isinstance(structure, np.ndarray)
    fused, _ = encoder.embed(features, size=len(rows), structure=structure)
    return rows, fused
