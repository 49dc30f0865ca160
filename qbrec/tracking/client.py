"""The one door to MLflow: addresses, a quiet environment, a client that gives up soon."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from qbrec.config import RootConfig
from qbrec.errors import ConfigError

if TYPE_CHECKING:
    from mlflow import MlflowClient

# Only defaults: whoever sets these variables keeps the last word. MLflow's own patience (seven retries of
# 120 s) would hold a driver for a quarter of an hour when the server is gone; here the next tail tries again.
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_RECORD_ENV_VARS_IN_MODEL_LOGGING": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}
_CHATTY = (
    "alembic",
    "mlflow.store.db.utils",
    "mlflow.pyfunc",
    "mlflow.tracking.fluent",
    "mlflow.tracking._model_registry.client",
    "mlflow.store.model_registry.abstract_store",
)


def tracking_uri(config: RootConfig) -> str:
    """Where MLflow keeps runs and models: `tracking.uri`, else one SQLite file in the storage.

    Raises:
        ConfigError: The storage is no local path, so that a SQLite file cannot lie in it.
    """
    if config.tracking.uri is not None:
        return config.tracking.uri
    return f"sqlite:///{_storage(config) / 'mlflow.db'}"


def artifact_location(config: RootConfig) -> str | None:
    """Artifact root of a new experiment: beside the database; None lets a tracking server decide."""
    uri = tracking_uri(config)
    if not uri.startswith(("sqlite:", "postgresql", "mysql", "mssql")):
        return None
    # Without it MLflow would put ./mlruns into whatever directory the command was called from.
    return (_storage(config) / "mlartifacts" / config.tracking.experiment).as_uri()


def _storage(config: RootConfig) -> Path:
    if "://" in config.run.storage:
        raise ConfigError(
            f"there is no place for MLflow's database in {config.run.storage!r}",
            where="tracking.uri",
            fix="set tracking.uri to a tracking server, such as http://host:5000, or tracking.enabled=false",
        )
    return Path(config.run.storage).resolve()


def quiet_mlflow() -> None:
    """Set MLflow's environment (no telemetry, short patience), hush its chatter. Call before importing it."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)


def connect(config: RootConfig) -> tuple[MlflowClient, str]:
    """A client and the id of the configured experiment, made if it is new.

    Raises:
        mlflow.exceptions.MlflowException: The server is not reachable or refuses.
    """
    quiet_mlflow()
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    quiet_mlflow()  # importing MLflow configures its loggers anew
    uri = tracking_uri(config)
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    name = config.tracking.experiment
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        return client, str(experiment.experiment_id)
    try:
        return client, str(client.create_experiment(name, artifact_location=artifact_location(config)))
    except MlflowException:
        # Two drivers may start together: the one that came second finds the experiment of the first.
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            raise
        return client, str(experiment.experiment_id)
