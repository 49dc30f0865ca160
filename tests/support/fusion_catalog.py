"""A small catalogue artifact for the fusion tests: two dense modalities, structure, groups of taste."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from qbrec.storage.artifact import Artifact, ArtifactStore
from qbrec.storage.blocks import BlockTarWriter, write_block_index

BLOCK = 40  # items or users per block: many small blocks, none of them aligned with the fused ones
CLUSTERS = 6


def make_catalog(
    root: Path, *, num_items: int = 300, num_users: int = 240, tail: str = "a", seed: int = 0
) -> Artifact:
    """Write the catalogue; items of a cluster are alike and are consumed together.

    Args:
        root: Storage root.
        num_items: N; every 7th has no image, every 11th no text, every 13th no structure.
        num_users: Each with 6 to 12 interactions.
        tail: Which validation and test items the users have: two catalogues that differ in it have the same
            training part.
        seed: Of everything else.
    """
    rng = np.random.default_rng(seed)
    cluster = rng.integers(0, CLUSTERS, num_items)
    writer = ArtifactStore(root).writer("catalog", (tail[0] * 64))
    writer.prepare()
    statistics: dict[str, torch.Tensor] = {}
    columns: dict[str, Any] = {}
    for name, dim, every in (("text", 24, 11), ("image", 16, 7)):
        centre = rng.standard_normal((CLUSTERS, dim))
        counts = np.where(np.arange(num_items) % every == every - 1, 0, rng.integers(1, 4, num_items)).astype(
            np.uint8
        )
        owner = np.repeat(np.arange(num_items), counts)
        values = (centre[cluster[owner]] + 0.5 * rng.standard_normal((len(owner), dim))).astype(np.float16)
        columns[name] = (counts, owner, values)
        statistics[f"mean.{name}"] = torch.from_numpy(values.astype(np.float32).mean(0))
        statistics[f"std.{name}"] = torch.from_numpy(values.astype(np.float32).std(0))
    structure = np.stack([cluster, 100 + cluster * 3 + rng.integers(0, 3, num_items)], axis=1).astype(
        np.int32
    )
    structure[12::13] = -1
    tar = BlockTarWriter(writer.path, prefix="items")
    for begin in range(0, num_items, BLOCK):
        rows = np.arange(begin, min(begin + BLOCK, num_items))
        fields = {
            "row": rows,
            "domain": np.zeros(len(rows), np.uint8),
            "structure": structure[rows],
            "content": rows,
        }
        for name, (counts, owner, values) in columns.items():
            fields[f"tokens.{name}"] = counts[rows]
            fields[f"feature.{name}"] = values[(owner >= begin) & (owner < begin + len(rows))]
        tar.add(fields, len(rows))
    write_block_index(writer.path / "blocks.items.npy", [tar.close()])
    _histories(writer.path, cluster, num_users, tail, rng)
    writer.save_safetensors("statistics.safetensors", statistics)
    meta = {
        "num_items": num_items,
        "modalities": {
            name: {"dim": values.shape[1], "present": int((counts > 0).sum()), "max_tokens": 3}
            for name, (counts, _, values) in columns.items()
        },
        "structure_slots": 2,
        "structure_buckets": 256,
    }
    return writer.commit(meta=meta, inputs={}, config={}, seed=0)


def _histories(path: Path, cluster: np.ndarray, num_users: int, tail: str, rng: np.random.Generator) -> None:
    last = np.random.default_rng(sum(tail.encode()))
    tar = BlockTarWriter(path, prefix="histories")
    for begin in range(0, num_users, BLOCK):
        users = np.arange(begin, min(begin + BLOCK, num_users))
        rows, lengths = [], []
        for _ in users:
            liked = np.flatnonzero(cluster == rng.integers(0, CLUSTERS))
            train = rng.choice(liked, rng.integers(4, 11))
            rows.append(np.concatenate([train, last.integers(0, len(cluster), 2)]))
            lengths.append(len(rows[-1]))
        offset = np.concatenate([[0], np.cumsum(lengths)])
        cut = np.stack([np.array(lengths) - 2, np.array(lengths) - 1], axis=1).astype(np.int32)
        flat = np.concatenate(rows).astype(np.int64)
        domain = np.zeros(len(users), np.uint8)
        fields = {"user": users, "domain": domain, "offset": offset, "row": flat, "time": flat, "cut": cut}
        tar.add(fields, len(users))
    write_block_index(path / "blocks.histories.npy", [tar.close()])
