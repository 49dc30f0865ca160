"""Rows of the item graphs for a generation's new items: an artifact of the kind `alike_generation`.

    graphs.safetensors      `alike.<view>` CSR [n, N] by content view: the nearest items of the catalogue

Nothing was done with new items yet, so content is all that joins them to others. Views, length of the lists
and domain are those of the run's item graphs. Changed items keep their rows, as they keep their IDs.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from qbrec.config.root import RootConfig
from qbrec.engine.context import StageContext
from qbrec.neighbours.alike import Queries, alike
from qbrec.neighbours.content import content_with_new
from qbrec.neighbours.stage import among_all
from qbrec.ranking.counted import COUNTED
from qbrec.ranking.graphs import GRAPHS, parts_of, with_prefix
from qbrec.storage.artifact import Artifact
from qbrec.storage.generations import GenerationsView
from qbrec.storage.id_table import GENERATION, numbered
from qbrec.storage.token_table import SEMANTIC_IDS


def content_views(neighbours: Artifact) -> list[str]:
    """Names of the content views of a `neighbours` artifact, in their order."""
    return [name for name in neighbours.meta["arrows"] if name not in COUNTED]


def run(ctx: StageContext, config: RootConfig, inputs: Mapping[str, Artifact]) -> Artifact:
    """Find the nearest items of the catalogue for the new items of the last of the generations.

    Args:
        ctx: The rank's context.
        config: Nothing of it counts: the graphs' own settings do.
        inputs: `catalog`, `generation-1` … `generation-n`, `fusion`, `quantizer`, `neighbours`, `fused` and
            `ids` (what the fusion network and the quantizer made of generation n).

    Raises:
        DataError: A file is damaged.
    """
    view = GenerationsView(inputs["catalog"], numbered(inputs, GENERATION))
    generation, recipe = view.generations[-1], inputs["neighbours"].manifest["config"]
    target, keep = str(recipe["target"]), int(recipe["kept"][1])
    old = np.flatnonzero(view.base.candidates(target))
    new = np.flatnonzero(generation.item_domain == view.domain_number(target))
    cells, of_new = (inputs[name].load_npy(SEMANTIC_IDS)[:, 0] for name in ("quantizer", "ids"))
    shape = generation.num_added, view.base.num_items
    graphs = {}
    for name in content_views(inputs["neighbours"]):
        table, added = content_with_new(name, view, inputs)
        table, queries = table[old], Queries(added[new], of_new[new])
        with ctx.progress(len(new), f"nearest neighbours of new items: {name}") as progress:
            found = alike(ctx, table, keep=keep, cells=cells[old], queries=queries, on_rows=progress.update)
        graphs[name] = among_all(found, rows=new, columns=old, shape=shape)
    writer = ctx.writer()
    if ctx.is_main:
        arrays = parts_of(with_prefix(graphs))
        writer.save_safetensors(GRAPHS, {name: torch.from_numpy(array) for name, array in arrays.items()})
    meta = {
        "first_row": generation.first_row,
        "num_added": generation.num_added,
        "arrows": {name: int(graph.nnz) for name, graph in graphs.items()},
    }
    return ctx.commit(writer, meta=meta, inputs=inputs)
