"""Whether a configuration means the same on the nodes of a cluster as here."""

from __future__ import annotations

import os
from collections.abc import Iterator

from qbrec.catalog.encoders.models import encoders
from qbrec.config import RootConfig
from qbrec.errors import ConfigError
from qbrec.storage.filesystem import is_remote


def check_portable(config: RootConfig) -> None:
    """Refuse paths that the nodes do not have.

    Raises:
        ConfigError: Some are relative; all of them are named.
    """
    wrong = [f"{key}={path}" for key, path in _places(config) if not _is_absolute(path)]
    if not os.path.isabs(config.run.storage):
        wrong.insert(0, f"run.storage={config.run.storage}")
    if wrong:
        raise ConfigError(
            "a submitted run needs absolute paths: the nodes of the cluster do not have this folder",
            where=", ".join(wrong),
            fix="name folders that every node mounts at the same place; input may be s3:// or gs://, and "
            "run.remote keeps artifacts there",
        )


def _places(config: RootConfig) -> Iterator[tuple[str, str]]:
    """Key and value of all paths but the storage."""
    for name, domain in config.data.domains.items():
        yield f"data.domains.{name}.items", domain.items
        yield f"data.domains.{name}.interactions", domain.interactions
    for root in config.catalog.image.roots:
        yield "catalog.image.roots", root
    for section, part, built_in in encoders(config.catalog):
        # A name that is no folder here is one on the model hub.
        if part.encoder != built_in and (part.encoder.startswith((".", "~")) or os.path.isdir(part.encoder)):
            yield f"catalog.{section}.encoder", part.encoder
    uri = config.tracking.uri
    if config.tracking.enabled and uri is not None:
        is_path = "://" not in uri and uri != "databricks"
        if is_path or uri.startswith("sqlite:///"):
            yield "tracking.uri", uri


def _is_absolute(path: str) -> bool:
    return is_remote(path) or os.path.isabs(path.removeprefix("file://").removeprefix("sqlite:///"))
