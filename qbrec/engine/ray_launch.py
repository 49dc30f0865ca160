"""Workers from Ray Train V2: placed, restarted after a failure, resized when they are elastic.

Ray only starts and watches processes here. What a stage resumes from is the run directory, never a checkpoint
of Ray Train, so a restart on another number of nodes is nothing but the worker function called again.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

import qbrec.errors
from qbrec.config import RootConfig
from qbrec.config.sections import ComputeConfig
from qbrec.engine.context import OWNER
from qbrec.engine.heartbeat import last_heard
from qbrec.engine.preemption import DriverStop, ask_to_stop, has_mark, note_signals
from qbrec.engine.progress import ProgressWatcher
from qbrec.engine.ray_session import ensure_ray
from qbrec.engine.worker import Order, error_file, run_order, save_error
from qbrec.errors import LaunchError, Preempted, QbrecError

_LOOK_FOR_DRAIN_S = 2.0


class StoppableTorchConfig(TorchConfig):
    """Ray's process group, and workers that take SIGTERM for a request instead of dying of it.

    Ray runs the training function in a thread, and only a process's main thread can handle signals: that is
    where a `Backend` runs what it executes on the workers (ray.train.backend, a developer API).
    """

    @property
    def backend_cls(self) -> Any:
        """Ray's backend of this configuration, with one more step before training."""
        return _StoppableBackend


class _StoppableBackend(TorchConfig().backend_cls):  # type: ignore[misc] # the class has no public name
    def on_training_start(self, worker_group: Any, backend_config: Any) -> None:
        super().on_training_start(worker_group, backend_config)
        worker_group.execute(note_signals)


def launch_ray(order: Order, config: RootConfig) -> None:
    """Run a stage on Ray's workers and wait for them.

    Raises:
        QbrecError: What a worker raised for the user.
        Preempted: This process was asked to stop.
        LaunchError: The cluster is too small, or workers were lost more often than `compute.max_failures`.
    """
    ensure_ray(config.compute)
    from ray.train.v2.api.exceptions import TrainingFailedError

    compute = config.compute
    use_gpu = _use_gpu(compute)
    if compute.min_workers < compute.max_workers:
        # Ray counts a dead node's room for some seconds, plans a group with it and waits a minute for that
        # group's places. An elastic group is only planned with room that is there: then it has it at once.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")
    error_file(order).unlink(missing_ok=True)
    progress_file = Path(order["run_dir"]) / "progress" / f"{order['stage']}.json"
    order["progress_file"] = str(progress_file)
    trainer = TorchTrainer(
        _ray_worker,
        train_loop_config=dict(order),
        # mypy sees the class of Ray Train V1 under this name; at run time it is that of V2.
        scaling_config=ScalingConfig(  # type: ignore[call-arg]
            num_workers=compute.num_workers,  # type: ignore[arg-type]
            use_gpu=use_gpu,
            elastic_resize_monitor_interval_s=compute.resize_interval_s,
        ),
        torch_config=StoppableTorchConfig(backend="nccl" if use_gpu else "gloo", timeout_s=compute.timeout_s),
        run_config=RunConfig(
            # A name that is never used twice keeps what Ray finds there from ever being taken for our state.
            name=f"{config.run.name}-{order['stage']}-{uuid.uuid4().hex[:8]}",
            # Scratch of this run of this stage; nothing is read back from it, so it need not be shared.
            storage_path=str(Path(order["storage"]).resolve() / "ray"),
            failure_config=FailureConfig(max_failures=compute.max_failures),
        ),
    )
    stop = DriverStop(
        Path(order["run_dir"]),
        order["owner"],
        stage=order["stage"],
        grace_s=compute.stop_grace_s,
        report=lambda: _saved_error(order),
    )
    try:
        with ProgressWatcher(progress_file), _interruptible(stop), stop:
            trainer.fit()
        stopped = _saved_error(order)
        if stopped is not None:
            raise stopped
    except TrainingFailedError as error:
        cause = _saved_error(order) or _sent_error(error)
        if cause is not None:
            raise cause from None
        heard = last_heard(Path(order["run_dir"]), order["stage"])
        raise LaunchError(
            f"the workers of stage {order['stage']!r} failed {compute.max_failures + 1} times: {error}"
            + (f"\n  ranks: {heard}" if heard else ""),
            where=order["run_dir"],
            fix="run the same command again: it goes on from the last checkpoint",
        ) from error


def _use_gpu(compute: ComputeConfig) -> bool:
    import ray

    from qbrec.engine.ds_config import resolve_device

    cpus, gpus = ray.cluster_resources().get("CPU", 0.0), ray.cluster_resources().get("GPU", 0.0)
    needed = compute.min_workers
    use_gpu = resolve_device(compute) == "cuda" or (compute.device == "auto" and gpus >= needed)
    if (gpus if use_gpu else cpus) < needed:
        raise LaunchError(
            f"{needed} workers need one {'GPU' if use_gpu else 'CPU'} each; the Ray cluster has "
            f"{cpus:g} CPUs and {gpus:g} GPUs",
            fix="add nodes, or lower compute.num_workers",
        )
    return use_gpu


@contextlib.contextmanager
def _interruptible(stop: DriverStop) -> Iterator[None]:
    """End Ray's training run where the driver is stopped, and give Ctrl-C back to who had it.

    `fit` installs a handler of SIGINT that aborts the training run, ends this process with exit code 0 and
    stays for good. That very handler also ends the run for us: without it the controller would start the
    workers again for as long as this process lives.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = signal.getsignal(signal.SIGINT)
    try:
        yield
    except Preempted:
        _abort(signal.getsignal(signal.SIGINT), earlier)
        raise
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if earlier is None else earlier)


def _abort(handler: Any, earlier: Any) -> None:
    if handler is not earlier and callable(handler):
        with contextlib.suppress(SystemExit):
            handler(signal.SIGINT, None)


def _ray_worker(order: dict[str, Any]) -> None:
    from ray.exceptions import RayActorError
    from ray.train import get_context

    rank = get_context().get_world_rank()
    os.environ["LOCAL_RANK"] = str(get_context().get_local_rank())
    os.environ["LOCAL_WORLD_SIZE"] = str(get_context().get_local_world_size())
    typed: Order = order  # type: ignore[assignment]
    run_dir = Path(typed["run_dir"])
    if not (run_dir / OWNER).exists():
        # Not saved for the driver: it would not see this directory either.
        raise LaunchError(
            "a worker does not see the run directory",
            where=f"{run_dir} on {socket.gethostname()}",
            fix="with several nodes run.storage must be a folder that all of them mount at the same place; "
            "run.remote may be an object store",
        )
    earlier = _saved_error(typed)
    if earlier is not None and not earlier.retry:
        raise earlier  # trying again does not help
    if has_mark(run_dir, typed["owner"]):
        if rank == 0 and earlier is None:
            save_error(typed, _asked_before_start(typed))
        return
    if rank == 0:
        # Of an earlier try: the driver must not take it for this one's.
        error_file(typed).unlink(missing_ok=True)
    threading.Thread(target=_watch_drain, daemon=True).start()
    try:
        run_order(typed)
    except QbrecError as error:
        # Of errors that come again on every rank the first one tells most; the checkpoint is rank 0's.
        if not error.retry or (rank == 0 if isinstance(error, Preempted) else _saved_error(typed) is None):
            save_error(typed, error)
        if not isinstance(error, Preempted):
            raise
        if not has_mark(run_dir, typed["owner"]):
            # So Ray Train counts it against `max_preemption_failures` (no limit), not `max_failures`.
            raise RayActorError(error_msg=str(error), preempted=True) from error
        # As the driver wished. An error would let Ray start the group again, and where that takes a minute,
        # the driver would be killed while it waits for it.


def _asked_before_start(order: Order) -> Preempted:
    return Preempted(
        f"stage {order['stage']!r} was asked to stop while its workers started",
        where=order["run_dir"],
        fix="run the same command again: it goes on from the last checkpoint",
    )


def _watch_drain() -> None:
    """Hear from Ray Train that a node of this group is taken away, as `ray.train.get_preemption_info` tells.

    That function waits for all ranks, so it has a thread of its own on each instead of a place in the loop.
    Ray learns of it from whoever drains the node: its autoscaler, `ray drain-node`, or `ray start --block`
    on SIGTERM, which is what Kubernetes and Slurm send.
    """
    from ray.exceptions import RayError
    from ray.train import get_preemption_info

    while True:
        try:
            found = get_preemption_info()
        except (RayError, RuntimeError):
            return  # the group is gone, and this process with it
        if found is not None:
            nodes = ", ".join(node[:12] for node in found.preempted_node_ids)
            ask_to_stop(f"Ray is taking node {nodes} away")
            return
        time.sleep(_LOOK_FOR_DRAIN_S)


def _sent_error(error: Exception) -> QbrecError | None:
    """A user's error that a worker could not leave in the run directory."""
    sent = getattr(error, "worker_failures", {}).values()
    return next((e for e in sent if isinstance(e, QbrecError)), None)


def _saved_error(order: Order) -> QbrecError | None:
    try:
        saved = json.loads(error_file(order).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    if saved["owner"] != order["owner"]:
        return None
    kind: type[QbrecError] = getattr(qbrec.errors, saved["kind"])
    return kind(saved["what"], where=saved["where"], fix=saved["fix"])
