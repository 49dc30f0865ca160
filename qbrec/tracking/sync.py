"""Bring MLflow to the state that `tracking.json` wishes for, and tail `metrics.jsonl` into it."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from qbrec.config import RootConfig
from qbrec.tracking.client import connect, tracking_uri
from qbrec.tracking.flatten import safe_name
from qbrec.tracking.lines import METRICS_FILE, read_chunk
from qbrec.tracking.state import RUNNING, Node, TrackingState

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

IDENTITY = "qbrec.identity"
_BATCH = 1000  # MLflow's limit on metrics per request
_PARAMS = 100  # and on parameters, and on tags
T = TypeVar("T")
_PERMANENT = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST")


class Synchroniser:
    """Sends what is not sent yet. One thread at a time; `lock` guards the state against the driver's.

    Everything sent may be sent again after a crash: MLflow ignores an equal metric point or parameter, and a
    run is looked up by its identity tag before it is created.
    """

    def __init__(
        self, config: RootConfig, *, run_dir: Path, state: TrackingState, lock: threading.RLock
    ) -> None:
        self._config, self._run_dir, self._state, self._lock = config, run_dir, state, lock
        self._client: MlflowClient | None = None
        self._experiment = ""

    def sync(self) -> None:
        """Send everything once.

        Raises:
            Exception: Whatever MLflow raised; what was acknowledged before stays acknowledged.
        """
        client = self._connect()
        while True:
            with self._lock:
                nodes = list(self._state.nodes)
            for node in nodes:
                self._describe(client, node)
            if not self._tail(client) and len(nodes) == len(self._state.nodes):
                break
        for node in nodes[1:] + nodes[:1]:  # the parent ends last
            self._status(client, node)

    def _connect(self) -> MlflowClient:
        if self._client is None:
            client, self._experiment = connect(self._config)
            self._check_same_server(client)
            self._client = client
        return self._client

    def _check_same_server(self, client: MlflowClient) -> None:
        from mlflow.exceptions import MlflowException

        with self._lock:
            state, uri = self._state, tracking_uri(self._config)
            known = (state.uri, state.experiment) == (uri, self._config.tracking.experiment)
            if known and state.parent.run_id is not None:
                try:
                    known = client.get_run(state.parent.run_id).info.lifecycle_stage == "active"
                except MlflowException as error:
                    if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                        raise
                    known = False
            if not known:
                state.uri, state.experiment = uri, self._config.tracking.experiment
                state.forget_sent()
                self._save()

    def _describe(self, client: MlflowClient, node: Node) -> None:
        """Run, parameters, tags, own metrics, data sets and files of one node."""
        from mlflow.entities import DatasetInput, Metric, Param, RunTag

        run_id = self._ensure_run(client, node)
        with self._lock:
            params = {k: v for k, v in node.params.items() if node.sent.params.get(k) != v}
            tags = {k: v for k, v in node.tags.items() if node.sent.tags.get(k) != v}
            metrics = node.metrics[node.sent.metrics :]
            datasets = node.datasets[len(node.sent.datasets) :]
            artifacts = node.artifacts[len(node.sent.artifacts) :]
        for part in _parts(list(params.items()), _PARAMS):
            self._send(partial(client.log_batch, run_id, params=[Param(k, v) for k, v in part]))
            self._mark(partial(node.sent.params.update, part))
        for part in _parts(list(tags.items()), _PARAMS):
            self._send(partial(client.log_batch, run_id, tags=[RunTag(k, v) for k, v in part]))
            self._mark(partial(node.sent.tags.update, part))
        if metrics:
            points = [Metric(name, value, when, step) for name, value, step, when in metrics]
            self._metrics(client, run_id, points)
            self._mark(partial(setattr, node.sent, "metrics", node.sent.metrics + len(metrics)))
        for dataset in datasets:
            self._send(
                partial(client.log_inputs, run_id, datasets=[DatasetInput(_dataset(dataset), tags=[])])
            )
            self._mark(partial(node.sent.datasets.append, dataset["name"]))
        for path, folder in artifacts:
            if Path(path).is_file():
                client.log_artifact(run_id, path, folder or None)
            else:
                self._refuse(f"{path} no longer exists")
            self._mark(partial(node.sent.artifacts.append, path))

    def _ensure_run(self, client: MlflowClient, node: Node) -> str:
        if node.run_id is not None:
            return node.run_id
        found = client.search_runs(
            [self._experiment], f"tags.`{IDENTITY}` = '{node.identity}'", max_results=1
        )
        if found:
            run_id = str(found[0].info.run_id)
        else:
            tags = {IDENTITY: node.identity, "qbrec.run": self._config.run.name}
            if node.stage is not None:
                tags |= {"mlflow.parentRunId": str(self._state.parent.run_id), "qbrec.stage": node.stage}
            run = client.create_run(self._experiment, start_time=node.started, tags=tags, run_name=node.name)
            run_id = str(run.info.run_id)
        self._mark(partial(setattr, node, "run_id", run_id))
        return run_id

    def _status(self, client: MlflowClient, node: Node) -> None:
        with self._lock:
            status, ended, sent = node.status, node.ended, node.sent.status
        if status == sent or node.run_id is None:
            return
        if status == RUNNING:
            client.update_run(node.run_id, status=RUNNING)
        else:
            client.set_terminated(node.run_id, status=status, end_time=ended)
        self._mark(partial(setattr, node.sent, "status", status))

    def _tail(self, client: MlflowClient) -> bool:
        """Send the next chunk of whole lines; False when there was none."""
        from mlflow.entities import Metric

        path = self._run_dir / METRICS_FILE
        chunk = read_chunk(path, self._state.offset)
        if chunk is None:
            return False
        points: dict[int, list[Metric]] = defaultdict(list)
        with self._lock:
            for raw in chunk.refused:
                self._refuse(f"{path}: not a metrics line: {raw[:80].decode(errors='replace')}")
            for line in chunk.lines:
                node = self._state.at(line.stage, line.time_ms)
                points[id(node)].extend(
                    Metric(safe_name(k), v, line.time_ms, line.step) for k, v in line.metrics.items()
                )
            nodes = {id(node): node for node in self._state.nodes}
        for identity, metrics in points.items():
            self._metrics(client, self._ensure_run(client, nodes[identity]), metrics)
        self._mark(partial(setattr, self._state, "offset", chunk.end))
        return True

    def _metrics(self, client: MlflowClient, run_id: str, metrics: list[Metric]) -> None:
        for part in _parts(metrics, _BATCH):
            self._send(partial(client.log_batch, run_id, metrics=part))

    def _send(self, call: Callable[[], Any]) -> None:
        """Call; what MLflow will never accept is noted and passed over, lest it block all that follows."""
        from mlflow.exceptions import MlflowException

        try:
            call()
        except MlflowException as error:
            if error.error_code not in _PERMANENT:
                raise
            self._refuse(str(error))

    def _refuse(self, reason: str) -> None:
        with self._lock:
            self._state.refused = [*self._state.refused[-19:], f"{time.strftime('%F %T')} {reason[:500]}"]

    def _mark(self, change: Callable[[], Any]) -> None:
        with self._lock:
            change()
            self._save()

    def _save(self) -> None:
        self._state.save(self._run_dir)


def _dataset(fields: dict[str, str]) -> Any:
    from mlflow.entities import Dataset

    return Dataset(
        name=fields["name"],
        digest=fields["digest"],
        source_type=fields["source_type"],
        source=fields["source"],
        schema=fields.get("schema"),
        profile=fields.get("profile"),
    )


def _parts(items: list[T], size: int) -> list[list[T]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
