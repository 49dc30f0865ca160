"""Start a stage's workers: in this process, as one rank under torchrun, or through Ray Train V2."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import qbrec.errors
from qbrec.config import RootConfig, parse_config
from qbrec.engine.progress import ProgressWatcher
from qbrec.engine.worker import Order, error_file, join_group, leave_group, run_order, save_error
from qbrec.errors import LaunchError, QbrecError


def resolve_launcher(config: RootConfig) -> str:
    """`torchrun` under torchrun, `inprocess` for one worker, else `ray`."""
    wanted = config.compute.launcher
    if wanted != "auto":
        return wanted
    if "RANK" in os.environ and "MASTER_ADDR" in os.environ:
        return "torchrun"
    return "inprocess" if config.compute.num_workers == 1 else "ray"


def launch(order: Order) -> None:
    """Run a stage on all of its workers and wait for them.

    Raises:
        QbrecError: What a worker raised for the user.
        LaunchError: Workers could not be started or were lost more often than `compute.max_failures` allows.
    """
    config = parse_config(order["config"])
    launcher = resolve_launcher(config)
    if launcher == "ray":
        _launch_ray(order, config)
        return
    if launcher == "torchrun" and "RANK" not in os.environ:
        raise LaunchError(
            "compute.launcher is torchrun, but this process was not started by it",
            fix="start it as `torchrun --nproc-per-node 2 -m qbrec run …`, or set compute.launcher=auto",
        )
    with process_group(config):
        run_order(order)


@contextlib.contextmanager
def process_group(config: RootConfig) -> Iterator[None]:
    """A process group for the time of the block; one that exists already is left alone."""
    joined = join_group(config)
    try:
        yield
    finally:
        if joined:
            leave_group()


def _launch_ray(order: Order, config: RootConfig) -> None:
    from qbrec.engine.ray_session import ensure_ray

    ensure_ray(config.compute)
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    from qbrec.engine.ds_config import resolve_device

    compute = config.compute
    cpus, gpus = ray.cluster_resources().get("CPU", 0.0), ray.cluster_resources().get("GPU", 0.0)
    use_gpu = resolve_device(compute) == "cuda" or (compute.device == "auto" and gpus >= compute.num_workers)
    if (gpus if use_gpu else cpus) < compute.num_workers:
        raise LaunchError(
            f"{compute.num_workers} workers need one {'GPU' if use_gpu else 'CPU'} each; the Ray cluster has "
            f"{cpus:g} CPUs and {gpus:g} GPUs",
            fix="add nodes, or lower compute.num_workers",
        )
    error_file(order).unlink(missing_ok=True)
    progress_file = Path(order["run_dir"]) / "progress" / f"{order['stage']}.json"
    order["progress_file"] = str(progress_file)
    trainer = TorchTrainer(
        _ray_worker,
        train_loop_config=dict(order),
        scaling_config=ScalingConfig(num_workers=compute.num_workers, use_gpu=use_gpu),
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo", timeout_s=compute.timeout_s),
        run_config=RunConfig(
            # Our own checkpoints resume a stage; a name that is never used twice keeps Ray's apart from them.
            name=f"{config.run.name}-{order['stage']}-{uuid.uuid4().hex[:8]}",
            storage_path=str(Path(order["storage"]).resolve() / "ray"),
            failure_config=FailureConfig(max_failures=compute.max_failures),
        ),
    )
    try:
        with ProgressWatcher(progress_file):
            trainer.fit()
    except TrainingFailedError as error:
        cause = _saved_error(order)
        if cause is not None:
            raise cause from None
        raise LaunchError(
            f"the workers of stage {order['stage']!r} failed {compute.max_failures + 1} times: {error}",
            where=order["run_dir"],
            fix="run the same command again: it goes on from the last checkpoint",
        ) from error


def _ray_worker(order: dict[str, Any]) -> None:
    from ray.train import get_context

    os.environ["LOCAL_RANK"] = str(get_context().get_local_rank())
    os.environ["LOCAL_WORLD_SIZE"] = str(get_context().get_local_world_size())
    typed: Order = order  # type: ignore[assignment]
    earlier = _saved_error(typed)
    if earlier is not None:
        raise earlier  # a user's error does not go away by trying again
    try:
        run_order(typed)
    except QbrecError as error:
        save_error(typed, error)
        raise


def _saved_error(order: Order) -> QbrecError | None:
    try:
        saved = json.loads(error_file(order).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    if saved["owner"] != order["owner"]:
        return None
    kind: type[QbrecError] = getattr(qbrec.errors, saved["kind"])
    return kind(saved["what"], where=saved["where"], fix=saved["fix"])
