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

Chunk = tuple[NDArray[np.int64], NDArray[np.int64] | None]  # rows, those they are compared with; None: all


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
    num_items = len(vectors)
    table = _unit(vectors, ctx.device)
    asked = table if queries is None else _unit(queries.vectors, ctx.device)
    width = keep + (queries is None)  # an item of the table finds itself
    if cells is None or num_items <= EXACT_ITEMS:
        parts = _chunks(len(asked))
    else:
        parts = _chunks_by_cell(cells, cells if queries is None else queries.cells)
    places, similar, owners = [], [], []
    for number, (rows, pool) in enumerate(parts):
        if number % ctx.world != ctx.rank:
            continue
        ours = torch.from_numpy(rows).to(ctx.device)
        others = table if pool is None else table[torch.from_numpy(pool).to(ctx.device)]
        value, index = _nearest(asked[ours], others, min(width, len(others)))
        found = index.cpu() if pool is None else torch.from_numpy(pool)[index.cpu()]
        owners.append(ours.cpu())
        places.append(_padded(found, width))
        similar.append(_padded(value.cpu(), width))
        on_rows(len(rows) * ctx.world)
    none = torch.zeros(0, width)
    owner, place, cosine = (
        torch.cat(ctx.gather_bytes(torch.cat([empty, *parts]).to(ctx.device))).cpu().numpy()
        for empty, parts in ((none[:, 0].long(), owners), (none.long(), places), (none, similar))
    )
    if queries is None:
        cosine[place == owner[:, None]] = 0
    return _graph(owner, place, cosine, keep=keep, shape=(len(asked), num_items))


def _unit(vectors: NDArray[np.floating], device: torch.device) -> Tensor:
    """A copy in float32, rows of length 1."""
    table = torch.from_numpy(vectors).to(device, torch.float32, copy=True)
    for part in table.split(1 << 16):
        torch.nn.functional.normalize(part, out=part)
    return table


def _chunks(num_rows: int) -> Iterator[Chunk]:
    for begin in range(0, num_rows, CHUNK):
        yield np.arange(begin, min(begin + CHUNK, num_rows)), None


def _chunks_by_cell(cells: NDArray[np.integer], asked: NDArray[np.integer]) -> Iterator[Chunk]:
    """Of the rows asked about; those of a cell that holds no item are left out."""
    order, asking = np.argsort(cells, kind="stable"), np.argsort(asked, kind="stable")
    held = cells[order]
    for rows in np.split(asking, np.flatnonzero(np.diff(asked[asking])) + 1):
        if not len(rows):
            return
        cell = asked[rows[0]]
        pool = order[np.searchsorted(held, cell, "left") : np.searchsorted(held, cell, "right")]
        for begin in range(0, len(rows) if len(pool) else 0, CHUNK):
            yield rows[begin : begin + CHUNK], pool


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
