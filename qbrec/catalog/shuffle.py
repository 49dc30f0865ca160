"""Shuffle on Ray Data, and joining on the driver what many tasks wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from qbrec.storage.block_format import BLOCKS_PER_SHARD, index_dtype
from qbrec.storage.blocks import write_block_index

if TYPE_CHECKING:
    from ray.data import Dataset


def one_row(summary: dict[str, Any], schema: pa.Schema) -> pa.Table:
    """A summary as what a Ray Data task returns."""
    return pa.Table.from_pylist([summary], schema=schema)


def summaries_of(dataset: Dataset, summarise: Callable[[pa.Table], dict[str, Any]]) -> list[dict[str, Any]]:
    """One small row per block, collected on the driver."""

    def task(table: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([summarise(table)])

    return list(dataset.map_batches(task, batch_size=None, batch_format="pyarrow").iter_rows())


def by_group(
    dataset: Dataset, key: str, num_groups: int, most_rows: int, write: Callable[[pa.Table], pa.Table]
) -> Dataset:
    """Shuffle by `key` and write each group in one task, as many at a time as there are cores.

    Args:
        dataset: Rows with the column `key`.
        key: Number of the group, below `num_groups`.
        num_groups: Groups in all.
        most_rows: An upper bound of the rows in the dataset.
        write: Writes one group and returns a table of one row.
    """
    import ray

    if num_groups == 1:
        # One group is all rows: one task reads all blocks, and no actors of a shuffle are started (seconds).
        # A batch larger than everything waits for the last block.
        return dataset.map_batches(write, batch_size=most_rows + 1, batch_format="pyarrow")
    cores = int(ray.cluster_resources().get("CPU", 1))
    grouped = dataset.groupby(key, num_partitions=min(num_groups, 4 * cores))
    return grouped.map_groups(write, batch_format="pyarrow")


def rows_per_block(block_bytes: int, row_bytes: int, rows_per_shard: int) -> int:
    """Rows in a block of about `block_bytes`, within the block numbers that a shard has reserved."""
    return max(block_bytes // row_bytes, -(-rows_per_shard // BLOCKS_PER_SHARD), 1)


def write_index(directory: Path, prefix: str, records: list[bytes], fields: list[str]) -> None:
    """Write `blocks.<prefix>.npy` from the records (as bytes) of all tasks."""
    kind = index_dtype(fields)
    write_block_index(
        directory / f"blocks.{prefix}.npy", [np.frombuffer(part, dtype=kind) for part in records]
    )


def join_parts(directory: Path, prefix: str) -> None:
    """Join the parts that the tasks wrote, in order, into one Arrow file, a batch at a time."""
    parts = sorted(directory.glob(f"{prefix}.part-*.tmp"))
    target = directory / f"{prefix}.arrow"
    with pa.memory_map(str(parts[0])) as first:
        schema = pa.ipc.open_file(first).schema
    with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_file(sink, schema) as out:
        for part in parts:
            with pa.memory_map(str(part)) as source:
                reader = pa.ipc.open_file(source)
                for number in range(reader.num_record_batches):
                    out.write_batch(reader.get_batch(number))
    for part in parts:
        part.unlink()
