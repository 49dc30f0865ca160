"""What MLflow should know of a run and what it has been told: `tracking.json` in the run directory.

Everything is kept as a wish with a mark `sent`. A sync compares both, so that it can be cut off anywhere,
repeated, or aimed at an empty server.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from qbrec.config import RootConfig
from qbrec.storage.artifact import write_atomic
from qbrec.tracking.client import tracking_uri

logger = logging.getLogger("qbrec.tracking")
STATE_FILE = "tracking.json"
RUNNING, FINISHED, FAILED, KILLED = "RUNNING", "FINISHED", "FAILED", "KILLED"


@dataclass
class Sent:
    """The part of a node that MLflow has acknowledged."""

    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    metrics: int = 0
    artifacts: list[str] = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)
    status: str = RUNNING


@dataclass
class Node:
    """One MLflow run: the parent (stage None) or a nested one of a stage. Times in ms since 1970."""

    name: str
    stage: str | None
    key: str
    started: int
    ended: int | None = None
    status: str = RUNNING
    identity: str = field(default_factory=lambda: uuid.uuid4().hex)
    run_id: str | None = None
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    metrics: list[tuple[str, float, int, int]] = field(default_factory=list)  # name, value, step, time
    artifacts: list[tuple[str, str]] = field(default_factory=list)  # file, folder inside the run
    datasets: list[dict[str, str]] = field(default_factory=list)
    sent: Sent = field(default_factory=Sent)

    def add_params(self, params: Mapping[str, str]) -> None:
        """Parameters are immutable in MLflow: a changed value (resumed run) becomes a tag beside it."""
        for name, value in params.items():
            if self.params.setdefault(name, value) != value:
                self.tags[f"changed.{name}"] = value

    @property
    def settled(self) -> bool:
        """Whether MLflow knows all of it."""
        return (
            self.run_id is not None
            and self.sent.params == self.params
            and self.sent.tags == self.tags
            and self.sent.metrics == len(self.metrics)
            and len(self.sent.artifacts) == len(self.artifacts)
            and len(self.sent.datasets) == len(self.datasets)
            and self.sent.status == self.status
        )


@dataclass
class TrackingState:
    """All nodes of a run (the first is the parent) and how far `metrics.jsonl` has been sent, in bytes."""

    uri: str
    experiment: str
    nodes: list[Node]
    offset: int = 0
    refused: list[str] = field(default_factory=list)

    @property
    def parent(self) -> Node:
        """The run of the whole road."""
        return self.nodes[0]

    def latest(self, stage: str) -> Node | None:
        """The newest node of a stage."""
        return next((n for n in reversed(self.nodes) if n.stage == stage), None)

    def at(self, stage: str, time_ms: int) -> Node:
        """The node a metric line belongs to: the newest of its stage begun by then, else a new one."""
        of_stage = [n for n in self.nodes if n.stage == stage]
        if not of_stage:
            of_stage = [
                Node(name=stage, stage=stage, key="", started=time_ms, ended=time_ms, status=FINISHED)
            ]
            self.nodes.append(of_stage[0])
        return next((n for n in reversed(of_stage) if n.started <= time_ms), of_stage[0])

    def forget_sent(self) -> None:
        """Start over: the server is another one, or has lost the runs."""
        self.offset = 0
        for node in self.nodes:
            node.run_id, node.sent, node.identity = None, Sent(), uuid.uuid4().hex

    def save(self, run_dir: Path) -> None:
        """Write `tracking.json` at once or not at all."""
        write_atomic(run_dir / STATE_FILE, json.dumps(asdict(self), indent=1).encode())


def load_state(run_dir: Path) -> TrackingState | None:
    """The state of a run directory; None if never tracked, or (with a warning) if damaged."""
    try:
        tree: dict[str, Any] = json.loads((run_dir / STATE_FILE).read_text(encoding="utf-8"))
        nodes = [Node(**{**n, "sent": Sent(**n["sent"])}) for n in tree.pop("nodes")]
        for node in nodes:
            node.metrics = [(str(n), float(v), int(s), int(t)) for n, v, s, t in node.metrics]
            node.artifacts = [(str(a), str(b)) for a, b in node.artifacts]
        return TrackingState(nodes=nodes, **tree) if nodes else None
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        logger.warning("%s cannot be used (%s): the run is sent to MLflow anew", run_dir / STATE_FILE, error)
        return None


def open_state(config: RootConfig, run_dir: Path) -> TrackingState:
    """The state of a run directory, or the first one."""
    state = load_state(run_dir)
    if state is None:
        parent = Node(name=config.run.name, stage=None, key="", started=now_ms())
        state = TrackingState(uri=tracking_uri(config), experiment=config.tracking.experiment, nodes=[parent])
    return state


def own_tracking(run_dir: Path) -> IO[str] | None:
    """Lock `tracking.lock` for this process (the kernel frees it); None if another holds it."""
    file = open(run_dir / "tracking.lock", "a")  # noqa: SIM115 — held open as long as the lock is wanted
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def now_ms() -> int:
    """Milliseconds since 1970, as MLflow counts."""
    return int(time.time() * 1000)
