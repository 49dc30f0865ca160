"""Bytes of a file or URL as a stream: decompressed, counted."""

from __future__ import annotations

import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import pyarrow as pa

from qbrec.catalog.importers.http_bytes import HttpBytes, is_url, url_size
from qbrec.engine.progress import Progress
from qbrec.errors import DataError
from qbrec.storage.diskfull import writing

BLOCK_BYTES = 8 << 20
LONGEST_LINE = 64 << 20  # bytes
Moved = Callable[[int], None]  # told how many more bytes of the source have been read
T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """One file that is read: where it lies, and its bytes as they lie there (compressed; 0: unknown)."""

    place: str
    size: int


def find_source(place: str) -> Source:
    """A file or URL, after looking whether it is there.

    Raises:
        DataError: There is no such file, or the server cannot be reached.
    """
    if is_url(place):
        return Source(place, url_size(place))
    if os.path.isdir(place):
        raise DataError("this is a folder, not a file", where=place, fix="name the file in it")
    try:
        return Source(place, os.path.getsize(place))
    except OSError as error:
        raise unreadable(place, error) from None


def unreadable(place: str, error: OSError) -> DataError:
    """The error for a file that cannot be opened."""
    return DataError(
        f"cannot read the file: {error.strerror or error}", where=place, fix="check path and permissions"
    )


def open_raw(place: str, moved: Moved) -> io.BufferedReader:
    """The bytes of a file or URL as they are; `moved` is told what has been read."""
    try:
        raw: Any = HttpBytes(place) if is_url(place) else open(place, "rb", buffering=0)  # noqa: SIM115
    except OSError as error:
        raise unreadable(place, error) from None
    return io.BufferedReader(_Counted(raw, moved), buffer_size=1 << 20)


@contextmanager
def local_copy(place: str, *, silent: bool = False) -> Iterator[str]:
    """A path to read a file by that cannot be streamed: a URL's content in a temporary file, a path as it is.

    Raises:
        DataError: The server fails again and again, or there is no room for the file.
    """
    if not is_url(place):
        yield place
        return
    with tempfile.NamedTemporaryFile(prefix="qbrec-import-") as file:
        with (
            Progress(url_size(place), "download", silent=silent) as progress,
            open_raw(place, progress.update) as stream,
            writing(Path(file.name)),
        ):
            shutil.copyfileobj(stream, file, 1 << 20)
            file.flush()
        yield file.name


@contextmanager
def open_stream(place: str, moved: Moved) -> Iterator[IO[bytes]]:
    """A readable stream of a file's or URL's bytes, decompressed where it is gzip (by its first bytes).

    Raises:
        DataError: The file is missing, cut off or damaged, or the server fails again and again.
    """
    with open_raw(place, moved) as buffered:
        packed = buffered.peek(2)[:2] == b"\x1f\x8b"
        stream = pa.CompressedInputStream(buffered, "gzip") if packed else buffered
        try:
            with stream:
                yield stream
        except OSError as error:
            if not packed:
                raise
            raise DataError(
                f"the gzip file is cut off or damaged: {error}", where=place, fix="download it again"
            ) from None


def line_blocks(stream: IO[bytes], place: str) -> Iterator[bytes]:
    """Blocks of some megabytes that end at the end of a line.

    Raises:
        DataError: A line is longer than `LONGEST_LINE`.
    """
    rest = b""
    while chunk := stream.read(BLOCK_BYTES):
        head, newline, tail = chunk.rpartition(b"\n")
        if not newline:
            rest += chunk
            if len(rest) > LONGEST_LINE:
                raise DataError(
                    f"a line is longer than {LONGEST_LINE >> 20} MB",
                    where=place,
                    fix="bring a file with one record a line",
                )
            continue
        yield rest + head + newline
        rest = tail
    if rest:
        yield rest


class _Counted(io.RawIOBase):
    """A raw stream that reports what is read of it."""

    def __init__(self, raw: Any, moved: Moved) -> None:
        self._raw, self._moved = raw, moved

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._raw.seekable())

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return int(self._raw.seek(offset, whence))

    def tell(self) -> int:
        return int(self._raw.tell())

    def readinto(self, buffer: Any) -> int:
        count = int(self._raw.readinto(buffer) or 0)
        self._moved(count)
        return count

    def close(self) -> None:
        if not self.closed:
            self._raw.close()
        super().close()
