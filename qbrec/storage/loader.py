"""Batches for training: one global order for any number of ranks, resumed with the very next sample."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import cached_property
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from qbrec.errors import DataError
from qbrec.storage.ahead import ahead
from qbrec.storage.block_reader import BlockSet, Fields, FieldSpec
from qbrec.storage.order import WINDOW_BLOCKS, EpochOrder, SampleOrder
from qbrec.storage.pinning import pinned
from qbrec.storage.ragged import Ragged

Batch = TypeVar("Batch")
Collate = Callable[[Fields, NDArray[np.int64], int], Batch]


class BatchLoader(Generic[Batch]):
    """Yields optimiser steps; each is this rank's micro-batches, made by `collate` in a thread ahead of use.

    Step `b` of an epoch is samples `b * batch_size …` of the epoch's order (see `SampleOrder`), cut into
    micro-batches of `micro_batch` consecutive samples; micro-batch `j` goes to rank `j % world`. Which
    samples form a micro-batch does not depend on `world`. The last step of an epoch is smaller: nothing is
    dropped or repeated.

    Args:
        blocks: What to read.
        batch_size: Samples of one step, over all ranks.
        micro_batch: Samples of one call of the model.
        seed: Seed of the order.
        rank: This process.
        world: Number of processes.
        collate: Called with (fields, sample numbers int64 [b], epoch); `fields` holds arrays [b, …] and
            `Ragged` of length b by name. It runs in the loader's thread and depends on its arguments only.
        fields: Dense fields by name, ragged ones as `RaggedField`; by default all, which then must be dense.
        select: The samples that take part, bool [num_samples]; by default all.
        prefetch: Steps made ahead; 0 makes each when it is asked for, without a thread.
        pin: Copy the tensors of each micro-batch to page-locked memory, in the loader's thread, so that the
            device fetches them while it computes. Needs CUDA.
        window_blocks: Blocks shuffled together.

    Raises:
        DataError: No sample is selected.
    """

    def __init__(
        self,
        blocks: BlockSet,
        *,
        batch_size: int,
        micro_batch: int,
        seed: int,
        rank: int,
        world: int,
        collate: Collate[Batch],
        fields: Sequence[FieldSpec] | None = None,
        select: NDArray[np.bool_] | None = None,
        prefetch: int = 2,
        pin: bool = False,
        window_blocks: int = WINDOW_BLOCKS,
    ) -> None:
        assert 0 <= rank < world
        assert min(batch_size, micro_batch) > 0
        assert prefetch >= 0
        self.blocks, self.collate = blocks, collate
        self.fields: tuple[FieldSpec, ...] = tuple(blocks.fields if fields is None else fields)
        self.batch_size, self.micro_batch = batch_size, micro_batch
        self.rank, self.world, self.prefetch, self.pin = rank, world, prefetch, pin
        self._selected: NDArray[np.int64] | None = None  # sample numbers that take part, ascending
        self._starts = blocks.starts
        if select is not None:
            assert select.shape == (blocks.num_samples,)
            self._selected = np.flatnonzero(select)
            self._starts = np.searchsorted(self._selected, blocks.starts).astype(np.int64)
        self.order = SampleOrder(np.diff(self._starts), seed=seed, window_blocks=window_blocks)
        self.num_samples = self.order.num_samples
        if self.num_samples == 0:
            raise DataError(
                f"no sample of {blocks.prefix!r} takes part in training",
                where=f"{blocks.num_samples} samples, 0 selected",
                fix="check the catalogue's report for the domain, history lengths and rejected rows",
            )

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one epoch, the same on every rank."""
        return math.ceil(self.num_samples / self.batch_size)

    @property
    def micro_steps(self) -> int:
        """Length of the list that makes a step, the same in every step and on every rank."""
        return math.ceil(math.ceil(self.batch_size / self.micro_batch) / self.world)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the data, its order and the batch size: equal ones have the same samples in every step."""
        recipe = hashlib.blake2b(digest_size=16)
        recipe.update(f"{self.blocks.fingerprint}:{self.order.fingerprint}:{self.batch_size}".encode())
        if self._selected is not None:
            recipe.update(self._selected.astype("<i8").tobytes())
        return recipe.hexdigest()

    def first(self) -> Batch:
        """A micro-batch of the first samples in storage order: for a rank that must run but has none."""
        samples = np.arange(min(self.micro_batch, self.num_samples), dtype=np.int64)
        if self._selected is not None:
            samples = self._selected[samples]
        return self.collate(self.blocks.take(samples, self.fields), samples, 0)

    def iterate(self, epoch: int, *, start: int = 0) -> Iterator[list[Batch | None]]:
        """Steps `start` to the end of one epoch; a run that was cut off begins with its next step.

        Yields:
            `micro_steps` micro-batches, then None where the step has none left for this rank.
        """
        assert 0 <= start <= self.steps_per_epoch
        return ahead(self._make(epoch, start), depth=self.prefetch)

    def _make(self, epoch: int, first: int) -> Generator[list[Batch | None], None, None]:
        """Steps from `first` on, without a thread."""
        order = self.order.epoch(epoch)
        reader = _WindowReader(self, order)
        for step in range(first, self.steps_per_epoch):
            begin = step * self.batch_size
            end = min(begin + self.batch_size, self.num_samples)
            batches: list[Batch | None] = []
            for slot in range(self.micro_steps):
                low = begin + (slot * self.world + self.rank) * self.micro_batch
                high = min(low + self.micro_batch, end)
                batches.append(self._collate(*reader.read(low, high), epoch) if low < high else None)
            yield batches

    def _collate(self, fields: Fields, samples: NDArray[np.int64], epoch: int) -> Batch:
        batch = self.collate(fields, samples, epoch)
        return pinned(batch) if self.pin else batch

    def _own(self, positions: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which positions of the epoch belong to this rank."""
        own: NDArray[np.bool_] = positions % self.batch_size // self.micro_batch % self.world == self.rank
        return own

    def _samples(self, blocks: NDArray[np.int64], local: NDArray[np.int64]) -> NDArray[np.int64]:
        """Sample numbers of (block, place among its selected samples)."""
        index = self._starts[blocks] + local
        return index if self._selected is None else self._selected[index]


class _WindowReader:
    """Gathers this rank's part of a window once, in order; micro-batches are then slices of it."""

    def __init__(self, loader: BatchLoader[Any], order: EpochOrder) -> None:
        self.loader, self.order = loader, order
        self._window = -1
        self._positions = self._samples = np.zeros(0, np.int64)
        self._fields: Fields = {}

    def read(self, begin: int, end: int) -> tuple[Fields, NDArray[np.int64]]:
        """Fields and sample numbers of positions `begin` to `end`, all this rank's; never goes back."""
        parts = []
        ids = []
        while begin < end:
            window = self.order.window_of(begin)
            if window != self._window:
                self._load(window, begin)
            stop = min(end, int(self.order.window_starts[window + 1]))
            low, high = np.searchsorted(self._positions, (begin, stop)).tolist()
            parts.append({name: _slice(value, low, high) for name, value in self._fields.items()})
            ids.append(self._samples[low:high])
            begin = stop
        if len(parts) == 1:
            return parts[0], ids[0]
        return {name: _concatenate([part[name] for part in parts]) for name in parts[0]}, np.concatenate(ids)

    def _load(self, window: int, begin: int) -> None:
        start, end = self.order.window_starts[window : window + 2].tolist()
        positions = np.arange(start, end, dtype=np.int64)
        chosen = self.loader._own(positions) & (positions >= begin)
        blocks, local = self.order.window(window)
        self._window, self._positions = window, positions[chosen]
        self._samples = self.loader._samples(blocks[chosen], local[chosen])
        self._fields = self.loader.blocks.take(self._samples, self.loader.fields)


def _slice(value: NDArray[Any] | Ragged, low: int, high: int) -> NDArray[Any] | Ragged:
    return value.slice(low, high) if isinstance(value, Ragged) else value[low:high]


def _concatenate(parts: list[Any]) -> NDArray[Any] | Ragged:
    if isinstance(parts[0], Ragged):
        values = np.concatenate([part.values for part in parts])
        return Ragged.from_lengths(values, np.concatenate([part.lengths for part in parts]))
    joined: NDArray[Any] = np.concatenate(parts)
    return joined
