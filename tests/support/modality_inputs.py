"""Feature tokens of single modalities in a catalogue made for the quantizer."""

from __future__ import annotations

import shutil
from collections.abc import Mapping

import numpy as np

from qbrec.storage.artifact import MANIFEST, Artifact, ArtifactStore
from qbrec.storage.blocks import BlockTarWriter, write_block_index
from qbrec.storage.ragged import Ragged

BLOCK = 170  # items per block, aligned with nothing


def some_features(num_items: int, width: int, *, missing: float, seed: int) -> Ragged:
    """Clustered float16 features of one to three tokens; a share of the items has none."""
    rng = np.random.default_rng(seed)
    counts = np.where(rng.random(num_items) < missing, 0, rng.integers(1, 4, num_items))
    centre = 3 * rng.standard_normal((12, width)) + np.arange(width)
    owner = np.repeat(rng.integers(0, 12, num_items), counts)
    values = centre[owner] + 0.3 * rng.standard_normal((len(owner), width))
    return Ragged.from_lengths(values.astype(np.float16), counts)


def with_features(
    store: ArtifactStore, inputs: Mapping[str, Artifact], features: Mapping[str, Ragged], *, key: str = "b"
) -> dict[str, Artifact]:
    """The same inputs with a catalogue that also has blocks of the given features."""
    old = inputs["catalog"]
    writer = store.writer("catalog", key * 64)
    writer.prepare()
    for path in old.path.iterdir():
        if path.name != MANIFEST:
            shutil.copyfile(path, writer.path / path.name)
    count = int(old.meta["num_items"])
    tar = BlockTarWriter(writer.path, prefix="items")
    for begin in range(0, count, BLOCK):
        end = min(begin + BLOCK, count)
        fields = {"row": np.arange(begin, end)}
        for name, ragged in features.items():
            part = ragged.slice(begin, end)
            fields[f"tokens.{name}"] = part.lengths.astype(np.uint8)
            fields[f"feature.{name}"] = part.values
        tar.add(fields, end - begin)
    write_block_index(writer.path / "blocks.items.npy", [tar.close()])
    facts = {
        name: {
            "dim": ragged.values.shape[1],
            "present": int((ragged.lengths > 0).sum()),
            "max_tokens": int(ragged.lengths.max()),
        }
        for name, ragged in features.items()
    }
    meta = {**old.meta, "modalities": facts}
    return {**inputs, "catalog": writer.commit(meta=meta, inputs={}, config={}, seed=0)}
