"""Content views of items, one vector per item and view: what `alike` compares.

Views are each modality's first feature token (the title, the first picture, the embedding that was brought)
and the fused vector.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from qbrec.storage.artifact import Artifact
from qbrec.storage.blocks import BlockSet, RaggedField
from qbrec.storage.catalog_view import CatalogView
from qbrec.storage.generations import GenerationsView
from qbrec.storage.ragged import Ragged

FUSED = "fused"
READ_ROWS = 65_536

Vectors = NDArray[np.float16]


def views_of_catalog(catalog: CatalogView) -> tuple[str, ...]:
    """Names of a catalogue's content views."""
    return (*catalog.artifact.meta["modalities"], FUSED)


def content_of_catalog(view: str, catalog: CatalogView, fusion: Artifact) -> Vectors:
    """One content view of all items, float16 [N, D]; zeros where an item lacks it."""
    if view != FUSED:
        return _first_tokens(catalog.items(), view, _width(catalog, view))
    fused = _fused(fusion, catalog.num_items)
    return fused - _shared_part(fused)


def content_with_new(
    view: str, generations: GenerationsView, inputs: Mapping[str, Artifact]
) -> tuple[Vectors, Vectors]:
    """One content view of the catalogue's items, and of the last generation's new ones in the same space.

    Args:
        view: Its name.
        generations: The catalogue and its generations.
        inputs: `fusion`, and `fused` of the last generation.

    Returns:
        float16 [N, D] as of `content_of_catalog`, and [n, D].
    """
    catalog, count = generations.base, generations.generations[-1].num_added
    if view != FUSED:
        width = _width(catalog, view)
        new = np.zeros((0, width), np.float16)
        if count:
            new = _first_tokens(generations.new_blocks(len(generations.generations))[0], view, width)
        return content_of_catalog(view, catalog, inputs["fusion"]), new
    fused = _fused(inputs["fusion"], catalog.num_items)
    mean = _shared_part(fused)
    added = _fused(inputs["fused"], count) if count else fused[:0]
    return fused - mean, added - mean


def _fused(artifact: Artifact, count: int) -> Vectors:
    """The first `count` of an artifact's fused vectors."""
    fused: Vectors = BlockSet.open(artifact, FUSED).column(FUSED, 0, count)
    return fused


def _shared_part(fused: Vectors) -> Vectors:
    """Mean of the catalogue's fused vectors, [D], to be taken off them."""
    # What all items share says nothing of any: without it the cosines spread.
    mean: Vectors = fused.mean(0, dtype=np.float32).astype(np.float16)
    return mean


def _width(catalog: CatalogView, view: str) -> int:
    return int(catalog.artifact.meta["modalities"][view]["dim"])


def _first_tokens(items: BlockSet, name: str, dim: int) -> Vectors:
    """First feature token of every sample of some blocks, float16 [n, dim]; zeros where it has none."""
    field = RaggedField(f"feature.{name}", counts=f"tokens.{name}")
    out = np.zeros((items.num_samples, dim), np.float16)
    for begin in range(0, len(out), READ_ROWS):
        rows = np.arange(begin, min(begin + READ_ROWS, len(out)), dtype=np.int64)
        features = items.take(rows, [field])[field.values]
        assert isinstance(features, Ragged)
        present = features.lengths > 0
        out[rows[present]] = features.values[features.offsets[:-1][present]]
    return out
