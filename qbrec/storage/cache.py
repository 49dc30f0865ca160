"""The local cache of remote artifacts, `<storage>/cache/<kind>/<key16>/`: a file comes when it is touched.

An entry is an artifact's directory whose files may be missing; `remote.json` beside its manifest says where
they are. Whoever opens it by its path, on any machine that shares the storage, can go on fetching.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from qbrec.errors import DataError
from qbrec.storage.atomic import write_atomic
from qbrec.storage.filesystem import Patience
from qbrec.storage.machine import host_name, is_alive, machine_id
from qbrec.storage.remote import MANIFEST, PART, RemoteFiles
from qbrec.storage.transfer import MakeMeter

SOURCE = "remote.json"
OLD = ".old"
_ABANDONED_S = 24 * 3600.0  # after it, what another machine left is taken for dead


def entry_source(path: Path, *, progress: MakeMeter | None, patience: Patience) -> RemoteFiles | None:
    """Where the files of a cache entry come from; None for a directory that is complete by itself.

    Raises:
        DataError: The note is damaged.
    """
    try:
        uri = json.loads((path / SOURCE).read_text(encoding="utf-8"))["uri"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise DataError(
            "the note where a cached artifact comes from is damaged",
            where=str(path / SOURCE),
            fix="delete this folder: what is needed of it is fetched again",
        ) from None
    return RemoteFiles(str(uri), patience, progress)


def is_complete(path: Path, manifest: dict[str, Any]) -> bool:
    """Whether every file of a cache entry is here."""
    return all((path / name).is_file() for name in manifest["files"])


def write_entry(path: Path, manifest: dict[str, Any], source: RemoteFiles) -> None:
    """Make or renew a cache entry; files of the same fingerprint that were fetched before are kept."""
    note = json.dumps({"uri": source.uri}).encode()
    document = json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False).encode()
    with contextlib.suppress(OSError):
        if (path / MANIFEST).read_bytes() == document and (path / SOURCE).read_bytes() == note:
            return
    if not _same_content(path, manifest):
        set_aside(path)
    path.mkdir(parents=True, exist_ok=True)
    write_atomic(path / SOURCE, note)
    write_atomic(path / MANIFEST, document)


def set_aside(path: Path) -> None:
    """Remove a directory at once: whoever still writes below it writes into nothing that counts."""
    old = path.with_name(f"{path.name}.{host_name()}.{os.getpid()}{OLD}")
    shutil.rmtree(old, ignore_errors=True)
    try:
        os.replace(path, old)
    except FileNotFoundError:
        return
    shutil.rmtree(old, ignore_errors=True)


def sweep(root: Path) -> None:
    """Remove below a storage root what killed processes left: parts of downloads, half-done clean-ups."""
    for part in (root / "cache").rglob(f"*{PART}"):
        own = part.name.removesuffix(PART).rpartition(".")[2] == machine_id()
        with contextlib.suppress(OSError):  # another process may be removing it too
            if own or _abandoned(part):
                _remove_unheld(part)
    for old in [*(root / "artifacts").glob(f"*/*{OLD}"), *(root / "cache").glob(f"*/*{OLD}")]:
        host, _, process = old.name.removesuffix(OLD).partition(".")[2].rpartition(".")
        own = host == host_name() and process.isdigit()
        with contextlib.suppress(OSError):
            if not is_alive(int(process)) if own else _abandoned(old):
                shutil.rmtree(old, ignore_errors=True)


def _same_content(path: Path, manifest: dict[str, Any]) -> bool:
    try:
        there = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        return bool(there["fingerprint"] == manifest["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _remove_unheld(part: Path) -> None:
    with open(part, "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return  # its process lives
        part.unlink()


def _abandoned(path: Path) -> bool:
    # The change time: a rename sets it, and nobody can set it back.
    return time.time() - path.stat().st_ctime > _ABANDONED_S
