"""Registered versions as they are served: found by URI, their bundle brought to where it can be opened."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from qbrec.config import RootConfig
from qbrec.errors import ConfigError, RegistryError
from qbrec.registry.model import BUNDLE_ARTIFACT
from qbrec.registry.versions import aimed_at, by_alias, registry_errors
from qbrec.tracking.client import connect, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

_URI = re.compile(r"models:/(?P<name>[^/@]+)(@(?P<alias>[^/@]+)|/(?P<version>\d+))")
_METRIC = "metric."


@dataclass(frozen=True)
class Version:
    """A version of a registered model.

    Attributes:
        name: Of the registered model.
        number: As MLflow writes it.
        run: `run.name` of the run that it was registered from.
        metrics: Of its evaluation.
    """

    name: str
    number: str
    run: str
    metrics: dict[str, float]

    def __str__(self) -> str:
        return f"models:/{self.name}/{self.number}"


def model_uri(name: str, *, alias: str | None = None, number: str | None = None) -> str:
    """`models:/name@alias`, or `models:/name/3`."""
    return f"models:/{name}@{alias}" if number is None else f"models:/{name}/{number}"


def find_version(config: RootConfig, uri: str) -> Version:
    """The version that a URI names now.

    Args:
        config: Names the registry.
        uri: `models:/name@alias` or `models:/name/3`.

    Raises:
        ConfigError: It is no such URI.
        RegistryError: There is no such version, or MLflow is not reachable.
    """
    parsed = _URI.fullmatch(uri)
    if parsed is None:
        raise ConfigError(
            f"{uri!r} names no registered model",
            where="--model",
            fix="write models:/qbrec@champion or models:/qbrec/3",
        )
    with registry_errors(config):
        client, _ = connect(config)
        name, alias = parsed["name"], parsed["alias"]
        found = by_alias(client, name, alias) if alias else _by_number(client, name, parsed["version"])
    if found is None:
        raise RegistryError(
            f"there is no {uri}",
            where=tracking_uri(config),
            fix="register a finished run with `qbrec register`, give it @champion with `qbrec promote`",
        )
    metrics = {k.removeprefix(_METRIC): float(v) for k, v in found.tags.items() if k.startswith(_METRIC)}
    return Version(name, str(found.version), found.tags.get("qbrec.run", ""), metrics)


def fetch_bundle(config: RootConfig, version: Version) -> Path:
    """Folder of a version's bundle: where MLflow keeps it, or a copy below `<storage>/serving`.

    Copies of earlier versions stay: another process may have them mapped.

    Raises:
        RegistryError: MLflow is not reachable, or the version holds no bundle.
    """
    import mlflow
    from mlflow.store.artifact.models_artifact_repo import ModelsArtifactRepository

    with registry_errors(config), aimed_at(config):
        # The place that all of it lies below, an alias of the registry resolved.
        home = ModelsArtifactRepository.get_underlying_uri(str(version))
        split = urlsplit(home)
        if split.scheme in ("", "file"):
            return Path(unquote(split.path)) / "artifacts" / BUNDLE_ARTIFACT
        mark = hashlib.sha256(f"{tracking_uri(config)} {home}".encode()).hexdigest()[:8]
        target = Path(config.run.storage).resolve() / "serving" / f"{version.name}-{version.number}-{mark}"
        if target.is_dir():
            return target
        fresh = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}.tmp")
        fresh.mkdir(parents=True)
        try:
            uri = f"{version}/artifacts/{BUNDLE_ARTIFACT}"
            found = mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(fresh))
            os.replace(found, target)
        except OSError as error:
            if not target.is_dir():  # else another process was faster
                raise RegistryError(
                    f"the bundle of {version} cannot be fetched: {error}",
                    where=home,
                    fix="check the artifact store of MLflow, or register the run again",
                ) from error
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    return target


def _by_number(client: MlflowClient, name: str, number: str) -> ModelVersion | None:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version(name, number)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
