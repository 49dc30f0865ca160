"""What many tasks write beside their tars, and joining it on the driver a piece at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

MIN_BLOCKS = 64  # of a catalogue that fills so many of a megabyte


def write_part(table: pa.Table, path: Path) -> None:
    """Write a task's part of an Arrow file; a task that runs again writes the same."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as out:
        out.write_table(table, max_chunksize=65_536)


def read_parts(directory: Path, prefix: str) -> Iterator[pa.Table]:
    """All parts in the order of their numbers, mapped; each is removed when the next one is asked for."""
    for part in sorted(directory.glob(f"{prefix}.part-*.tmp")):
        with pa.memory_map(str(part)) as source:
            yield pa.ipc.open_file(source).read_all()
        part.unlink()


def join_parts(directory: Path, prefix: str) -> None:
    """Join the parts that the tasks wrote into `<prefix>.arrow`."""
    parts = read_parts(directory, prefix)
    first = next(parts)
    with (
        pa.OSFile(str(directory / f"{prefix}.arrow"), "wb") as sink,
        pa.ipc.new_file(sink, first.schema) as out,
    ):
        out.write_table(first)
        for part in parts:
            out.write_table(part)


def new_array(directory: Path, name: str, dtype: Any, length: int) -> NDArray[Any]:
    """An array of zeros that lives in `<name>.npy`: pages of a file, not memory of this process.

    Raises:
        OSError: The disk is full. Space is reserved now: a full disk would kill the process when it writes a
            mapped page.
    """
    path = directory / f"{name}.npy"
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(length,))
    with open(path, "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def block_size(block_bytes: int, total: int) -> int:
    """Bytes of a block where all hold `total`: large ones read fastest, but ranks share whole blocks."""
    return min(block_bytes, max(total // MIN_BLOCKS, 1 << 20))
