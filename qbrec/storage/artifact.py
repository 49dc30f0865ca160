"""Artifacts: immutable directories that exist once their manifest does.

Layout: `<root>/artifacts/<kind>/<key16>/{files…, manifest.json}`. The key says what may be skipped (it hashes
the configuration and the fingerprints of the inputs), the fingerprint says what is really there (it hashes
the files).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qbrec.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
REBUILD = "delete this folder and run again: the stage is rebuilt"


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


class Artifact:
    """A finished artifact on disk; files are verified the first time this process touches them."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path, self.manifest = path, manifest
        self._verified: set[str] = set()

    @property
    def kind(self) -> str:
        """Kind of artifact, such as `catalog`."""
        return str(self.manifest["kind"])

    @property
    def key(self) -> str:
        """Hash of what it was made from."""
        return str(self.manifest["key"])

    @property
    def fingerprint(self) -> str:
        """Hash of what it contains."""
        return str(self.manifest["fingerprint"])

    @property
    def meta(self) -> dict[str, Any]:
        """Facts about the content, by kind."""
        meta: dict[str, Any] = self.manifest["meta"]
        return meta

    @property
    def inputs(self) -> dict[str, str]:
        """Fingerprint of every input by name."""
        inputs: dict[str, str] = self.manifest["inputs"]
        return inputs

    def has(self, name: str) -> bool:
        """Whether the manifest lists a file of this name."""
        return name in self.manifest["files"]

    def file(self, name: str) -> Path:
        """Path of one file, after its size and hash were checked.

        Raises:
            DataError: The file is not in the manifest, is missing, or differs from it.
        """
        path = self.path / name
        if name in self._verified:
            return path
        expected = self.manifest["files"].get(name)
        if expected is None:
            raise DataError(
                f"the {self.kind} artifact has no file {name!r}", where=str(self.path), fix=REBUILD
            )
        if not path.is_file():
            raise DataError("a file of the artifact is missing", where=str(path), fix=REBUILD)
        size = path.stat().st_size
        if size != expected["size"]:
            raise DataError(
                f"a file of the artifact has {size} bytes instead of {expected['size']}",
                where=str(path),
                fix=REBUILD,
            )
        if _sha256(path) != expected["sha256"]:
            raise DataError(
                "a file of the artifact is damaged (its hash differs)", where=str(path), fix=REBUILD
            )
        self._verified.add(name)
        return path

    def verify(self) -> None:
        """Check every file against the manifest; raises DataError naming the first bad one."""
        for name in self.manifest["files"]:
            self.file(name)

    def load_npy(self, name: str, *, mmap: bool = True) -> NDArray[Any]:
        """An array, mapped read-only by default."""
        array: NDArray[Any] = np.load(self.file(name), mmap_mode="r" if mmap else None, allow_pickle=False)
        return array

    def load_json(self, name: str) -> Any:
        """A JSON document."""
        return json.loads(self.file(name).read_text(encoding="utf-8"))

    def load_safetensors(self, name: str) -> dict[str, torch.Tensor]:
        """Tensors by name, on the CPU."""
        from safetensors.torch import load_file

        return load_file(self.file(name))

    def load_table(self, name: str) -> pa.Table:
        """An Arrow IPC file, mapped."""
        import pyarrow as pa

        return pa.ipc.open_file(pa.memory_map(str(self.file(name)))).read_all()


class ArtifactWriter:
    """Fills the directory of an artifact that does not exist yet. Several ranks may write different files."""

    def __init__(self, path: Path, *, kind: str, key: str) -> None:
        self.path, self.kind, self.key = path, kind, key

    def prepare(self) -> None:
        """Empty the directory: an earlier attempt may have been cut off. One rank, before others write."""
        assert not (self.path / MANIFEST).exists(), "a finished artifact is never overwritten"
        if self.path.exists():
            # Out of the way at once: whoever was cut off there may still be writing.
            old = self.path.with_name(f"{self.path.name}.{os.getpid()}.old")
            os.replace(self.path, old)
            shutil.rmtree(old, ignore_errors=True)
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
        self, *, meta: Mapping[str, Any], inputs: Mapping[str, str], config: Mapping[str, Any], seed: int
    ) -> Artifact:
        """Hash all files and write the manifest: from here on the artifact exists."""
        files = {}
        for path in sorted(self.path.rglob("*")):
            if path.is_file() and not path.name.endswith(".tmp"):
                name = path.relative_to(self.path).as_posix()
                files[name] = {"size": path.stat().st_size, "sha256": _sha256(path)}
        digest = hashlib.sha256(
            "".join(f"{n}:{f['sha256']}\n" for n, f in files.items()).encode()
        ).hexdigest()
        manifest = {
            "kind": self.kind,
            "format_version": FORMAT_VERSION,
            "key": self.key,
            "fingerprint": digest,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "seed": seed,
            "config": dict(config),
            "inputs": dict(inputs),
            "meta": dict(meta),
            "files": files,
        }
        write_atomic(
            self.path / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False).encode()
        )
        return Artifact(self.path, manifest)


class ArtifactStore:
    """All artifacts below one storage root (a local or shared file system)."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def artifact_dir(self, kind: str, key: str) -> Path:
        """Directory of an artifact, whether it exists or not."""
        return self.root / "artifacts" / kind / key[:16]

    def find(self, kind: str, key: str) -> Artifact | None:
        """The finished artifact of this key, or None."""
        path = self.artifact_dir(kind, key)
        if not (path / MANIFEST).is_file():
            return None
        artifact = self.open(path)
        return artifact if artifact.key == key else None

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
        return Artifact(path, manifest)

    def writer(self, kind: str, key: str) -> ArtifactWriter:
        """A writer for the artifact of this key."""
        return ArtifactWriter(self.artifact_dir(kind, key), kind=kind, key=key)


def write_atomic(path: Path, data: bytes) -> None:
    """Write so that a reader sees the old file or the whole new one, also after a power cut."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
