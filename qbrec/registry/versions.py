"""Versions and aliases of the registered model: register, look up, open what the gate needs."""

from __future__ import annotations

import contextlib
import hashlib
import io
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from qbrec.config import RootConfig
from qbrec.errors import QbrecError, RegistryError
from qbrec.registry.bundle import COLDSTART, GENERATION_PARTS, parts_of, require, write_bundle
from qbrec.registry.card import model_card
from qbrec.registry.line import CHALLENGER, all_versions
from qbrec.registry.lock import registry_lock
from qbrec.registry.metrics import qbrec_means
from qbrec.registry.model import log_bundle
from qbrec.registry.recommend import Recommender
from qbrec.storage.artifact import Artifact
from qbrec.storage.id_table import numbered
from qbrec.tracking.client import connect, tracking_uri
from qbrec.tracking.flatten import safe_name
from qbrec.tracking.state import load_state

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

RUN_TAG = "qbrec.run"
EVALUATION_TAG, GENERATIONS_TAG, COLDSTART_TAG = "qbrec.evaluation", "qbrec.generations", "qbrec.coldstart"
NONE = "none"  # value of these two where there is nothing to name


def register(config: RootConfig, run_dir: Path, artifacts: Mapping[str, Artifact]) -> str:
    """Pack a finished run into a new version of the registered model and point @challenger at it.

    The same artifacts are registered once: repeating it finds the version and moves the alias only.

    Args:
        config: The run's configuration.
        run_dir: Its directory; the MLflow run of its tracking, if any, becomes the version's source.
        artifacts: `catalog`, `quantizer`, `finetune`, `evaluation`, `coldstart` where it was measured, and
            the generations appended since: `generation-1`, `ids-1`, `alike-1`, `generation-2`, …

    Returns:
        The version number, as MLflow writes it.

    Raises:
        DataError: An artifact is missing or damaged.
        RegistryError: MLflow is not reachable or refuses.
    """
    prints = {f"qbrec.{kind}": require(artifacts, kind).fingerprint for kind in parts_of(artifacts)}
    prints[GENERATIONS_TAG] = _generations_print(artifacts)
    prints[COLDSTART_TAG] = artifacts[COLDSTART].fingerprint if COLDSTART in artifacts else NONE
    name = config.registry.model_name
    with registry_errors(config):
        client, experiment = connect(config)
        card, logged = model_card(config, artifacts), None
        # Uploading may take long, and others may promote meanwhile: only what decides is done under the lock.
        if _same(client, name, prints) is None:
            with tempfile.TemporaryDirectory(prefix="qbrec-bundle-") as folder:
                bundle = write_bundle(Path(folder) / "bundle", config=config, artifacts=artifacts, card=card)
                logged = _log(config, run_dir, bundle, experiment=experiment)
        with registry_lock(lock_folder(config)):
            version = _same(client, name, prints)
            if version is None:
                if logged is None:
                    raise RegistryError(
                        "the version of this run was deleted just now", where=name, fix="repeat the command"
                    )
                tags = {RUN_TAG: config.run.name, "qbrec.run_dir": str(run_dir.resolve()), **prints}
                metrics = qbrec_means(artifacts["evaluation"].load_json("metrics.json"))
                tags |= {f"metric.{safe_name(k)}": f"{v:.6f}" for k, v in metrics.items()}
                version = _new_version(config, logged, tags=tags)
            elif logged is not None:  # the same run was registered by another process meanwhile
                client.delete_logged_model(logged.removeprefix("models:/"))
            client.update_model_version(name, version, description=card)
            client.set_registered_model_alias(name, CHALLENGER, version)
    return version


def _log(config: RootConfig, run_dir: Path, bundle: Path, *, experiment: str) -> str:
    """Log the bundle in the MLflow run of the run's tracking; URI of the logged model."""
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
            return log_bundle(bundle, recommender=recommender, model_name=config.registry.model_name)


def _new_version(config: RootConfig, logged: str, *, tags: dict[str, str]) -> str:
    import mlflow

    # MLflow prints two lines about what it made; the command line says it in its own words.
    with aimed_at(config), contextlib.redirect_stderr(io.StringIO()):
        version = mlflow.register_model(logged, config.registry.model_name, tags=tags)
    return str(version.version)


def _generations_print(artifacts: Mapping[str, Artifact]) -> str:
    """SHA-256 over the fingerprints of all generations, their IDs and their rows of the item graphs."""
    found = [one for kind in GENERATION_PARTS for one in numbered(artifacts, kind)]
    if not found:
        return NONE
    return hashlib.sha256("".join(artifact.fingerprint for artifact in found).encode()).hexdigest()


def _same(client: MlflowClient, name: str, prints: Mapping[str, str]) -> str | None:
    """The newest version made from exactly these artifacts."""
    found = all_versions(client, name)
    # A version without one of these tags was registered before there was such a thing.
    known = [(v, {GENERATIONS_TAG: NONE, COLDSTART_TAG: NONE} | dict(v.tags)) for v in found]
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
