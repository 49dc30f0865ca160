"""Nearest neighbours by cosine, the rows of the catalogue shared among the ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor

from qbrec.engine.context import StageContext

EXACT_ITEMS = 200_000  # up to which every item is compared with every other
CHUNK = 256  # rows compared at once; a grid, so that results do not depend on who computes them
_MAX_SCORES = 1 << 26  # similarities held at once
_COPIED = 1 << 16  # rows copied at once

Chunk = tuple[slice, slice]  # of what asks, and of the table that it is compared with, both sorted by cell


@dataclass(frozen=True)
class Queries:
    """Items that are not in the table, whose nearest ones in it are sought.

    Attributes:
        vectors: float [M, D].
        cells: Cell of each, [M]; read where the table is searched cell by cell.
    """

    vectors: NDArray[np.floating]
    cells: NDArray[np.integer]


def alike(
    ctx: StageContext,
    vectors: NDArray[np.floating],
    *,
    keep: int,
    cells: NDArray[np.integer] | None = None,
    queries: Queries | None = None,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> sp.csr_matrix:
    """The `keep` nearest other items of every item, weighted by squared cosine.

    Up to 200,000 items every pair is compared. Beyond, an item is compared with those of its own cell (the
    first code of the semantic ID, say): an approximation that costs N times the size of a cell.

    Args:
        ctx: Rank, world, device.
        vectors: float [N, D]; an all-zero row is an item without this view, which is like nothing.
        keep: Neighbours per item at most.
        cells: Cell of each item, [N]; read beyond 200,000 items only.
        queries: Items beside the table; None: its own.
        on_rows: Called with the number of rows done, for progress.

    Returns:
        float32 CSR [N, N], or [M, N] for M queries, the same on every rank. Cosines of zero or less are no
        likeness.
    """
    num_items, num_asked = len(vectors), len(vectors if queries is None else queries.vectors)
    held: NDArray[np.integer] = np.zeros(num_items, np.uint8)  # one cell for all
    sought: NDArray[np.integer] = np.zeros(num_asked, np.uint8)
    if cells is not None and num_items > EXACT_ITEMS:
        held, sought = cells, cells if queries is None else queries.cells
    # By cell: those that are compared lie together, and nothing has to be picked out of the table.
    order, asking = np.argsort(held, kind="stable"), np.argsort(sought, kind="stable")
    table = _unit(vectors, order, ctx.device)
    asked = table if queries is None else _unit(queries.vectors, asking, ctx.device)
    width = keep + (queries is None)  # an item of the table finds itself
    places, similar, owners = [], [], []
    for number, (rows, pool) in enumerate(_chunks(held[order], sought[asking])):
        if number % ctx.world != ctx.rank:
            continue
        others = table[pool]
        value, index = _nearest(asked[rows], others, min(width, len(others)))
        owners.append(torch.from_numpy(asking[rows]))
        places.append(_padded(torch.from_numpy(order[pool])[index.cpu()], width))
        similar.append(_padded(value.cpu(), width))
        on_rows((rows.stop - rows.start) * ctx.world)
    none = torch.zeros(0, width)
    owner, place, cosine = (
        torch.cat(ctx.gather_bytes(torch.cat([empty, *parts]).to(ctx.device))).cpu().numpy()
        for empty, parts in ((none[:, 0].long(), owners), (none.long(), places), (none, similar))
    )
    if queries is None:
        cosine[place == owner[:, None]] = 0
    return _graph(owner, place, cosine, keep=keep, shape=(num_asked, num_items))


def _unit(vectors: NDArray[np.floating], order: NDArray[np.int64], device: torch.device) -> Tensor:
    """A copy in that order, float32, rows of length 1."""
    table = torch.empty(vectors.shape, dtype=torch.float32, device=device)
    for begin in range(0, len(order), _COPIED):
        part = table[begin : begin + _COPIED]
        part.copy_(torch.from_numpy(vectors[order[begin : begin + _COPIED]]))
        torch.nn.functional.normalize(part, out=part)
    return table


def _chunks(held: NDArray[np.integer], sought: NDArray[np.integer]) -> Iterator[Chunk]:
    """What is compared with what, given the ascending cells of both; who finds a cell empty is left out."""
    cells, begins = np.unique(sought, return_index=True)
    pools = np.stack([np.searchsorted(held, cells, "left"), np.searchsorted(held, cells, "right")], 1)
    ends = [*begins.tolist(), len(sought)][1:]
    for begin, end, (low, high) in zip(begins.tolist(), ends, pools.tolist(), strict=True):
        for first in range(begin, end if low < high else begin, CHUNK):
            yield slice(first, min(first + CHUNK, end)), slice(low, high)


def _nearest(ours: Tensor, others: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest products of each of our rows, and where, in bounded memory."""
    step = max(count, _MAX_SCORES // max(len(ours), 1))
    values, indices = [], []
    for begin in range(0, len(others), step):
        part = ours @ others[begin : begin + step].T
        value, index = part.topk(min(count, part.shape[1]), dim=1)
        values.append(value)
        indices.append(index + begin)
    best, place = torch.cat(values, 1).topk(count, dim=1)
    return best, torch.cat(indices, 1).gather(1, place)


def _padded(x: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, width - x.shape[1]))


def _graph(
    owners: NDArray[np.int64],
    places: NDArray[np.int64],
    similar: NDArray[np.float32],
    *,
    keep: int,
    shape: tuple[int, int],
) -> sp.csr_matrix:
    similar[similar <= 0] = 0
    # An item is its own nearest neighbour, unless others are its equals: then the last one goes.
    over = (similar > 0).sum(1) > keep
    similar[over, -1] = 0
    rows = np.broadcast_to(owners[:, None], places.shape)
    kept = similar > 0
    weights = np.square(similar[kept])
    return sp.csr_matrix((weights, (rows[kept], places[kept])), shape=shape, dtype=np.float32)
