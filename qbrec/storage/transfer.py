"""Whole files to and from an object store: in chunks, hashed on the way, with progress."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import IO, BinaryIO, Protocol

import pyarrow.fs as pafs

from qbrec.errors import DataError
from qbrec.storage.filesystem import PATIENCE, Patience, filesystem, is_missing, retried
from qbrec.storage.machine import host_name

CHUNK = 8 << 20
PARALLEL = 4  # requests under way for one file: a single stream of S3 is slower than most networks
REPAIR = "delete the artifact's folder there: a machine that has it uploads it again on its next run"
SHOWN_BYTES = 64 << 20  # transfers below it show no progress


class Meter(Protocol):
    """What shows how far a transfer has come (`engine.progress.Progress` is one)."""

    def update(self, n: int = 1, /) -> None:
        """Count `n` more bytes."""

    def close(self) -> None:
        """The transfer is over."""


MakeMeter = Callable[[int, str], Meter]  # called with all bytes and a label


@contextmanager
def metered(make: MakeMeter | None, total: int, label: str) -> Iterator[Callable[[int], None]]:
    """A function to count transferred bytes with; shown for large transfers only."""
    if make is None or total < SHOWN_BYTES:
        yield lambda n: None
        return
    meter = make(total, f"{label}, {total / 1e6:,.0f} MB")
    try:
        yield meter.update
    finally:
        meter.close()


def download(
    uri: str,
    file: IO[bytes],
    *,
    size: int,
    tick: Callable[[int], None],
    patience: Patience = PATIENCE,
) -> str:
    """Write an object into an open file.

    Args:
        uri: The object.
        file: Where to, from its present position.
        size: Bytes that the object must have.
        tick: Told the bytes of every chunk.
        patience: Each chunk is asked for again by itself, so a cut does not begin anew.

    Returns:
        SHA-256 of what was written, hexadecimal.

    Raises:
        DataError: It cannot be read, or has another size.
    """
    fs, path = filesystem(uri, patience=patience)

    def opened() -> pafs.NativeFile:
        return fs.open_input_file(path)

    handle = retried(opened, doing="fetch the file", place=uri, patience=patience)
    if handle.size() != size:
        raise DataError(f"the remote file has {handle.size()} bytes instead of {size}", where=uri, fix=REPAIR)

    def read(begin: int) -> bytes:
        wanted = min(CHUNK, size - begin)

        def once() -> bytes:
            data: bytes = handle.read_at(wanted, begin)
            if len(data) != wanted:
                raise OSError(f"the answer ends after {len(data)} of {wanted} bytes")
            return data

        return retried(once, doing="fetch the file", place=uri, patience=patience)

    digest = hashlib.sha256()
    with ThreadPoolExecutor(PARALLEL, thread_name_prefix="qbrec-fetch") as pool:
        ahead: deque[Future[bytes]] = deque()
        try:
            for begin in range(0, size, CHUNK):
                ahead.append(pool.submit(read, begin))
                if len(ahead) > PARALLEL:
                    _store_chunk(ahead.popleft().result(), file, digest, tick)
            while ahead:
                _store_chunk(ahead.popleft().result(), file, digest, tick)
        finally:
            for waiting in ahead:
                waiting.cancel()
    return digest.hexdigest()


def read_object(uri: str, *, patience: Patience = PATIENCE) -> bytes | None:
    """A small object in whole; None if there is none.

    Raises:
        DataError: It cannot be read.
    """
    fs, path = filesystem(uri, patience=patience)

    def once() -> bytes | None:
        try:
            with fs.open_input_file(path) as file:
                data: bytes = file.read()
                return data
        except OSError as error:
            if is_missing(error):
                return None
            raise

    return retried(once, doing="read the object", place=uri, patience=patience)


def upload(
    uri: str,
    source: Callable[[], BinaryIO],
    *,
    tick: Callable[[int], None],
    patience: Patience = PATIENCE,
) -> None:
    """Write an object; it is there only when it is whole.

    Args:
        uri: The object.
        source: Opens what is to be written; once more for every attempt.
        tick: Told the bytes of every chunk, and minus those of an attempt that failed.
        patience: How often it is tried.

    Raises:
        DataError: It cannot be written.
    """
    fs, path = filesystem(uri, patience=patience)

    def once() -> None:
        sent = 0
        try:
            with source() as file:
                if isinstance(fs, pafs.LocalFileSystem):
                    for n in _write_local(path, file):
                        tick(n)
                        sent += n
                    return
                # Closed after an error the stream may leave an object that is too short: whoever publishes
                # compares sizes before the manifest is written.
                with fs.open_output_stream(path) as out:
                    while chunk := file.read(CHUNK):
                        out.write(chunk)
                        tick(len(chunk))
                        sent += len(chunk)
        except BaseException:
            tick(-sent)
            raise

    retried(once, doing="write the file", place=uri, patience=patience)


def sizes_below(uri: str, *, patience: Patience = PATIENCE) -> dict[str, int]:
    """Size of every object below a folder, by its path inside it; empty if there is none."""
    fs, path = filesystem(uri, patience=patience)
    selector = pafs.FileSelector(path, recursive=True, allow_not_found=True)
    infos = retried(lambda: fs.get_file_info(selector), doing="list the folder", place=uri, patience=patience)
    return {i.path[len(path) + 1 :]: i.size for i in infos if i.type == pafs.FileType.File}


def delete_below(uri: str, *, patience: Patience = PATIENCE) -> None:
    """Remove a folder with all it holds; nothing happens where there is none.

    Raises:
        DataError: It cannot be removed.
    """
    fs, path = filesystem(uri, patience=patience)

    def once() -> None:
        if fs.get_file_info(path).type != pafs.FileType.NotFound:
            fs.delete_dir(path)

    retried(once, doing="delete the folder", place=uri, patience=patience)


def _store_chunk(data: bytes, file: IO[bytes], digest: hashlib._Hash, tick: Callable[[int], None]) -> None:
    digest.update(data)
    file.write(data)
    tick(len(data))


def _write_local(path: str, file: IO[bytes]) -> Iterator[int]:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.{host_name()}.{os.getpid()}.tmp"  # machines may share it
    try:
        with open(temporary, "wb") as out:
            while chunk := file.read(CHUNK):
                out.write(chunk)
                yield len(chunk)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
