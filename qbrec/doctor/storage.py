"""The storage and its remote home: a file is written, flushed, renamed, read back and deleted."""

from __future__ import annotations

import fcntl
import io
import os
import tempfile
import time
import uuid
from functools import partial
from pathlib import Path

from qbrec.config import RootConfig
from qbrec.doctor.finding import Finding, failure, of_error, ok
from qbrec.errors import QbrecError
from qbrec.storage.atomic import write_atomic
from qbrec.storage.filesystem import Patience, filesystem
from qbrec.storage.transfer import read_object, upload

PATIENCE = Patience(connect_s=3.0, silence_s=5.0, requests=1, attempts=1, pause_s=0.0)
_WORD = b"qbrec doctor was here\n"


def check_storage(config: RootConfig) -> list[Finding]:
    """The storage, and its remote home if there is one."""
    findings = [_local(config.run.storage)]
    if config.run.remote is not None:
        findings.append(_remote(config.run.remote))
    return findings


def existing_parent(folder: Path) -> Path:
    """The folder itself, or the nearest above it that exists: a run makes the rest."""
    folder = folder.absolute()
    while not os.path.exists(folder) and folder != folder.parent:
        folder = folder.parent
    return folder


def probe_local(folder: Path) -> float:
    """Write, flush, rename, lock, read back and delete a file in a folder that exists.

    Returns:
        Seconds by which the clock of that file system is ahead of this machine's.

    Raises:
        OSError: One of it failed.
        DataError: There is no room.
    """
    with tempfile.TemporaryDirectory(prefix=".qbrec-doctor-", dir=folder) as inside:
        path = Path(inside) / "probe"
        before = time.time()
        write_atomic(path, _WORD)
        middle = (before + time.time()) / 2
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if file.read() != _WORD:
                raise OSError("another content was read than written")
        return os.stat(path).st_mtime - middle


def probe_remote(uri: str) -> float:
    """Write, read back and delete an object below a URI.

    Returns:
        Seconds by which the store's clock is ahead of this machine's, to a second.

    Raises:
        QbrecError: The store cannot be reached or refuses.
        OSError: It fails.
    """
    place = f"{uri.rstrip('/')}/qbrec-doctor-{uuid.uuid4().hex[:12]}"
    before = time.time()
    upload(place, partial(io.BytesIO, _WORD), tick=lambda n: None, patience=PATIENCE)
    middle = (before + time.time()) / 2
    fs, path = filesystem(place, patience=PATIENCE)
    try:
        if read_object(place, patience=PATIENCE) != _WORD:
            raise OSError("another content was read than written")
        return float(fs.get_file_info(path).mtime.timestamp()) - middle
    finally:
        fs.delete_file(path)


def _local(place: str) -> Finding:
    if "://" in place:
        return failure(
            "storage",
            place,
            wrong="run.storage has to be a folder",
            fix="name one that every node mounts; run.remote may be an object store",
        )
    storage = Path(place).absolute()
    folder = existing_parent(storage)
    found = f"{storage}: written, flushed, renamed, locked, read back, deleted"
    if folder != storage:
        found += f" in {folder}, where a run will make it"
    try:
        probe_local(folder)
    except QbrecError as error:
        return of_error("storage", error)
    except OSError as error:
        return failure(
            "storage",
            str(storage),
            wrong=f"cannot write a file in {folder} and read it back: {error.strerror or error}",
            fix=f"let this user (uid {os.geteuid()}) write there and mount it with locks, or set run.storage "
            "to another folder",
        )
    return ok("storage", found)


def _remote(uri: str) -> Finding:
    try:
        probe_remote(uri)
    except QbrecError as error:
        return of_error("remote storage", error)
    except OSError as error:
        return failure(
            "remote storage",
            uri,
            wrong=f"cannot write an object, read it back and delete it: {str(error).splitlines()[0][:300]}",
            fix="check credentials and policy of the bucket: runs write, read, list and delete there",
        )
    return ok("remote storage", f"{uri}: written, read back, deleted")
