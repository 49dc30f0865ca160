"""The stage `neighbours`: count what follows what, find what is like what, keep the strongest arrows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray

from qbrec.config import RootConfig
from qbrec.engine.context import StageContext
from qbrec.neighbours.alike import alike
from qbrec.ranking.graphs import COUNTED, GRAPHS, ItemGraphs
from qbrec.storage.artifact import Artifact
from qbrec.storage.blocks import BlockSet, RaggedField
from qbrec.storage.catalog_view import CatalogView
from qbrec.storage.ragged import Ragged
from qbrec.storage.token_table import token_table

FUSED = "fused"
READ_ROWS = 65_536


def run(ctx: StageContext, config: RootConfig, inputs: Mapping[str, Artifact]) -> Artifact:
    """Build the item graphs of the target domain's histories and of the catalogue's content.

    Content views are each modality's first feature token (the title, the first picture, the embedding that
    was brought) and the fused vector.

    Args:
        ctx: The rank's context.
        config: `ranking.neighbours`, `ranking.alike` and the target domain are read.
        inputs: `catalog`, `fusion`, `quantizer`.

    Returns:
        `graphs.safetensors`, the arrays of `ranking.graphs.ItemGraphs`.

    Raises:
        DataError: An input is damaged.
    """
    catalog = CatalogView(inputs["catalog"])
    # Only what may be recommended: other items would take the places of those that may.
    rows = np.flatnonzero(catalog.candidates(config.data.target_domain))
    cells = token_table(inputs["quantizer"]).codes[rows, 0]
    views = {}
    if config.ranking.alike:
        for name, vectors in _content(catalog, inputs["fusion"]):
            progress = ctx.progress(len(rows), f"nearest neighbours: {name}")
            found = alike(ctx, vectors[rows], keep=config.ranking.alike, cells=cells, on_rows=progress.update)
            whole = catalog.num_items, catalog.num_items
            views[name] = among_all(found, rows=rows, columns=rows, shape=whole)
            progress.close()
    writer = ctx.writer()
    meta: dict[str, Any] = {"arrows": {name: int(graph.nnz) for name, graph in views.items()}}
    if ctx.is_main:
        histories = catalog.load_histories(config.data.target_domain)
        training = histories.rows.prefix(np.asarray(histories.cut)[:, 0])
        graphs = ItemGraphs.fit(
            training, num_items=catalog.num_items, keep=config.ranking.neighbours, alike=views
        )
        arrays = graphs.arrays()
        writer.save_safetensors(GRAPHS, {name: torch.from_numpy(array) for name, array in arrays.items()})
        meta["arrows"] |= {name: int(getattr(graphs, name).nnz) for name in COUNTED}
    return ctx.commit(writer, meta=meta, inputs=inputs)


def _content(catalog: CatalogView, fusion: Artifact) -> Iterator[tuple[str, NDArray[np.float16]]]:
    """Content views by name, float16 [N, D]; zeros where an item lacks one."""
    for name in (*catalog.artifact.meta["modalities"], FUSED):
        yield name, content_of_catalog(name, catalog, fusion)


def content_of_catalog(view: str, catalog: CatalogView, fusion: Artifact) -> NDArray[np.float16]:
    """One content view of all items, float16 [N, D]; zeros where an item lacks it."""
    if view != FUSED:
        return first_tokens(catalog.items(), view, int(catalog.artifact.meta["modalities"][view]["dim"]))
    fused: NDArray[np.float16] = BlockSet.open(fusion, FUSED).column(FUSED, 0, catalog.num_items)
    return fused - shared_part(fused)


def shared_part(fused: NDArray[np.float16]) -> NDArray[np.float16]:
    """Mean of the catalogue's fused vectors, [D], to be taken off them."""
    # What all items share says nothing of any: without it the cosines spread.
    mean: NDArray[np.float16] = fused.mean(0, dtype=np.float32).astype(np.float16)
    return mean


def among_all(
    graph: sp.csr_matrix, *, rows: NDArray[np.int64], columns: NDArray[np.int64], shape: tuple[int, int]
) -> sp.csr_matrix:
    """A graph of some items, whose rows and columns these are, as one of all of them."""
    lengths = np.zeros(shape[0], np.int64)
    lengths[rows] = np.diff(graph.indptr)
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    return sp.csr_matrix((graph.data, columns[graph.indices], indptr), shape=shape)


def first_tokens(items: BlockSet, name: str, dim: int) -> NDArray[np.float16]:
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
