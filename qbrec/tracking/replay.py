"""`qbrec track`: catch up with what MLflow missed."""

from __future__ import annotations

import threading
from pathlib import Path

from qbrec.config import RootConfig
from qbrec.errors import RegistryError
from qbrec.tracking.client import tracking_uri
from qbrec.tracking.flatten import flatten_params
from qbrec.tracking.state import (
    FINISHED,
    KILLED,
    RUNNING,
    TrackingState,
    load_state,
    now_ms,
    open_state,
    own_tracking,
)
from qbrec.tracking.sync import Synchroniser


def replay(config: RootConfig, run_dir: Path, *, again: bool = False) -> TrackingState:
    """Send to MLflow what is not there yet, in this thread.

    Works on any run directory with a `metrics.jsonl`, also of a run never tracked or whose driver was killed.

    Args:
        config: The run's configuration.
        run_dir: Its directory.
        again: Forget what was sent and write the run anew.

    Returns:
        The state: MLflow ids of all runs, and in `refused` what MLflow would not take.

    Raises:
        RegistryError: MLflow is not reachable, or another process is tracking this run.
    """
    if not run_dir.is_dir():
        raise RegistryError("there is no such run", where=str(run_dir), fix="check run.storage and run.name")
    owner = own_tracking(run_dir)
    if owner is None:
        raise RegistryError(
            "another process is tracking this run",
            where=str(run_dir),
            fix="wait until it has ended; it sends everything",
        )
    with owner:
        never = load_state(run_dir) is None
        state = open_state(config, run_dir)
        state.parent.add_params(flatten_params(config.model_dump(mode="json")))
        for node in state.nodes:
            if node.status == RUNNING:  # we hold the lock, so the driver that began it is gone
                node.status, node.ended = (FINISHED if never else KILLED), now_ms()
        if again:
            state.forget_sent()
        try:
            Synchroniser(config, run_dir=run_dir, state=state, lock=threading.RLock()).sync()
        except Exception as error:
            raise RegistryError(
                f"MLflow cannot be reached or refuses: {type(error).__name__}: {error}",
                where=tracking_uri(config),
                fix="start the tracking server, or correct tracking.uri, and repeat; nothing is lost",
            ) from error
    return state
