"""Hashes of files, and a note of those that this machine has checked, so that they are read once per machine.

A note (`<storage>/verified/<host>/<kind>-<key16>.json`) holds until the machine starts anew, and for a file
only as long as its size, inode and times of change are those that were seen when it was hashed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qbrec.errors import DataError
from qbrec.storage.machine import boot_id

REBUILD = "delete this folder and run again: the stage is rebuilt"
NOTED_BYTES = 1 << 20  # smaller files are hashed faster than a note is written
# A change within one tick of the file system's clock leaves the time as it was: the young is not noted.
_SETTLED_NS = 2_000_000_000


class Verified:
    """Notes of one artifact on this machine.

    Args:
        path: Where they are kept; None: nowhere, every process hashes for itself.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path if boot_id() else None

    def holds(self, name: str, path: Path, sha256: str) -> bool:
        """Whether a process of this machine found this hash, and the file has not changed since."""
        return self._read().get(name) == [*_state(path), sha256]

    def add(self, checked: Mapping[str, tuple[Path, tuple[int, ...], str]]) -> None:
        """Note files that were hashed.

        Args:
            checked: Name → path, its `_state` before it was read, its hash.
        """
        noted = {
            name: [*state, sha256]
            for name, (path, state, sha256) in checked.items()
            if state[0] >= NOTED_BYTES and time.time_ns() - state[1] > _SETTLED_NS and _state(path) == state
        }
        if self._path is None or not noted:
            return
        document = {"boot": boot_id(), "files": self._read() | noted}
        # Others may write at the same time: what gets lost is hashed once more.
        temporary = self._path.with_name(f"{self._path.name}.{os.getpid()}.tmp")
        with contextlib.suppress(OSError):  # a read-only storage: slower, nothing else
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(document), encoding="utf-8")
            os.replace(temporary, self._path)

    def note(self, name: str, path: Path, expected: Mapping[str, Any]) -> None:
        """Note one file that has the hash of its entry in the manifest."""
        self.add({name: (path, _state(path), expected["sha256"])})

    def _read(self) -> dict[str, list[Any]]:
        if self._path is None:
            return {}
        try:
            document = json.loads(self._path.read_text(encoding="utf-8"))
            files: dict[str, list[Any]] = document["files"]
            return files if document["boot"] == boot_id() else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}


def check_file(name: str, path: Path, expected: Mapping[str, Any], *, verified: Verified, fix: str) -> None:
    """Check a file's size and hash.

    Args:
        name: Name in the manifest.
        path: The file.
        expected: Its entry in the manifest, {"size", "sha256"}.
        verified: Notes that may save reading it.
        fix: What the user can do.

    Raises:
        DataError: It is missing or differs.
    """
    if not path.is_file():
        raise DataError("a file of the artifact is missing", where=str(path), fix=fix)
    state = _state(path)
    if state[0] != expected["size"]:
        raise DataError(
            f"a file of the artifact has {state[0]} bytes instead of {expected['size']}",
            where=str(path),
            fix=fix,
        )
    if state[0] >= NOTED_BYTES and verified.holds(name, path, expected["sha256"]):
        return
    if sha256_of(path) != expected["sha256"]:
        raise DataError("a file of the artifact is damaged (its hash differs)", where=str(path), fix=fix)
    verified.add({name: (path, state, expected["sha256"])})


def hash_files(paths: Mapping[str, Path], *, verified: Verified) -> dict[str, dict[str, Any]]:
    """Entries of a manifest, {"size", "sha256"} by name; what was hashed is noted."""
    states = {name: _state(path) for name, path in paths.items()}
    hashes = {name: sha256_of(path) for name, path in paths.items()}
    verified.add({name: (path, states[name], hashes[name]) for name, path in paths.items()})
    return {name: {"size": states[name][0], "sha256": hashes[name]} for name in paths}


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _state(path: Path) -> tuple[int, ...]:
    """Size, modification time, change time (both in ns) and inode."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino
