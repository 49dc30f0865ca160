"""Random access to an object that must not change under the reader."""

from __future__ import annotations

import threading

import pyarrow as pa

from qbrec.errors import DataError
from qbrec.storage.filesystem import PATIENCE, Patience, filesystem, retried


class RemoteInput:
    """A file object (for `pyarrow.PythonFile`) over one object of a store.

    A read that fails is repeated. After every read the object must still be the one that was opened: ranges
    of two versions would decode to rows that nobody wrote.

    Args:
        uri: The object.
        patience: How long the store may take.

    Raises:
        DataError: It does not exist or cannot be read.
    """

    def __init__(self, uri: str, *, patience: Patience = PATIENCE) -> None:
        self.uri, self.patience, self.closed = uri, patience, False
        self._fs, self._path = filesystem(uri, patience=patience)
        self._lock, self._position = threading.Lock(), 0
        self._handle = retried(self._open, doing="read the file", place=uri, patience=patience)
        self._size, self._version = self._handle.size(), _version(self._handle)

    def read(self, n: int = -1, /) -> bytes:
        """The next `n` bytes, all that are left by default.

        Raises:
            DataError: They cannot be read, or the object was replaced or deleted.
        """
        with self._lock:
            wanted = self._size - self._position
            if n >= 0:
                wanted = min(n, wanted)
            if wanted <= 0:
                return b""
            data = retried(
                lambda: self._read(wanted), doing="read the file", place=self.uri, patience=self.patience
            )
            self._position += wanted
            return data

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """Move to a position; returns it."""
        self._position = offset + (0, self._position, self._size)[whence]
        return self._position

    def tell(self) -> int:
        """Present position."""
        return self._position

    def close(self) -> None:
        """Let go of it."""
        self.closed = True

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def writable(self) -> bool:
        """Never."""
        return False

    def _open(self) -> pa.NativeFile:
        return self._fs.open_input_file(self._path)

    def _read(self, wanted: int) -> bytes:
        data: bytes = self._handle.read_at(wanted, self._position)
        # Asked afterwards: if it is the old version still, the bytes were of the old version too.
        if _version(self._fs.open_input_file(self._path)) != self._version:
            raise DataError(
                "the object was replaced while it was read",
                where=self.uri,
                fix="leave the input alone while the catalogue is built; run the same command again",
            )
        if len(data) != wanted:
            raise OSError(f"the answer ends after {len(data)} of {wanted} bytes")
        return data


def _version(handle: pa.NativeFile) -> tuple[object, ...]:
    """What changes whenever the object does."""
    known = {key.lower(): value for key, value in (handle.metadata() or {}).items()}
    return handle.size(), known.get("etag"), known.get("generation"), known.get("last-modified")
