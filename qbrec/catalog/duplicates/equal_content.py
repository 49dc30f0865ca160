"""Items of equal content: found by an exchange over ranges of the content hash."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from qbrec.catalog.exchange import exchange, range_of, reduce, split_by
from qbrec.catalog.parts import new_array
from qbrec.storage.blocks import BlockSet

ROWS_PER_TASK = 1 << 20


def write_duplicates(directory: Path, num_items: int) -> int:
    """Write `duplicates.npy`: for each row the first one of equal content (its own, where there is no other).

    Args:
        directory: The artifact under construction, with the tars and index of the items.
        num_items: N.

    Returns:
        Number of items that repeat an earlier one's content.
    """
    starts = range(0, num_items, ROWS_PER_TASK)
    partitions = len(starts)

    def split(sources: list[int]) -> tuple[list[pa.Table], None]:
        blocks = BlockSet.open(directory, "items")
        rows = [np.arange(start, min(start + ROWS_PER_TASK, num_items)) for start in sources]
        content = [blocks.column("content", int(part[0]), int(part[-1]) + 1) for part in rows]
        table = pa.table({"content": np.concatenate(content), "row": np.concatenate(rows)})
        keys = np.asarray(table["content"], dtype=np.int64).view(np.uint64)
        return split_by(table, range_of(keys, partitions), partitions), None

    first = new_array(directory, "duplicates", np.int64, num_items)
    for start in starts:
        end = min(start + ROWS_PER_TASK, num_items)
        first[start:end] = np.arange(start, end)
    found = 0
    for rows, originals in reduce(exchange(starts, split, partitions=partitions), _repeats):
        first[rows] = originals
        found += len(rows)
    first.flush()  # type: ignore[attr-defined]
    return found


def _repeats(_number: int, tables: list[pa.Table]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows that repeat the content of an earlier one, and that one: two int64 [n]."""
    table = pa.concat_tables(tables)
    content, row = (np.asarray(table[name], dtype=np.int64) for name in ("content", "row"))
    order = np.lexsort((row, content))
    content, row = content[order], row[order]
    new = np.ones(len(row), dtype=bool)
    new[1:] = content[1:] != content[:-1]
    original = row[np.flatnonzero(new)[np.cumsum(new) - 1]]
    return row[~new], original[~new]
