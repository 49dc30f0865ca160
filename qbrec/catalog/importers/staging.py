"""An import on disk: written under temporary names, then renamed, `import.json` last."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from qbrec.errors import ConfigError, DataError
from qbrec.storage.atomic import write_atomic
from qbrec.storage.diskfull import writing

ITEMS, INTERACTIONS, RECORD = "items.parquet", "interactions.parquet", "import.json"
_TEMPORARY = ".import.tmp"
_GROUP_ROWS = 1 << 17
_GROUP_BYTES = 64 << 20


class Staging:
    """The temporary folder of an import in its place, locked against a second one.

    Attributes:
        folder: Where to write; gone after the import, whatever its end.
    """

    def __init__(self, out: Path) -> None:
        self.out, self.folder = out, out / _TEMPORARY

    def commit(self, record: Mapping[str, Any]) -> None:
        """Give items and interactions their names, then write `import.json`."""
        # An import that is replaced is no import until the new one is whole.
        (self.out / RECORD).unlink(missing_ok=True)
        for name in (ITEMS, INTERACTIONS):
            with writing(self.out / name):
                _sync(self.folder / name)
                os.replace(self.folder / name, self.out / name)
        _sync(self.out)
        write_atomic(self.out / RECORD, json.dumps(record, indent=1, ensure_ascii=False).encode())


@contextmanager
def staged(out: Path, *, force: bool) -> Iterator[Staging]:
    """Begin an import into a folder.

    Args:
        out: The folder; made where it is missing.
        force: Replace what lies there.

    Raises:
        ConfigError: There are data already, and `force` is not given.
        DataError: The folder cannot be written to, or another import is writing there.
    """
    there = [name for name in (RECORD, ITEMS, INTERACTIONS) if (out / name).exists()]
    if there and not force:
        what = "a finished import" if RECORD in there else f"{there[0]}, but no finished import"
        raise ConfigError(
            f"the folder holds {what}",
            where=str(out),
            fix="choose another folder, or replace it with --force",
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = os.open(out, os.O_RDONLY)
    except OSError as error:
        raise DataError(
            f"cannot write here: {error.strerror}", where=str(out), fix="name a folder you may write to"
        ) from None
    staging = Staging(out)
    try:
        _lock(lock, out)
        shutil.rmtree(staging.folder, ignore_errors=True)  # of an import that was killed
        try:
            staging.folder.mkdir()
        except OSError as error:
            raise DataError(
                f"cannot write here: {error.strerror}", where=str(out), fix="name a folder you may write to"
            ) from None
        try:
            yield staging
        finally:
            shutil.rmtree(staging.folder, ignore_errors=True)
    finally:
        os.close(lock)


def _lock(descriptor: int, out: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            return  # a network file system without locks
        raise DataError(
            "another import is writing here", where=str(out), fix="wait for it, or choose another folder"
        ) from None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class RowGroups:
    """A Parquet file that is written in row groups of moderate size.

    Args:
        path: The file.
        schema: Of all tables.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.rows, self._path = 0, path
        self._waiting: list[pa.Table] = []
        self._count = self._bytes = 0
        with writing(path):
            self._writer = pq.ParquetWriter(path, schema, compression="zstd")

    def write(self, table: pa.Table) -> None:
        """Add rows; they are written once there are enough for a row group."""
        self._waiting.append(table)
        self._count += table.num_rows
        self._bytes += table.nbytes
        if self._count >= _GROUP_ROWS or self._bytes >= _GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._count:
            with writing(self._path):
                self._writer.write_table(pa.concat_tables(self._waiting), row_group_size=_GROUP_ROWS)
        self.rows += self._count
        self._waiting, self._count, self._bytes = [], 0, 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._flush()
        with writing(self._path):
            self._writer.close()
