"""The bundle of a registered version, fetched file by file: gates read kilobytes of what may be gigabytes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from qbrec.config import RootConfig
from qbrec.errors import DataError, RegistryError
from qbrec.registry.bundle import BUNDLE_FILE, open_part, read_bundle
from qbrec.registry.model import BUNDLE_ARTIFACT
from qbrec.registry.versions import aimed_at
from qbrec.storage.artifact import MANIFEST, Artifact
from qbrec.tracking.client import tracking_uri

_ROOT = f"artifacts/{BUNDLE_ARTIFACT}"  # inside the logged model, and so below the folder it is fetched into


class FetchedBundle:
    """What lies in the bundle of one version.

    Args:
        config: Names the registry and the model.
        version: Number of the version.
        folder: Where what is fetched lies; this class makes a folder of its own in it.
    """

    def __init__(self, config: RootConfig, version: str, *, folder: Path) -> None:
        self.version, self.name = version, config.registry.model_name
        self._config, self._target = config, folder / f"version-{version}"
        self._target.mkdir()

    @cached_property
    def document(self) -> dict[str, Any]:
        """The bundle's description.

        Raises:
            DataError: The version holds no bundle of qbrec, or a damaged one, or one of another format.
            RegistryError: It cannot be fetched.
        """
        try:
            self._fetch(_ROOT, BUNDLE_FILE)
        except DataError as error:
            raise DataError(
                f"version {self.version} of {self.name!r} holds no bundle of qbrec",
                where=error.where,
                fix="register a run with `qbrec register`, or choose another registry.model_name",
            ) from error
        return read_bundle(self._target / _ROOT)

    def part(self, kind: str, *names: str) -> Artifact | None:
        """One part with these of its files, or None where the bundle has no such part.

        Raises:
            DataError: A file is missing or damaged.
            RegistryError: It cannot be fetched.
        """
        entry = self.document["parts"].get(kind)
        if entry is None:
            return None
        if entry["embedded"]:
            self._fetch(f"{_ROOT}/{kind}", MANIFEST, *names)
        return open_part(self._target / _ROOT, kind)

    def whole(self) -> Path:
        """The folder of the whole bundle; whoever opens it finds what is missing.

        Raises:
            RegistryError: It cannot be fetched.
        """
        import mlflow

        with self._reaching(_ROOT) as uri:
            mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(self._target))
        return self._target / _ROOT

    def _fetch(self, place: str, *names: str) -> None:
        import mlflow

        with self._reaching(place) as uri:
            # A store says "not found" in as many ways as there are stores, but each of them can list.
            listed = {Path(info.path).name for info in mlflow.artifacts.list_artifacts(artifact_uri=uri)}
            for name in names:
                if name not in listed:
                    raise DataError(
                        f"version {self.version} of {self.name!r} lacks its file {name!r}",
                        where=uri,
                        fix="register its run again",
                    )
                if not (self._target / place / name).is_file():
                    mlflow.artifacts.download_artifacts(
                        artifact_uri=f"{uri}/{name}", dst_path=str(self._target)
                    )

    @contextlib.contextmanager
    def _reaching(self, place: str) -> Iterator[str]:
        """URI of a place in the version, with MLflow aimed at it and a word for a store that fails."""
        try:
            with aimed_at(self._config):
                yield f"models:/{self.name}/{self.version}/{place}"
        except OSError as error:
            raise RegistryError(
                f"the files of version {self.version} cannot be fetched: {error}",
                where=f"{place} in {tracking_uri(self._config)}",
                fix="check that the store of MLflow's artifacts is up and readable; repeat the command",
            ) from error
