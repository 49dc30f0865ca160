"""The remote home of finished artifacts: `<remote>/artifacts/<kind>/<key16>/`.

Files lie below `<fingerprint16>/` there, so that two machines that built the same key with different bytes
never mix; `manifest.json` names the fingerprint, carries its own hash and is written last. A directory
without it does not exist.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, BinaryIO

from qbrec.errors import DataError
from qbrec.storage.diskfull import writing
from qbrec.storage.filesystem import PATIENCE, Patience
from qbrec.storage.machine import machine_id
from qbrec.storage.transfer import (
    REPAIR,
    MakeMeter,
    download,
    metered,
    read_object,
    sizes_below,
    upload,
)

MANIFEST = "manifest.json"
HOME = "qbrec.json"  # marks a remote home; writing it proves access before any work is done
HOME_FORMAT = 1
PART = ".part"  # ending of a file that is being fetched
_UPLOADS = 4


@dataclass(frozen=True)
class RemoteFiles:
    """Where the files of one artifact lie remotely.

    Attributes:
        uri: Folder of its files.
        patience: How long the store may take.
        progress: Shows large downloads.
    """

    uri: str
    patience: Patience = PATIENCE
    progress: MakeMeter | None = None

    def fetch(self, name: str, target: Path, expected: Mapping[str, Any], *, mtime: float) -> None:
        """Bring one file here; under its name it is whole and has the hash of the manifest.

        Processes of one machine wait for each other; those of several may fetch the same file at the same
        time, and whoever is last replaces equal bytes.

        Args:
            name: Name in the manifest.
            target: Where to.
            expected: Its entry in the manifest, {"size", "sha256"}.
            mtime: Modification time that it gets, so that any later change shows.

        Raises:
            DataError: It cannot be fetched, or twice came with another hash.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        uri = f"{self.uri}/{name}"
        with _exclusive(target.with_name(f"{target.name}.{machine_id()}{PART}")) as (file, part):
            if target.is_file():
                part.unlink()  # another process was faster
                return
            try:
                with writing(target):
                    self._download(uri, file, name, expected)
                    file.flush()
                    os.fsync(file.fileno())
                    os.utime(file.fileno(), (mtime, mtime))
                    os.replace(part, target)
            except BaseException:
                part.unlink(missing_ok=True)
                raise

    def _download(self, uri: str, file: IO[bytes], name: str, expected: Mapping[str, Any]) -> None:
        for _ in range(2):
            file.truncate(0)
            with metered(self.progress, expected["size"], f"fetching {name}") as tick:
                found = download(uri, file, size=expected["size"], tick=tick, patience=self.patience)
            if found == expected["sha256"]:
                return
        raise DataError(
            f"the remote file is damaged: expected SHA-256 {expected['sha256']}, found {found}",
            where=uri,
            fix=REPAIR,
        )


class RemoteStore:
    """Artifacts below a URI.

    Args:
        uri: `s3://bucket/prefix`, `gs://…` or `file:///…`.
        progress: Shows large transfers.
        patience: How long the store may take.
    """

    def __init__(self, uri: str, *, progress: MakeMeter | None = None, patience: Patience = PATIENCE) -> None:
        self.uri, self.progress, self.patience = uri.rstrip("/"), progress, patience

    def prepare(self) -> None:
        """Make it a home of artifacts unless it is one: a wrong bucket or key shows before any work is done.

        Raises:
            DataError: It cannot be reached, read or written, or another version of qbrec wrote it.
        """
        uri = f"{self.uri}/{HOME}"
        data = read_object(uri, patience=self.patience)
        if data is None:
            home = json.dumps({"format_version": HOME_FORMAT}).encode()
            upload(uri, partial(io.BytesIO, home), tick=_unseen, patience=self.patience)
            return
        try:
            version = json.loads(data)["format_version"]
        except (ValueError, KeyError, TypeError):
            version = None
        if version != HOME_FORMAT:
            raise DataError(
                f"this remote storage has format {version} instead of {HOME_FORMAT}",
                where=uri,
                fix="use another prefix, or the qbrec release that wrote it",
            )

    def manifest(self, kind: str, key: str) -> dict[str, Any] | None:
        """Manifest of the finished artifact of this key, or None.

        Raises:
            DataError: It cannot be read, or is damaged.
        """
        manifest = self._folder(kind, key).manifest()
        return manifest if manifest and (manifest["kind"], manifest["key"]) == (kind, key) else None

    def files(self, manifest: Mapping[str, Any]) -> RemoteFiles:
        """Where the files of a manifest lie."""
        return self._folder(manifest["kind"], manifest["key"]).files(manifest)

    def publish(self, manifest: Mapping[str, Any], file: Callable[[str], Path]) -> bool:
        """Copy a finished artifact there; see `RemoteFolder.publish`.

        Returns:
            False where the key was there already: whoever was first stays.
        """
        if self.manifest(manifest["kind"], manifest["key"]) is not None:
            return False
        self._folder(manifest["kind"], manifest["key"]).publish(manifest, file)
        return True

    def _folder(self, kind: str, key: str) -> RemoteFolder:
        return RemoteFolder(f"{self.uri}/artifacts/{kind}/{key[:16]}", self.patience, self.progress)


@dataclass(frozen=True)
class RemoteFolder:
    """The folder of one artifact, whether it exists or not.

    Attributes:
        uri: The folder.
        patience: How long the store may take.
        progress: Shows large transfers.
    """

    uri: str
    patience: Patience = PATIENCE
    progress: MakeMeter | None = None

    def manifest(self) -> dict[str, Any] | None:
        """What lies there, or None.

        Raises:
            DataError: It cannot be read, or is damaged.
        """
        uri = f"{self.uri}/{MANIFEST}"
        for _ in range(2):
            data = read_object(uri, patience=self.patience)
            if data is None:
                return None
            manifest = _checked(data)
            if manifest is not None:
                return manifest
        raise DataError("the remote manifest is damaged (its hash differs)", where=uri, fix=REPAIR)

    def files(self, manifest: Mapping[str, Any]) -> RemoteFiles:
        """Where the files of its manifest lie."""
        return RemoteFiles(f"{self.uri}/{manifest['fingerprint'][:16]}", self.patience, self.progress)

    def publish(self, manifest: Mapping[str, Any], file: Callable[[str], Path]) -> None:
        """Copy a finished artifact there, its manifest last. What an earlier attempt left whole is kept.

        Args:
            manifest: Its manifest.
            file: Gives the verified path of a file by its name.

        Raises:
            DataError: A file is damaged here, or the store refuses or cannot be reached.
        """
        base = self.files(manifest).uri
        wanted = {name: int(entry["size"]) for name, entry in manifest["files"].items()}
        present = sizes_below(base, patience=self.patience)
        missing = {name: size for name, size in wanted.items() if present.get(name) != size}
        paths = {name: file(name) for name in missing}
        with (
            metered(self.progress, sum(missing.values()), f"uploading {manifest['kind']}") as tick,
            ThreadPoolExecutor(_UPLOADS, thread_name_prefix="qbrec-upload") as pool,
        ):
            jobs = [
                pool.submit(upload, f"{base}/{name}", _opening(path), tick=tick, patience=self.patience)
                for name, path in paths.items()
            ]
            try:
                for job in jobs:
                    job.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        present = sizes_below(base, patience=self.patience) if missing else present
        for name, size in wanted.items():
            if present.get(name) != size:
                raise DataError(
                    f"an uploaded file has {present.get(name, 0)} bytes instead of {size}",
                    where=f"{base}/{name}",
                    fix="run the same command again; if it stays, ask who else writes there",
                )
        document = _sealed(manifest)
        upload(f"{self.uri}/{MANIFEST}", partial(io.BytesIO, document), tick=_unseen, patience=self.patience)


def manifest_bytes(manifest: Mapping[str, Any]) -> bytes:
    """A manifest as it lies in an artifact's own directory."""
    return json.dumps(dict(manifest), indent=1, sort_keys=True, allow_nan=False).encode()


def _opening(path: Path) -> Callable[[], BinaryIO]:
    return lambda: open(path, "rb")


def _sealed(manifest: Mapping[str, Any]) -> bytes:
    """A manifest with its own hash, as bytes."""
    document = dict(manifest) | {"sha256": _digest(manifest)}
    return json.dumps(document, indent=1, sort_keys=True, allow_nan=False).encode()


def _checked(data: bytes) -> dict[str, Any] | None:
    """The manifest that `_sealed` wrote, or None if it is another text or names files outside its folder."""
    try:
        document: dict[str, Any] = json.loads(data)
        told = document.pop("sha256")
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    if told != _digest(document):
        return None
    # Whoever can write there must not choose where files go here.
    inside = all(not name.startswith("/") and ".." not in name.split("/") for name in document["files"])
    return document if inside else None


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(dict(manifest), sort_keys=True).encode()).hexdigest()


def _unseen(n: int) -> None:
    pass


@contextmanager
def _exclusive(part: Path) -> Iterator[tuple[IO[bytes], Path]]:
    """The file of this name, held by no other process of this machine."""
    while True:
        with open(part, "ab") as file:
            # Gives way when the holder ends, however it ends.
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                same = os.fstat(file.fileno()).st_ino == part.stat().st_ino
            except FileNotFoundError:
                same = False
            if same:  # else the earlier holder has renamed or removed it
                yield file, part
                return
