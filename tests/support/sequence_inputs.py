"""Small inputs of stage 3: a catalogue of two domains whose users walk along a ring, and semantic IDs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from qbrec.storage.artifact import Artifact, ArtifactStore
from qbrec.storage.blocks import BlockTarWriter, write_block_index

DOMAINS = ("pets", "games")
ITEMS = 30  # of each domain
LEVELS = (8, 8, 4)
BLOCK = 25


def make_inputs(root: Path, *, num_users: int = 90, seed: int = 0) -> dict[str, Artifact]:
    """Users of `pets` walk the ring of its items forward, those of `games` backward; a few hardly walk."""
    rng = np.random.default_rng(seed)
    store = ArtifactStore(root)
    histories, domains = [], rng.integers(0, 2, num_users).astype(np.uint8)
    for user, domain in enumerate(domains):
        length = 1 if user % 30 == 7 else int(rng.integers(5, 12))
        walk = (rng.integers(ITEMS) + np.arange(length) * (1 if domain == 0 else -1)) % ITEMS
        histories.append(walk + ITEMS * int(domain))
    lengths = np.array([len(rows) for rows in histories])
    cut = np.where(lengths[:, None] >= 3, lengths[:, None] - [[2, 1]], lengths[:, None]).astype(np.int32)

    writer = store.writer("catalog", "c" * 64)
    writer.prepare()
    write_histories(writer.path, histories, domains=domains, cut=cut)
    trained = np.concatenate([rows[: c[0]] for rows, c in zip(histories, cut, strict=True)])
    writer.save_npy("train_counts.npy", np.bincount(trained, minlength=2 * ITEMS).astype(np.int64))
    writer.save_npy("item_domain.npy", np.repeat(np.arange(2, dtype=np.uint8), ITEMS))
    meta = {"num_items": 2 * ITEMS, "domains": list(DOMAINS), "modalities": {}}
    catalog = writer.commit(meta=meta, inputs={}, config={}, seed=0)

    row = np.arange(2 * ITEMS)
    writer = store.writer("quantizer", "d" * 64)
    writer.prepare()
    writer.save_npy(
        "semantic_ids.npy", np.stack([row % 8, row // 8, rng.integers(0, 4, len(row))], 1).astype(np.uint8)
    )
    codebooks = {
        f"level.{level}": torch.from_numpy(rng.standard_normal((k, 12))) for level, k in enumerate(LEVELS)
    }
    writer.save_safetensors("codebooks.safetensors", {name: book.float() for name, book in codebooks.items()})
    quantizer = writer.commit(meta={"levels": list(LEVELS)}, inputs={}, config={}, seed=0)
    return {"catalog": catalog, "quantizer": quantizer}


def write_histories(path: Path, histories: list[np.ndarray], *, domains: np.ndarray, cut: np.ndarray) -> None:
    """The blocks of histories of a catalogue."""
    lengths = np.array([len(rows) for rows in histories])
    tar = BlockTarWriter(path, prefix="histories")
    for begin in range(0, len(histories), BLOCK):
        part = slice(begin, min(begin + BLOCK, len(histories)))
        flat = np.concatenate(histories[part]).astype(np.int64)
        tar.add(
            {
                "user": np.arange(begin, part.stop),
                "domain": domains[part],
                "offset": np.concatenate([[0], np.cumsum(lengths[part])]),
                "row": flat,
                "time": flat,
                "cut": cut[part],
            },
            part.stop - begin,
        )
    write_block_index(path / "blocks.histories.npy", [tar.close()])
