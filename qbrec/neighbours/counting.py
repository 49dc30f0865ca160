"""Arrows counted in histories, the items shared among the ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray

from qbrec.engine.context import StageContext
from qbrec.ranking.counted import COUNTED, count_arrows
from qbrec.storage.ragged import Ragged

GATHERED = 1 << 24  # numbers that a rank gives at once


def counted_graphs(
    ctx: StageContext, training: Ragged, *, num_items: int, keep: int
) -> dict[str, sp.csr_matrix]:
    """`ranking.counted.count_arrows` of all items: a rank counts what surrounds its own items.

    Nobody adds up what others counted, so that the sums, to the last bit, are the same for any number of
    ranks; and nobody waits for long, since all have as much to count.

    Args:
        ctx: Rank, world, device.
        training: Training part of all histories, on every rank.
        num_items: N.
        keep: Arrows per item and graph.

    Returns:
        float32 CSR [N, N] by graph, on rank 0; on the others, which need none, without a row.
    """
    items = share(np.bincount(training.values, minlength=num_items), rank=ctx.rank, world=ctx.world)
    with ctx.progress(len(COUNTED) * len(items), "count what follows what") as progress:
        counted = count_arrows(
            training, num_items=num_items, keep=keep, items=items, on_items=progress.update
        )
    graphs = {}
    for name in COUNTED:
        graph = counted.pop(name)  # rank 0 has it twice otherwise, until the last one is gathered
        lengths = _on_main(ctx, np.diff(graph.indptr).astype(np.int64))
        indices, data = (_on_main(ctx, part) for part in (graph.indices.astype(np.int32), graph.data))
        indptr = np.concatenate([[0], np.cumsum(lengths)])
        graphs[name] = sp.csr_matrix((data, indices, indptr), shape=(len(lengths), num_items))
    return graphs


def share(occurrences: NDArray[np.integer], *, rank: int, world: int) -> range:
    """The items of a rank: one after the other, with about as many occurrences as those of another rank.

    Args:
        occurrences: Of each item, [N].
        rank: Which one.
        world: Of how many.
    """
    ends = np.cumsum(occurrences)
    # An item is on the side of a cut that most of it is on.
    cuts = np.searchsorted(ends - occurrences / 2, ends[-1] * np.arange(1, world) / world)
    edges = [0, *cuts.tolist(), len(occurrences)]
    return range(edges[rank], edges[rank + 1])


def _on_main(ctx: StageContext, array: NDArray[Any]) -> NDArray[Any]:
    """The arrays of all ranks, one after the other, on rank 0; nothing of them on the others."""
    longest = ctx.all_reduce(torch.tensor([len(array)], device=ctx.device), "max")
    parts: list[list[torch.Tensor]] = [[] for _ in range(ctx.world)]
    # Piece by piece: together they may be more than a device holds.
    for begin in range(0, int(longest), GATHERED):
        ours = torch.from_numpy(array[begin : begin + GATHERED]).to(ctx.device)
        for kept, piece in zip(parts, ctx.gather_bytes(ours), strict=True):
            if ctx.is_main:
                kept.append(piece.cpu())
    return np.concatenate([array[:0], *(piece.numpy() for kept in parts for piece in kept)])
