"""Versions and aliases of the registered model: register, look up, open what the gate needs."""

from __future__ import annotations

import contextlib
import hashlib
import io
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qbrec.config import RootConfig
from qbrec.errors import DataError, QbrecError, RegistryError
from qbrec.registry.bundle import (
    BUNDLE_FILE,
    GENERATION_PARTS,
    open_part,
    parts_of,
    read_bundle,
    require,
    write_bundle,
)
from qbrec.registry.card import model_card
from qbrec.registry.lock import registry_lock
from qbrec.registry.metrics import qbrec_means
from qbrec.registry.model import BUNDLE_ARTIFACT, log_bundle
from qbrec.registry.recommend import Recommender
from qbrec.storage.artifact import Artifact
from qbrec.storage.id_table import numbered
from qbrec.tracking.client import connect, tracking_uri
from qbrec.tracking.flatten import safe_name
from qbrec.tracking.state import load_state

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHALLENGER, CHAMPION, PREVIOUS = "challenger", "champion", "previous"
GENERATIONS_TAG, NO_GENERATIONS = "qbrec.generations", "none"


def register(config: RootConfig, run_dir: Path, artifacts: Mapping[str, Artifact]) -> str:
    """Pack a finished run into a new version of the registered model and point @challenger at it.

    The same artifacts are registered once: repeating it finds the version and moves the alias only.

    Args:
        config: The run's configuration.
        run_dir: Its directory; the MLflow run of its tracking, if any, becomes the version's source.
        artifacts: `catalog`, `quantizer`, `finetune`, `evaluation`, and the generations appended since:
            `generation-1`, `ids-1`, `alike-1`, `generation-2`, …

    Returns:
        The version number, as MLflow writes it.

    Raises:
        DataError: An artifact is missing or damaged.
        RegistryError: MLflow is not reachable or refuses.
    """
    prints = {f"qbrec.{kind}": require(artifacts, kind).fingerprint for kind in parts_of(artifacts)}
    prints[GENERATIONS_TAG] = _generations_print(artifacts)
    name = config.registry.model_name
    with registry_errors(config), registry_lock(lock_folder(config)):
        client, experiment = connect(config)
        version = _same(client, name, prints)
        if version is None:
            tags = {"qbrec.run": config.run.name, "qbrec.run_dir": str(run_dir.resolve()), **prints}
            metrics = qbrec_means(artifacts["evaluation"].load_json("metrics.json"))
            tags |= {f"metric.{safe_name(k)}": f"{v:.6f}" for k, v in metrics.items()}
            with tempfile.TemporaryDirectory(prefix="qbrec-bundle-") as folder:
                card = model_card(config, artifacts)
                bundle = write_bundle(Path(folder) / "bundle", config=config, artifacts=artifacts, card=card)
                version = _log(config, run_dir, bundle, experiment=experiment, tags=tags)
            client.update_model_version(name, version, description=card)
        client.set_registered_model_alias(name, CHALLENGER, version)
    return version


def _log(config: RootConfig, run_dir: Path, bundle: Path, *, experiment: str, tags: dict[str, str]) -> str:
    import mlflow

    recommender = Recommender.load(bundle)
    state = load_state(run_dir)
    parent = state.parent if state is not None else None
    with aimed_at(config):
        if parent is not None and parent.run_id is not None:
            run = mlflow.start_run(run_id=parent.run_id)
        else:
            run = mlflow.start_run(experiment_id=experiment, run_name=f"{config.run.name} (registered)")
        with run:
            uri = log_bundle(bundle, recommender=recommender, model_name=config.registry.model_name)
            # MLflow prints two lines about what it made; the command line says it in its own words.
            with contextlib.redirect_stderr(io.StringIO()):
                version = mlflow.register_model(uri, config.registry.model_name, tags=tags)
    return str(version.version)


def _generations_print(artifacts: Mapping[str, Artifact]) -> str:
    """SHA-256 over the fingerprints of all generations, their IDs and their rows of the item graphs."""
    found = [one for kind in GENERATION_PARTS for one in numbered(artifacts, kind)]
    if not found:
        return NO_GENERATIONS
    return hashlib.sha256("".join(artifact.fingerprint for artifact in found).encode()).hexdigest()


def _same(client: MlflowClient, name: str, prints: Mapping[str, str]) -> str | None:
    """The newest version made from exactly these artifacts."""
    found = client.search_model_versions(f"name = '{name}'")
    # A version without that tag was registered before there were generations.
    known = [(v, {GENERATIONS_TAG: NO_GENERATIONS} | dict(v.tags)) for v in found]
    same = [v for v, tags in known if all(tags.get(tag) == value for tag, value in prints.items())]
    return max((str(v.version) for v in same), key=int, default=None)


@contextlib.contextmanager
def aimed_at(config: RootConfig) -> Iterator[None]:
    """MLflow's module-level API aimed at our store, and back again afterwards."""
    import mlflow

    before = mlflow.get_tracking_uri(), mlflow.get_registry_uri()
    uri = tracking_uri(config)
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before[0])
        mlflow.set_registry_uri(before[1])


@contextlib.contextmanager
def registry_errors(config: RootConfig) -> Iterator[None]:
    """Say which server refused, in place of a traceback."""
    try:
        yield
    except QbrecError:
        raise
    except Exception as error:
        if not type(error).__module__.startswith(("mlflow", "requests", "sqlalchemy", "urllib3")):
            raise
        raise RegistryError(
            f"MLflow's registry refuses or cannot be reached: {str(error).splitlines()[0]}",
            where=tracking_uri(config),
            fix="check tracking.uri and that the server is up; repeat the command",
        ) from error


def lock_folder(config: RootConfig) -> Path:
    """Where the registry's lock lies: the storage."""
    return Path(config.run.storage)


def by_alias(client: MlflowClient, name: str, alias: str) -> ModelVersion | None:
    """The version an alias points to, or None."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def evaluation_of(config: RootConfig, version: str, *, folder: Path) -> Artifact:
    """The evaluation artifact inside a version's bundle, fetched into a folder of its own.

    Raises:
        RegistryError: The version holds no bundle of qbrec.
        DataError: It is damaged.
    """
    import mlflow

    base = f"models:/{config.registry.model_name}/{version}/artifacts/{BUNDLE_ARTIFACT}"
    target = folder / f"version-{version}"
    target.mkdir()
    try:
        with aimed_at(config):
            file = mlflow.artifacts.download_artifacts(
                artifact_uri=f"{base}/{BUNDLE_FILE}", dst_path=str(target)
            )
            bundle = Path(file).parent  # MLflow repeats the path inside the model below the target
            entry: dict[str, Any] = read_bundle(bundle)["parts"]["evaluation"]
            if entry["embedded"]:
                mlflow.artifacts.download_artifacts(
                    artifact_uri=f"{base}/{entry['path']}", dst_path=str(target)
                )
    except (OSError, DataError) as error:
        raise RegistryError(
            f"version {version} of {config.registry.model_name!r} holds no bundle of qbrec: {error}",
            where=tracking_uri(config),
            fix="register a run with `qbrec register`, or choose another registry.model_name",
        ) from error
    return open_part(bundle, "evaluation")
