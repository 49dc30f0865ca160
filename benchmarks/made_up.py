"""Made-up histories as the catalogue artifact has them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from qbrec.storage.blocks import BlockTarWriter, write_block_index


def write_histories(
    folder: Path, lengths: np.ndarray, *, num_items: int, block: int, rng: np.random.Generator
) -> np.ndarray:
    """Write histories of random items, the last two of each for validation and test.

    Args:
        folder: The artifact under construction.
        lengths: Items of each user, at least 2.
        num_items: N.
        block: Users of a block.
        rng: Draws the items.

    Returns:
        How often each item occurs, int64 [N].
    """
    tar, counts = BlockTarWriter(folder, prefix="histories"), np.zeros(num_items, np.int64)
    for begin in range(0, len(lengths), block):
        part = lengths[begin : begin + block]
        rows = rng.integers(0, num_items, int(part.sum()))
        counts += np.bincount(rows, minlength=num_items)
        fields = {
            "user": np.arange(begin, begin + len(part)),
            "domain": np.zeros(len(part), np.uint8),
            "offset": np.concatenate([[0], np.cumsum(part)]),
            "row": rows,
            "time": rows,
            "cut": (part[:, None] - [2, 1]).astype(np.int32),
        }
        tar.add(fields, len(part))
    write_block_index(folder / "blocks.histories.npy", [tar.close()])
    return counts
