"""A folder of results, here or in an object store: whole files by name, each there only when it is whole."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path

import pyarrow.fs as pafs

from qbrec.storage.atomic import write_atomic
from qbrec.storage.filesystem import filesystem
from qbrec.storage.transfer import read_object, sizes_below, upload


class Folder:
    """Files below a path, `s3://…`, `gs://…` or `file:///…`.

    Args:
        uri: The folder; made when the first file is written.
    """

    def __init__(self, uri: str) -> None:
        fs, path = filesystem(uri)
        self.local = Path(path) if isinstance(fs, pafs.LocalFileSystem) else None
        self.uri = str(self.local) if self.local is not None else uri.rstrip("/")

    def place(self, name: str) -> str:
        """Path or URI of a file."""
        return f"{self.uri}/{name}"

    def write(self, name: str, data: bytes) -> None:
        """Write a file under a temporary name, fsync, rename; in an object store as one object.

        Raises:
            DataError: There is no room, or the store refuses or cannot be reached.
        """
        if self.local is None:
            upload(self.place(name), partial(io.BytesIO, data), tick=_unseen)
            return
        self.local.mkdir(parents=True, exist_ok=True)
        write_atomic(self.local / name, data)

    def read(self, name: str) -> bytes | None:
        """A small file in whole; None if there is none.

        Raises:
            DataError: It cannot be read.
        """
        return read_object(self.place(name))

    def sizes(self) -> dict[str, int]:
        """Size of every file below the folder, by its path inside it."""
        return sizes_below(self.uri)


def _unseen(n: int) -> None:
    pass
