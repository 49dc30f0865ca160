"""A finished artifact as its readers see it: verified files, opened in the way of their format."""

from __future__ import annotations

import calendar
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qbrec.errors import DataError
from qbrec.storage.remote import RemoteFiles
from qbrec.storage.verified import REBUILD, Verified, check_file

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

CREATED = "%Y-%m-%dT%H:%M:%SZ"  # time of a manifest, UTC
_REFETCH = "delete this file: it is fetched again"


class Artifact:
    """A finished artifact on disk; files are verified the first time this process touches them.

    Args:
        path: Its directory.
        manifest: What lies there.
        verified: Notes of what this machine has hashed already; None: it is always hashed.
        source: Where a file comes from that is not in the directory yet.
    """

    def __init__(
        self,
        path: Path,
        manifest: dict[str, Any],
        *,
        verified: Verified | None = None,
        source: RemoteFiles | None = None,
    ) -> None:
        self.path, self.manifest = path, manifest
        self._notes, self._source = verified or Verified(None), source
        self._checked: set[str] = set()

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
        """Path of one file, fetched if need be, after its size and hash were checked.

        Raises:
            DataError: The file is not in the manifest, is missing, cannot be fetched, or differs from it.
        """
        path = self.path / name
        if name in self._checked:
            return path
        expected = self.manifest["files"].get(name)
        if expected is None:
            raise DataError(
                f"the {self.kind} artifact has no file {name!r}", where=str(self.path), fix=REBUILD
            )
        if self._source is not None and not path.is_file():
            created = calendar.timegm(time.strptime(self.manifest["created"], CREATED))
            self._source.fetch(name, path, expected, mtime=created)
            self._notes.note(name, path, expected)
        else:
            fix = REBUILD if self._source is None else _REFETCH
            check_file(name, path, expected, verified=self._notes, fix=fix)
        self._checked.add(name)
        return path

    def verify(self) -> None:
        """Check every file that is here against the manifest; a cached artifact may not have all.

        Raises:
            DataError: One differs, or one is missing that cannot be fetched; it is named.
        """
        for name in self.manifest["files"]:
            if self._source is None or (self.path / name).is_file():
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
