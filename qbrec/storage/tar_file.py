"""The file of a block tar: written in large aligned pieces, under a temporary name until whole; mapped."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from qbrec.errors import DataError
from qbrec.storage.artifact import REBUILD
from qbrec.storage.diskfull import writing

# The kernel keeps a file in memory in pieces as large as the writes that made it. Readers map pieces of 2 MB
# two to three times faster than small ones, so every write but the last is a multiple of that, and aligned.
CHUNK_BYTES = 4 << 20


class TarFile:
    """Collects bytes in chunks; `commit` gives the file its name, `abort` removes it.

    Args:
        path: The final name; its directory exists.

    Attributes:
        size: Bytes given to `write` so far.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, 0
        self._temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        self._chunk = memoryview(bytearray(CHUNK_BYTES))
        self._filled = 0
        # Unbuffered: closing it writes nothing, so that `abort` also works on a full disk.
        self._file = open(self._temporary, "wb", buffering=0)  # noqa: SIM115 - lives until commit or abort

    def write(self, data: bytes | memoryview) -> None:
        """Append.

        Raises:
            DataError: There is no room for it.
        """
        rest = memoryview(data).cast("B")
        self.size += len(rest)
        while len(rest):
            taken = min(len(rest), CHUNK_BYTES - self._filled)
            self._chunk[self._filled : self._filled + taken] = rest[:taken]
            self._filled += taken
            rest = rest[taken:]
            if self._filled == CHUNK_BYTES:
                self._flush()

    def commit(self) -> None:
        """Flush to the disk, then rename: a reader sees the whole file or none.

        Raises:
            DataError: There is no room for it.
        """
        self._flush()
        with writing(self.path):
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._temporary, self.path)
            directory = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)

    def abort(self) -> None:
        """Remove what was written; nothing happens after `commit`."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _flush(self) -> None:
        rest = self._chunk[: self._filled]
        with writing(self.path):
            while len(rest):
                rest = rest[self._file.write(rest) :]
        self._filled = 0


def map_tar(path: Path) -> mmap.mmap:
    """The bytes of a finished tar, mapped read-only.

    Raises:
        DataError: The file is missing or empty.
    """
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise DataError("the block tar is empty", where=str(path), fix=REBUILD)
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise DataError("a block tar is missing", where=str(path), fix=REBUILD) from None
