"""Rows of a catalogue-sized table, trained beside the DeepSpeed module and cut over the ranks.

A table of one vector per item is too large to be a module's parameter: ZeRO would move all of it in every
step, and AdamW would keep two moments of it. Here every rank owns a range of rows. A step fetches the rows it
needs from their owners, and hands their gradients back to be applied by row-wise Adagrad (one accumulator per
row, as in FBGEMM's embedding tables): 4·D + 4 bytes per row, and time in proportion to the rows of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qbrec.engine.context import StageContext
from qbrec.storage.artifact import Artifact

_EPS = 1e-8
_MOST_CHUNK_ROWS = 65_536  # of one file of a checkpoint
_LEAST_CHUNKS = 16  # of a small table, so that every rank has some rows


@dataclass(frozen=True)
class Route:
    """Where the rows of one step lie. Made on every rank by `ShardedRows.route`.

    Attributes:
        inverse: int64 [n], for each id asked for its place among the distinct ones of this rank.
        sent: Distinct rows asked of each rank, W numbers.
        received: Rows that each rank asks of this one, W numbers.
        local: int64 [Σ received], these rows counted from the first that this rank owns.
    """

    inverse: Tensor
    sent: list[int]
    received: list[int]
    local: Tensor


class ShardedRows:
    """A table [N, D] of float32 vectors, initially N(0, std²), of which every rank owns a range of chunks.

    What a row starts from, and how it moves, does not depend on the number of ranks.

    Args:
        ctx: Rank, device and seed. All methods but `chunks`, `local_bytes` and `load` are collective.
        num_rows: N.
        width: D.
        std: Standard deviation of the initial rows.
        clip_norm: Longest gradient of one row.
    """

    def __init__(self, ctx: StageContext, *, num_rows: int, width: int, std: float, clip_norm: float) -> None:
        self.num_rows, self.width, self.clip_norm = num_rows, width, clip_norm
        self.world, self.device = ctx.world, ctx.device
        self._all_reduce = ctx.all_reduce
        self.chunk_rows = min(_MOST_CHUNK_ROWS, -(-num_rows // _LEAST_CHUNKS))
        num_chunks = -(-num_rows // self.chunk_rows)
        self._bounds = [
            min(r * num_chunks // ctx.world * self.chunk_rows, num_rows) for r in range(ctx.world)
        ]
        self._bounds.append(num_rows)
        self.first, self.last = self._bounds[ctx.rank], self._bounds[ctx.rank + 1]
        self.rows = torch.empty(self.last - self.first, width, device=ctx.device)
        self.accumulator = torch.zeros(self.last - self.first, device=ctx.device)
        for begin, rows, _ in self.chunks():
            # By chunk and on the CPU: the same numbers for any number of ranks, on any device.
            generator = torch.Generator().manual_seed(ctx.sub_seed(f"rows/{begin // self.chunk_rows}"))
            rows.copy_(torch.empty(rows.shape).normal_(std=std, generator=generator))

    @property
    def local_bytes(self) -> int:
        """Bytes that this rank holds for its rows."""
        return sum(t.numel() * t.element_size() for t in (self.rows, self.accumulator))

    def chunks(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(First row, rows [n, D], accumulators [n]) of each chunk of this rank, as views."""
        for begin in range(self.first, self.last, self.chunk_rows):
            part = slice(begin - self.first, min(begin + self.chunk_rows, self.last) - self.first)
            yield begin, self.rows[part], self.accumulator[part]

    def load(self, chunk: Callable[[int], Mapping[str, Tensor]]) -> None:
        """Take over stored chunks.

        Args:
            chunk: Gives `rows` [n, D] and `accumulator` [n] of the chunk that begins at a row.
        """
        for begin, rows, accumulator in self.chunks():
            stored = chunk(begin)
            rows.copy_(stored["rows"])
            accumulator.copy_(stored["accumulator"])

    def route(self, ids: Tensor) -> Route:
        """Agree with all ranks on who fetches which rows from whom.

        Args:
            ids: int64 [n], rows of the table, in any order; n may be 0 and differs among the ranks.
        """
        distinct, inverse = torch.unique(ids, return_inverse=True)
        if self.world == 1:
            return Route(inverse, [len(distinct)], [len(distinct)], distinct)
        # Sorted ids are grouped by owner already, because owners hold ranges.
        bounds = torch.tensor(self._bounds, dtype=torch.int64, device=ids.device)
        sent = torch.searchsorted(distinct, bounds).diff()
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent)
        sent_list, received_list = sent.tolist(), received.tolist()
        asked = self._exchange(distinct, received_list, sent_list)
        return Route(inverse, sent_list, received_list, asked - self.first)

    def lookup(self, route: Route) -> Tensor:
        """Vectors [n, D] of the ids that the route was made for."""
        found = self.rows[route.local]
        if self.world > 1:
            found = self._exchange(found, route.sent, route.received)
        return found[route.inverse]

    @torch.no_grad()
    def apply(
        self, route: Route, gradients: Tensor, *, divisor: float, learning_rate: float, wanted: bool
    ) -> bool:
        """One step of row-wise Adagrad.

        Args:
            route: Of the ids whose gradients these are.
            gradients: float [n, D], on every rank the gradients of its own part of the batch.
            divisor: What the sum over all ranks is divided by (loss scale, averaging over ranks).
            learning_rate: Of this step.
            wanted: False: nothing moves (DeepSpeed skipped its step). The same on all ranks.

        Returns:
            Whether the rows moved: not if `wanted` is False or any gradient on any rank is not finite.
        """
        if not wanted:
            return False
        summed = _sum_by(route.inverse, gradients.float())
        rows = route.local
        if self.world > 1:
            # Several ranks may have used one row.
            rows, place = torch.unique(rows, return_inverse=True)
            arrived = self._exchange(summed, route.received, route.sent)
            summed = _sum_by(place, arrived)
        summed /= divisor
        squares = summed.square().sum(1)
        # One infinity or NaN makes a sum that is neither, too.
        bad = (~torch.isfinite(squares)).any().to(torch.int32)
        if int(self._all_reduce(bad, "max")):
            return False
        shrink = (self.clip_norm / squares.sqrt().clamp(min=1e-30)).clamp(max=1.0)
        squares *= shrink.square()
        accumulated = self.accumulator[rows] + squares / self.width
        self.accumulator[rows] = accumulated
        step = learning_rate * shrink / (accumulated.sqrt() + _EPS)
        self.rows.index_copy_(0, rows, self.rows[rows].addcmul_(summed, step[:, None], value=-1.0))
        return True

    def _exchange(self, values: Tensor, output: list[int], given: list[int]) -> Tensor:
        """Send `given[r]` consecutive entries to each rank r, get `output[r]` from it."""
        arrived = values.new_empty(sum(output), *values.shape[1:])
        dist.all_to_all_single(arrived, values.contiguous(), output, given)
        return arrived


def _sum_by(place: Tensor, values: Tensor) -> Tensor:
    """Sums of the values [n, D] that have the same place, by place; every place from 0 on occurs."""
    order = torch.argsort(place, stable=True)
    repeats = torch.zeros_like(order, dtype=torch.bool)
    repeats[1:] = place[order].diff() == 0
    # Most rows occur once in a step, and on a CPU copying takes a tenth of adding.
    summed = values[order[~repeats]]
    again = order[repeats]
    return summed.index_add_(0, place[again], values[again])


def rows_file(first: int) -> str:
    """Name of the file, in an artifact, of the chunk that begins at a row: safetensors with `rows` [n, D]."""
    return f"rows-{first:012d}.safetensors"


class StoredRows:
    """Rows of a finished table, read chunk by chunk as they are asked for; callable with int64 [n].

    Args:
        artifact: Where `rows_file`s lie; its meta has their `width`.
    """

    def __init__(self, artifact: Artifact) -> None:
        names = sorted(name for name in artifact.manifest["files"] if name.startswith("rows-"))
        self._artifact, self._names, self._width = artifact, names, int(artifact.meta["width"])
        self._firsts = torch.tensor([int(name[5:17]) for name in names])

    def __call__(self, rows: Tensor) -> Tensor:
        """Vectors float32 [n, D] on the CPU.

        Raises:
            DataError: A file is missing or damaged.
        """
        rows = rows.cpu()
        chunk = torch.searchsorted(self._firsts, rows, right=True) - 1
        parts: list[Tensor] = []
        for number in chunk.unique().tolist():
            stored = self._artifact.load_safetensors(self._names[number])["rows"]
            parts.append(stored[rows[chunk == number] - self._firsts[number]])
        found = torch.empty(len(rows), self._width)
        if parts:
            found[torch.argsort(chunk, stable=True)] = torch.cat(parts)
        return found


@dataclass(frozen=True)
class RowUse:
    """How a task uses the rows: `engine.train` fetches them before a step and moves them after it.

    Attributes:
        table: The rows.
        ids: Rows int64 [B] of a prepared micro-batch, -1 where a sample uses none.
        bind: The micro-batch with its vectors [B, D] (a leaf that wants its gradient; 0 where id is -1).
        learning_rate: Of Adagrad, at the peak of the schedule.
    """

    table: ShardedRows
    ids: Callable[[Any], Tensor]
    bind: Callable[[Any, Tensor], Any]
    learning_rate: float


class RowWindow:
    """The rows of one optimiser step: all its micro-batches fetch together and are applied together.

    Args:
        use: What uses which rows.
        batches: Prepared micro-batches of this rank; None where it has none.
    """

    def __init__(self, use: RowUse, batches: list[Any]) -> None:
        self._use = use
        ids = [use.ids(batch) for batch in batches if batch is not None]
        own = [numbers >= 0 for numbers in ids]
        empty = torch.zeros(0, dtype=torch.int64, device=use.table.device)
        wanted = torch.cat([n[mask] for n, mask in zip(ids, own, strict=True)]) if ids else empty
        self._route = use.table.route(wanted)
        vectors = use.table.lookup(self._route)
        self._leaves: list[tuple[Tensor, Tensor]] = []
        self.batches: list[Any] = []
        parts = iter(zip(own, vectors.split([int(mask.sum()) for mask in own]), strict=True))
        for batch in batches:
            if batch is None:
                self.batches.append(None)
                continue
            mask, part = next(parts)
            leaf = part.new_zeros(len(mask), part.shape[1])
            leaf[mask] = part
            self._leaves.append((leaf.requires_grad_(), mask))
            self.batches.append(use.bind(batch, leaf))

    def apply(self, *, divisor: float, factor: float, wanted: bool) -> bool:
        """Move the rows by the gradients of all micro-batches.

        Args:
            divisor: See `ShardedRows.apply`.
            factor: Of the learning rate's schedule, 1 at its peak.
            wanted: Whether DeepSpeed applied its own step.
        """
        table = self._use.table
        parts = [torch.zeros(0, table.width, device=table.device)]
        for leaf, mask in self._leaves:
            gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            parts.append(gradient[mask])
        return table.apply(
            self._route,
            torch.cat(parts),
            divisor=divisor,
            learning_rate=self._use.learning_rate * factor,
            wanted=wanted,
        )
