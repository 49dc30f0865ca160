"""The stage `neighbours`: count what follows what, find what is like what, keep the strongest arrows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray

from qbrec.config import RootConfig
from qbrec.engine.context import StageContext
from qbrec.neighbours.alike import alike
from qbrec.neighbours.content import content_of_catalog, views_of_catalog
from qbrec.neighbours.counting import counted_graphs
from qbrec.ranking.graphs import GRAPHS, ItemGraphs
from qbrec.storage.artifact import Artifact
from qbrec.storage.catalog_view import CatalogView
from qbrec.storage.token_table import token_table


def run(ctx: StageContext, config: RootConfig, inputs: Mapping[str, Artifact]) -> Artifact:
    """Build the item graphs of the target domain's histories and of the catalogue's content.

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
        for name in views_of_catalog(catalog):
            vectors = content_of_catalog(name, catalog, inputs["fusion"])[rows]
            progress = ctx.progress(len(rows), f"nearest neighbours: {name}")
            found = alike(ctx, vectors, keep=config.ranking.alike, cells=cells, on_rows=progress.update)
            whole = catalog.num_items, catalog.num_items
            views[name] = among_all(found, rows=rows, columns=rows, shape=whole)
            progress.close()
    counted = counted_graphs(
        ctx,
        catalog.load_training(config.data.target_domain),
        num_items=catalog.num_items,
        keep=config.ranking.neighbours,
    )
    writer = ctx.writer()
    meta: dict[str, Any] = {"arrows": {name: int(graph.nnz) for name, graph in views.items()}}
    if ctx.is_main:
        arrays = ItemGraphs(**counted, alike=views).arrays()
        writer.save_safetensors(GRAPHS, {name: torch.from_numpy(array) for name, array in arrays.items()})
        meta["arrows"] |= {name: int(graph.nnz) for name, graph in counted.items()}
    return ctx.commit(writer, meta=meta, inputs=inputs)


def among_all(
    graph: sp.csr_matrix, *, rows: NDArray[np.int64], columns: NDArray[np.int64], shape: tuple[int, int]
) -> sp.csr_matrix:
    """A graph of some items, whose rows and columns these are, as one of all of them."""
    lengths = np.zeros(shape[0], np.int64)
    lengths[rows] = np.diff(graph.indptr)
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    return sp.csr_matrix((graph.data, columns[graph.indices], indptr), shape=shape)
