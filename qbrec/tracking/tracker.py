"""The driver's side of a run: says what MLflow should know, and lets a thread of its own tell it."""

from __future__ import annotations

import json
import logging
import textwrap
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from qbrec.config import RootConfig
from qbrec.storage.artifact import Artifact
from qbrec.tracking.flatten import flatten_numbers, flatten_params, safe_name
from qbrec.tracking.state import (
    FAILED,
    FINISHED,
    KILLED,
    RUNNING,
    Node,
    TrackingState,
    now_ms,
    open_state,
    own_tracking,
)
from qbrec.tracking.sync import Synchroniser

logger = logging.getLogger("qbrec.tracking")

# Small files of an artifact that a person wants to see beside the run.
_SHOWN = ("manifest.json", "quality.json", "metrics.json", "curve.json", "labels.json")
_SHOWN_BYTES = 8 << 20
_SECTIONS = {
    "catalog": ("data", "catalog"),
    "fusion": ("fusion",),
    "quantizer": ("quantizer",),
    "neighbours": ("ranking",),
    "pretrain": ("sequence",),
    "finetune": ("sequence", "ranking"),
    "evaluation": ("evaluation", "ranking"),
}


class StageRecord:
    """What one stage tells the tracker. Nothing here waits for MLflow."""

    def __init__(self, tracker: Tracker, node: Node | None) -> None:
        self._tracker, self._node = tracker, node

    def metrics(self, values: Mapping[str, float], *, step: int = 0) -> None:
        """Note numbers that are not in `metrics.jsonl`."""
        with self._tracker._changing(self._node) as node:
            if node is not None:
                now = now_ms()
                node.metrics.extend((safe_name(k), float(v), step, now) for k, v in values.items())

    def tags(self, values: Mapping[str, str]) -> None:
        """Note texts that may change, such as fingerprints."""
        with self._tracker._changing(self._node) as node:
            if node is not None:
                node.tags.update(values)

    def artifacts(self, files: Iterable[Path], *, folder: str = "") -> None:
        """Have files copied to MLflow; they must not change afterwards."""
        with self._tracker._changing(self._node) as node:
            if node is not None:
                node.artifacts.extend((str(Path(f).resolve()), folder) for f in files)

    def complete(self, artifact: Artifact) -> None:
        """Note a finished artifact: fingerprint, the numbers of its meta, its small JSON files."""
        self.tags({"qbrec.fingerprint": artifact.fingerprint, "qbrec.path": str(artifact.path)})
        self.metrics(dict(flatten_numbers(artifact.meta)))
        if artifact.kind == "evaluation" and artifact.has("metrics.json"):
            models = artifact.load_json("metrics.json")["models"]
            means = {
                f"{m}/{k}": c["mean"] for m, modes in models.items() for k, c in modes["removed"].items()
            }
            self.metrics(means)
        shown = [artifact.path / name for name in _SHOWN]
        self.artifacts([f for f in shown if f.is_file() and f.stat().st_size <= _SHOWN_BYTES])


class Tracker:
    """Mirror of one qbrec run in MLflow: a parent run with a nested run per stage.

    All calls return at once; a daemon thread sends. When MLflow cannot be reached there is one warning, the
    training goes on, and the next tracker of the same run directory (or `replay`) sends what is missing. With
    `tracking.enabled: false` every call does nothing.

    Args:
        config: The run's configuration.
        run_dir: Directory with `metrics.jsonl`; `tracking.json` is kept there.
        poll_s: Seconds between two looks at `metrics.jsonl`.
    """

    def __init__(self, config: RootConfig, run_dir: Path, *, poll_s: float = 2.0) -> None:
        self._config, self._run_dir, self._poll = config, Path(run_dir), poll_s
        self._lock = threading.RLock()
        self._wake, self._closing = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._warned = False
        self._owner: IO[str] | None = None
        self._state: TrackingState | None = None
        if config.tracking.enabled:
            self._open()

    @property
    def run_id(self) -> str | None:
        """MLflow id of the parent run, once it exists there."""
        return self._state.parent.run_id if self._state is not None else None

    @property
    def settled(self) -> bool:
        """Whether MLflow knows everything (metrics.jsonl aside)."""
        return self._state is None or all(node.settled for node in self._state.nodes)

    @contextmanager
    def stage(
        self,
        name: str,
        *,
        key: str = "",
        params: Mapping[str, Any] | None = None,
        artifacts: Iterable[Path] = (),
    ) -> Iterator[StageRecord]:
        """A nested run while a stage executes.

        A stage that failed or was killed and starts again under the same key goes on in the same nested run.

        Args:
            name: Stage name as in `metrics.jsonl`.
            key: The stage's artifact key.
            params: Parameters, nested mappings allowed; None: the configuration sections of that stage.
            artifacts: Files to copy when the stage has succeeded, as far as they exist then.
        """
        node = None
        if self._state is not None:
            with self._changing(self._state.parent):
                node = self._begin(self._state, name, key)
                node.add_params(flatten_params(self._stage_params(name) if params is None else params))
        record = StageRecord(self, node)
        try:
            yield record
        except BaseException as error:
            self._end(node, FAILED if isinstance(error, Exception) else KILLED)
            raise
        record.artifacts([path for path in artifacts if Path(path).is_file()])
        self._end(node, FINISHED)

    def reused(self, name: str, artifact: Artifact) -> None:
        """Note on the parent that a stage was skipped because its artifact exists."""
        parent = self._state.parent if self._state is not None else None
        StageRecord(self, parent).tags({f"qbrec.reused.{name}": artifact.fingerprint})

    def dataset(self, catalog: Artifact) -> None:
        """Note the input data of every domain, with the catalog's counts, on the parent."""
        with self._changing(self._state.parent if self._state is not None else None) as node:
            known = {d["digest"] + d["name"] for d in node.datasets} if node is not None else set()
            for name, domain in self._config.data.domains.items():
                fields = _dataset_fields(
                    f"{self._config.run.name}.{name}", domain.items, domain.interactions, catalog
                )
                if node is not None and fields["digest"] + fields["name"] not in known:
                    node.datasets.append(fields)

    def artifacts(self, files: Iterable[Path], *, folder: str = "") -> None:
        """Have files, such as the report, copied to the parent run."""
        parent = self._state.parent if self._state is not None else None
        StageRecord(self, parent).artifacts(files, folder=folder)

    def metrics(self, values: Mapping[str, float]) -> None:
        """Note summary numbers on the parent run."""
        parent = self._state.parent if self._state is not None else None
        StageRecord(self, parent).metrics(values)

    def flush(self, *, timeout_s: float = 30.0) -> bool:
        """Wait until MLflow has everything so far; False if the time was too short."""
        if self._state is None:
            return True
        self._start()
        deadline = time.monotonic() + timeout_s
        while not self.settled and time.monotonic() < deadline:
            self._wake.set()
            time.sleep(0.05)
        return self.settled

    def finish(self, status: str = FINISHED, *, timeout_s: float = 30.0) -> bool:
        """End the parent run and wait a while for the thread to send the rest.

        Returns:
            Whether MLflow has everything; if not, `qbrec track` sends it later.
        """
        if self._state is None:
            return True
        with self._changing(self._state.parent) as parent:
            assert parent is not None
            for node in self._state.nodes[1:]:
                if node.status == RUNNING:  # a stage that a killed driver left open
                    node.status, node.ended = KILLED, now_ms()
            parent.status, parent.ended = status, now_ms()
        self._closing.set()
        self._wake.set()
        self._start()
        assert self._thread is not None
        self._thread.join(timeout_s)
        if self._owner is not None and not self._thread.is_alive():
            self._owner.close()
            self._owner = None
        if not self.settled:
            self._warn("MLflow did not answer in time")
        return self.settled

    # --- inside ---

    def _open(self) -> None:
        self._run_dir.mkdir(parents=True, exist_ok=True)
        self._owner = own_tracking(self._run_dir)
        if self._owner is None:
            logger.warning("%s is tracked by another process: this one leaves MLflow to it", self._run_dir)
            return
        self._state = open_state(self._config, self._run_dir)
        parent = self._state.parent
        parent.status, parent.ended = RUNNING, None
        parent.add_params(flatten_params(self._config.model_dump(mode="json")))
        config_file = self._run_dir / "config.yaml"
        if config_file.is_file() and not any(
            path == str(config_file.resolve()) for path, _ in parent.artifacts
        ):
            parent.artifacts.append((str(config_file.resolve()), ""))
        self._state.save(self._run_dir)

    def _stage_params(self, name: str) -> dict[str, Any]:
        tree = self._config.model_dump(mode="json")
        return {section: tree[section] for section in _SECTIONS.get(name, ())}

    def _begin(self, state: TrackingState, name: str, key: str) -> Node:
        node = state.latest(name)
        if node is None or node.key != key or node.status == FINISHED:
            node = Node(name=name, stage=name, key=key, started=now_ms())
            state.nodes.append(node)
        node.status, node.ended = RUNNING, None
        self._start()
        return node

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._loop, name="qbrec-tracking", daemon=True)
            self._thread.start()

    def _end(self, node: Node | None, status: str) -> None:
        with self._changing(node) as changed:
            if changed is not None:
                changed.status, changed.ended = status, now_ms()
        self._wake.set()

    @contextmanager
    def _changing(self, node: Node | None) -> Iterator[Node | None]:
        """Change a node under the lock and keep the change on disk."""
        if node is None or self._state is None:
            yield None
            return
        with self._lock:
            yield node
            self._state.save(self._run_dir)

    def _loop(self) -> None:
        assert self._state is not None
        synchroniser = Synchroniser(self._config, run_dir=self._run_dir, state=self._state, lock=self._lock)
        pause = self._poll
        while True:
            closing = self._closing.is_set()
            try:
                synchroniser.sync()
                pause = self._poll
            except (
                Exception
            ) as error:  # whatever MLflow, its database or the network do: the training is worth more
                self._warn(f"MLflow does not take the run's record ({type(error).__name__}: {error})")
                pause = min(2 * pause, 60.0)
            if closing:
                return
            self._wake.wait(pause)
            self._wake.clear()

    def _warn(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "%s; the run goes on, nothing is lost: it is sent later, or by `qbrec track --config …` (%s)",
                textwrap.shorten(reason.splitlines()[0], 300, placeholder=" …"),
                self._run_dir,
            )


def _dataset_fields(name: str, items: str, interactions: str, catalog: Artifact) -> dict[str, str]:
    scheme = items.partition("://")[0] if "://" in items else "local"
    uri = items if "://" in items else str(Path(items).resolve())
    profile = {k: v for k, v in catalog.meta.items() if isinstance(v, int | float | str)}
    profile["interactions"] = interactions
    return {
        "name": name,
        "digest": catalog.fingerprint[:32],
        "source_type": scheme,
        "source": json.dumps({"uri": uri}),
        "profile": json.dumps(profile),
    }
