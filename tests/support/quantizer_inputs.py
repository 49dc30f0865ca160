"""A catalogue and a fusion artifact with just what the quantizer reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
from torch import Tensor

from qbrec.storage.artifact import Artifact, ArtifactStore
from qbrec.storage.blocks import BlockTarWriter, write_block_index

BLOCK = 300  # rows per block, not a divisor of the row grid


def quantizer_inputs(
    store: ArtifactStore,
    fused: Tensor,
    *,
    titles: list[str | None] | None = None,
    duplicates: np.ndarray | None = None,
) -> dict[str, Artifact]:
    """`catalog` and `fusion` of N items with the given fused vectors; popularity falls with the row."""
    count = len(fused)
    rows = np.arange(count, dtype=np.int64)
    catalog = store.writer("catalog", "c" * 64)
    catalog.prepare()
    catalog.save_npy("train_counts.npy", (count - rows) // 3)
    catalog.save_npy("duplicates.npy", rows if duplicates is None else duplicates)
    catalog.save_npy("item_domain.npy", np.zeros(count, np.uint8))
    table = {
        "row": pa.array(rows),
        "item_id": pa.array([f"i{row}" for row in rows]),
        "title": pa.array(titles or [None] * count, pa.string()),
        "categories": pa.array([None] * count, pa.list_(pa.string())),
    }
    catalog.write_table("items.arrow", pa.table(table))
    meta = {"num_items": count, "domains": ["toys"]}
    return {
        "catalog": catalog.commit(meta=meta, inputs={}, config={}, seed=0),
        "fusion": write_fused(store, fused),
    }


def write_fused(store: ArtifactStore, fused: Tensor) -> Artifact:
    """A fusion artifact with these vectors, [N, D]."""
    rows = np.arange(len(fused), dtype=np.int64)
    fusion = store.writer("fusion", "f" * 64)
    fusion.prepare()
    writer = BlockTarWriter(fusion.path, prefix="fused")
    vectors = fused.numpy().astype(np.float16)
    for start in range(0, len(rows), BLOCK):
        part = slice(start, min(start + BLOCK, len(rows)))
        depth = np.ones(part.stop - start, np.uint8)
        writer.add({"row": rows[part], "fused": vectors[part], "depth": depth}, part.stop - start)
    write_block_index(Path(fusion.path) / "blocks.fused.npy", [writer.close()])
    return fusion.commit(meta={"width": fused.shape[1]}, inputs={}, config={}, seed=0)
