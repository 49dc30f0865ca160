"""The global order of samples: a pure function of (seed, epoch, block sizes), whatever the world size."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

WINDOW_BLOCKS = 16


class SampleOrder:
    """Permutes blocks, then samples within windows of consecutive permuted blocks.

    A window of 16 one-megabyte blocks mixes some ten thousand items while reads stay local: only a window's
    blocks are touched at a time, and any place in the epoch is found without walking there.

    Args:
        block_sizes: Samples of each block, int64 [num_blocks]; zero is allowed.
        seed: Seed of the order.
        window_blocks: Blocks shuffled together.
    """

    def __init__(
        self, block_sizes: NDArray[np.int64], *, seed: int, window_blocks: int = WINDOW_BLOCKS
    ) -> None:
        assert window_blocks > 0
        self.block_sizes = np.asarray(block_sizes, dtype=np.int64)
        self.seed, self.window_blocks = seed, window_blocks
        self.num_samples = int(self.block_sizes.sum())
        digest = hashlib.blake2b(f"order:{seed}".encode(), digest_size=16).digest()
        self._key = np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    @property
    def fingerprint(self) -> str:
        """Hash of all that decides the order, 32 hexadecimal digits."""
        recipe = hashlib.blake2b(f"{self.seed}:{self.window_blocks}:".encode(), digest_size=16)
        recipe.update(self.block_sizes.astype("<i8").tobytes())
        return recipe.hexdigest()

    def epoch(self, epoch: int) -> EpochOrder:
        """The order of one epoch."""
        assert epoch >= 0
        return EpochOrder(self, epoch)

    def _permutation(self, length: int, epoch: int, stream: int) -> NDArray[np.int64]:
        # Raw Philox output is fixed for ever; `Generator.permutation` may change between versions of numpy.
        counter = np.array([0, 0, stream, epoch], dtype=np.uint64)
        bits = np.random.Philox(key=self._key, counter=counter).random_raw(length)
        return np.argsort(bits, kind="stable")


class EpochOrder:
    """One epoch's order, window by window.

    Attributes:
        blocks: Blocks in their permuted order, int64 [num_blocks].
        window_starts: Position in the epoch at which each window begins and, last, the number of samples.
    """

    def __init__(self, order: SampleOrder, epoch: int) -> None:
        self._order, self._epoch = order, epoch
        self.blocks = order._permutation(len(order.block_sizes), epoch, 0)
        ends = np.cumsum(order.block_sizes[self.blocks])
        edges = np.arange(order.window_blocks, len(ends), order.window_blocks)
        self.window_starts = np.concatenate([[0], ends[edges - 1], ends[-1:]]).astype(np.int64)

    @property
    def num_windows(self) -> int:
        """Number of windows."""
        return len(self.window_starts) - 1

    def window(self, window: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Block and place within it of the samples of one window, in order: two int64 [n]."""
        order = self._order
        first = window * order.window_blocks
        members = self.blocks[first : first + order.window_blocks]
        sizes = order.block_sizes[members]
        blocks = np.repeat(members, sizes)
        local = np.arange(len(blocks), dtype=np.int64) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        shuffled = order._permutation(len(blocks), self._epoch, window + 1)
        return blocks[shuffled], local[shuffled]

    def window_of(self, position: int) -> int:
        """The window in which a position of the epoch lies."""
        return int(np.searchsorted(self.window_starts, position, side="right")) - 1

    def __iter__(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        return map(self.window, range(self.num_windows))
