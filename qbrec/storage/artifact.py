"""Artifacts: immutable directories that exist once their manifest does.

Layout: `<root>/artifacts/<kind>/<key16>/{files…, manifest.json}`. The key says what may be skipped (it hashes
the configuration and the fingerprints of the inputs), the fingerprint says what is really there (it hashes
the files). Finished artifacts may have a remote home too; those found there are opened through a cache.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qbrec.errors import DataError
from qbrec.storage.atomic import write_atomic
from qbrec.storage.cache import entry_source, is_complete, set_aside, sweep, write_entry
from qbrec.storage.filesystem import PATIENCE, Patience
from qbrec.storage.finished import CREATED, Artifact
from qbrec.storage.machine import host_name
from qbrec.storage.remote import MANIFEST, RemoteStore
from qbrec.storage.transfer import MakeMeter
from qbrec.storage.verified import REBUILD, Verified, hash_files

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

__all__ = [
    "MANIFEST",
    "REBUILD",
    "Artifact",
    "ArtifactStore",
    "ArtifactWriter",
    "artifact_key",
    "write_atomic",
]

FORMAT_VERSION = 1


def artifact_key(kind: str, *, config: Mapping[str, Any], seed: int, inputs: Mapping[str, str]) -> str:
    """What an artifact is made from, as 64 hexadecimal digits.

    Args:
        kind: Kind of artifact (`catalog`, `fusion`, …).
        config: JSON-able configuration that shapes the content (never `compute` or `tracking`).
        seed: The run's seed.
        inputs: Fingerprint of each input artifact or raw source by name.
    """
    recipe = {"kind": kind, "format": FORMAT_VERSION, "config": config, "seed": seed, "inputs": dict(inputs)}
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


class ArtifactWriter:
    """Fills the directory of an artifact that does not exist yet. Several ranks may write different files."""

    def __init__(self, path: Path, *, kind: str, key: str, verified: Verified | None = None) -> None:
        self.path, self.kind, self.key = path, kind, key
        self._notes = verified or Verified(None)

    def prepare(self) -> None:
        """Empty the directory: an earlier attempt may have been cut off. One rank, before others write."""
        assert not (self.path / MANIFEST).exists(), "a finished artifact is never overwritten"
        set_aside(self.path)
        self.path.mkdir(parents=True)

    def write_bytes(self, name: str, data: bytes) -> Path:
        """Write a file under a temporary name, fsync, rename."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, data)
        return path

    def save_npy(self, name: str, array: NDArray[Any]) -> Path:
        """Write one array without pickle."""
        import io

        buffer = io.BytesIO()
        np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
        return self.write_bytes(name, buffer.getvalue())

    def save_json(self, name: str, document: Any) -> Path:
        """Write a JSON document."""
        return self.write_bytes(
            name, json.dumps(document, indent=1, sort_keys=True, allow_nan=False).encode()
        )

    def save_safetensors(self, name: str, tensors: Mapping[str, torch.Tensor]) -> Path:
        """Write tensors by name."""
        from safetensors.torch import save

        return self.write_bytes(name, save({k: t.detach().cpu().contiguous() for k, t in tensors.items()}))

    def write_table(self, name: str, table: pa.Table) -> Path:
        """Write an Arrow IPC file that readers map."""
        import pyarrow as pa

        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        return self.write_bytes(name, sink.getvalue().to_pybytes())

    def commit(
        self,
        *,
        meta: Mapping[str, Any],
        inputs: Mapping[str, str],
        config: Mapping[str, Any],
        seed: int,
        made_by: Mapping[str, Any] | None = None,
    ) -> Artifact:
        """Hash all files and write the manifest: from here on the artifact exists.

        Args:
            meta: Facts that later stages and people read.
            inputs: Fingerprint of each input by name.
            config: What of the configuration shaped it.
            seed: What it was drawn with.
            made_by: `workers` and `device` of the process group that made it; no part of the fingerprint.
        """
        present = [p for p in sorted(self.path.rglob("*")) if p.is_file() and not p.name.endswith(".tmp")]
        names = {path.relative_to(self.path).as_posix(): path for path in present}
        files = hash_files(names, verified=self._notes)
        digest = hashlib.sha256(
            "".join(f"{n}:{f['sha256']}\n" for n, f in files.items()).encode()
        ).hexdigest()
        manifest = {
            "kind": self.kind,
            "format_version": FORMAT_VERSION,
            "key": self.key,
            "fingerprint": digest,
            "created": time.strftime(CREATED, time.gmtime()),
            "seed": seed,
            "made_by": dict(made_by or {}),
            "config": dict(config),
            "inputs": dict(inputs),
            "meta": dict(meta),
            "files": files,
        }
        write_atomic(
            self.path / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False).encode()
        )
        return Artifact(self.path, manifest, verified=self._notes)


class ArtifactStore:
    """All artifacts below one storage root (a local or shared file system), and those of a remote home.

    Args:
        root: The storage root.
        remote: URI of the remote home; None: there is none.
        progress: Shows large transfers: called with their bytes and a label.
        patience: How long the remote home may take.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        remote: str | None = None,
        progress: MakeMeter | None = None,
        patience: Patience = PATIENCE,
    ) -> None:
        self.root = Path(root)
        self._progress, self._patience = progress, patience
        self._remote = RemoteStore(remote, progress=progress, patience=patience) if remote else None

    def artifact_dir(self, kind: str, key: str) -> Path:
        """Directory of an artifact, whether it exists or not."""
        return self.root / "artifacts" / kind / key[:16]

    def cache_dir(self, kind: str, key: str) -> Path:
        """Directory of the cache for an artifact of the remote home, whether it exists or not."""
        return self.root / "cache" / kind / key[:16]

    def find(self, kind: str, key: str) -> Artifact | None:
        """The finished artifact of this key, or None: looked for here, then remotely.

        Raises:
            DataError: Its manifest is damaged, or the remote home cannot be read.
        """
        found = self._local(self.artifact_dir(kind, key), key)
        if found is not None or self._remote is None:
            return found
        path = self.cache_dir(kind, key)
        cached = self._local(path, key)
        if cached is not None and is_complete(path, cached.manifest):
            return cached
        manifest = self._remote.manifest(kind, key)
        if manifest is None:
            set_aside(path)  # what is not there any more cannot be completed
            return None
        write_entry(path, manifest, self._remote.files(manifest))
        return self.open(path)

    def find_again(self, kind: str, key: str) -> Artifact | None:
        """What another process's `find` has just found on this storage; the remote home is not asked."""
        found = self._local(self.artifact_dir(kind, key), key)
        return (
            found
            if found is not None or self._remote is None
            else self._local(self.cache_dir(kind, key), key)
        )

    def publish(self, artifact: Artifact) -> bool:
        """Copy a finished artifact to the remote home unless its key is there; False if nothing was to do.

        Raises:
            DataError: A file is damaged, or the remote home refuses or cannot be reached.
        """
        if self._remote is None or artifact.path != self.artifact_dir(artifact.kind, artifact.key):
            return False
        return self._remote.publish(artifact.manifest, artifact.file)

    def prepare(self) -> None:
        """Remove what killed processes left, and see that the remote home can be used.

        Raises:
            DataError: It cannot.
        """
        sweep(self.root)
        if self._remote is not None:
            self._remote.prepare()

    def open(self, path: str | Path) -> Artifact:
        """Open a finished artifact by its directory.

        Raises:
            DataError: There is no manifest, it cannot be read, or another version of qbrec wrote it.
        """
        path = Path(path)
        try:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError(
                "no finished artifact here (no manifest.json)", where=str(path), fix=REBUILD
            ) from None
        except ValueError:
            raise DataError("the manifest is damaged", where=str(path / MANIFEST), fix=REBUILD) from None
        if manifest.get("format_version") != FORMAT_VERSION:
            raise DataError(
                f"artifact format {manifest.get('format_version')} is not format {FORMAT_VERSION}",
                where=str(path),
                fix=REBUILD,
            )
        source = entry_source(path, progress=self._progress, patience=self._patience)
        return Artifact(path, manifest, verified=self._notes(path), source=source)

    def writer(self, kind: str, key: str) -> ArtifactWriter:
        """A writer for the artifact of this key."""
        path = self.artifact_dir(kind, key)
        return ArtifactWriter(path, kind=kind, key=key, verified=self._notes(path))

    def _local(self, path: Path, key: str) -> Artifact | None:
        if not (path / MANIFEST).is_file():
            return None
        artifact = self.open(path)
        return artifact if artifact.key == key else None

    def _notes(self, path: Path) -> Verified | None:
        """Notes for what this store keeps; bundles and checkpoints are read once and carry none."""
        home = path.parent.parent
        if home not in (self.root / "artifacts", self.root / "cache"):
            return None
        name = f"{home.name}-{path.parent.name}-{path.name}.json"
        return Verified(self.root / "verified" / host_name() / name)
