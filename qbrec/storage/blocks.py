"""Block tars: ordinary WebDataset tars whose samples are whole blocks, one `.npy` member per field.

`<prefix>-000000.tar` holds members `<prefix>-<block 8 digits>.<field>.npy`. Stock `webdataset` opens them: it
splits a name at its first dot, so the field `feature.text` of block 17 is the entry `feature.text.npy` of the
sample `items-00000017` (entries come lower-cased). `blocks.<prefix>.npy` holds the offset of every member, so
`BlockSet` maps arrays straight out of the tar.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from qbrec.errors import DataError
from qbrec.storage.artifact import write_atomic
from qbrec.storage.block_format import (
    BLOCKS_PER_SHARD,
    TAR_BLOCK,
    TAR_END,
    check_field_names,
    check_prefix,
    index_dtype,
    member_name,
    npy_header,
    plain_array,
    shard_name,
    tar_header,
)
from qbrec.storage.block_reader import BlockSet, RaggedField, sequential_blocks
from qbrec.storage.diskfull import writing
from qbrec.storage.tar_file import TarFile

__all__ = ["BlockSet", "BlockTarWriter", "RaggedField", "sequential_blocks", "write_block_index"]


class BlockTarWriter:
    """Writes blocks into tars of about `shard_bytes`; the same blocks always give the same bytes.

    Each tar is written under a temporary name, flushed to the disk and renamed, so a reader sees whole tars
    only. A write that fails removes the unfinished tar. Use it as a context manager: so does leaving on an
    exception.

    Args:
        directory: Where the tars go (an artifact under construction); made if it is not there.
        prefix: What the samples are (`items`, `histories`, `fused`).
        first_shard: Number of the first tar; a writer's tars count up. Parallel writers take distant numbers.
        shard_bytes: A tar that would grow beyond this many bytes is closed and the next one begun; a single
            larger block gets a tar of its own.
        first_block: Number of the first block; by default 4096 numbers are reserved per shard number, so that
            writers with different `first_shard` do not meet. Numbers name blocks and order them within a tar.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        prefix: str,
        first_shard: int = 0,
        shard_bytes: int = 1 << 30,
        first_block: int | None = None,
    ) -> None:
        check_prefix(prefix)
        assert first_shard >= 0
        assert shard_bytes > 0
        self.directory, self.prefix, self.shard_bytes = Path(directory), prefix, shard_bytes
        self._shard = first_shard - 1  # of the open tar
        self._block = first_shard * BLOCKS_PER_SHARD if first_block is None else first_block
        self._fields: list[str] | None = None
        self._file: TarFile | None = None
        self._records: list[tuple[Any, ...]] = []
        self._closed = False

    def add(self, fields: Mapping[str, NDArray[Any]], num_samples: int) -> None:
        """Append one block.

        Args:
            fields: Array of each field; every block of a writer has the same fields.
            num_samples: Samples in the block, at least 1.

        Raises:
            DataError: A field's name or type cannot be stored, a member exceeds what a tar can hold, or the
                disk is full.
        """
        assert not self._closed
        assert num_samples > 0
        if self._fields is None:
            check_field_names(list(fields))
            self._fields = sorted(fields)
        assert sorted(fields) == self._fields, f"block fields {sorted(fields)} differ from {self._fields}"
        members = []
        for field in self._fields:
            array = plain_array(fields[field], field)
            members.append((field, array, npy_header(array)))
        total = sum(_padded(len(header) + array.nbytes) + TAR_BLOCK for _, array, header in members)
        if self._file is not None and self._file.size + total + len(TAR_END) > self.shard_bytes:
            self._finish_shard()
        places = []
        try:
            file = self._file or self._begin_shard()
            for field, array, header in members:
                size = len(header) + array.nbytes
                file.write(tar_header(member_name(self.prefix, self._block, field), size) + header)
                places.append((file.size - len(header), size))
                if array.size:
                    file.write(array.reshape(-1).data)
                file.write(bytes(_padded(size) - size))
        except BaseException:  # half a block must never be finished
            self.abort()
            raise
        self._records.append((self._shard, self._block, num_samples, tuple(places)))
        self._block += 1

    def close(self) -> NDArray[Any]:
        """Finish the last tar.

        Returns:
            One record per block in the order of `add` (`block_format.index_dtype`), for `write_block_index`.

        Raises:
            DataError: The disk is full.
        """
        if not self._closed:
            if self._file is not None:
                self._finish_shard()
            self._closed = True
        return np.array(self._records, dtype=index_dtype(self._fields or []))

    def abort(self) -> None:
        """Remove the unfinished tar; finished ones stay, without an index that lists them."""
        self._closed = True
        if self._file is not None:
            self._file.abort()
            self._file = None
            self._records = [record for record in self._records if record[0] != self._shard]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def _begin_shard(self) -> TarFile:
        self._shard += 1
        path = self.directory / shard_name(self.prefix, self._shard)
        with writing(path):
            self.directory.mkdir(parents=True, exist_ok=True)
            self._file = TarFile(path)
        return self._file

    def _finish_shard(self) -> None:
        assert self._file is not None
        try:
            self._file.write(TAR_END)
            self._file.commit()
        except BaseException:
            self.abort()
            raise
        self._file = None


def write_block_index(path: str | Path, records: Sequence[NDArray[Any]]) -> None:
    """Write `blocks.<prefix>.npy` for the blocks of one or several writers, ordered by tar and place in it.

    Args:
        path: The index, `blocks.<prefix>.npy` beside the tars.
        records: What each writer's `close` returned; those of writers without a block are skipped.

    Raises:
        DataError: There is no block at all, or the disk is full.
    """
    filled = [part for part in records if len(part)]
    if not filled:
        raise DataError(
            "there is not a single sample to store", where=str(path), fix="check the input of this stage"
        )
    assert all(part.dtype == filled[0].dtype for part in filled), (
        "writers of one prefix stored different fields"
    )
    merged = np.concatenate(filled)
    merged = merged[np.lexsort((merged["block"], merged["shard"]))]
    numbers = np.unique(merged["block"])
    assert len(numbers) == len(merged), "two writers used the same block numbers: move first_shard apart"
    buffer = io.BytesIO()
    np.save(buffer, merged, allow_pickle=False)
    write_atomic(Path(path), buffer.getvalue())


def _padded(size: int) -> int:
    return size + -size % TAR_BLOCK
