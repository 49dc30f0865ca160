"""What a worker process does with the order it gets: build its context, run the stage's entry point.

An order is plain JSON, so it travels through Ray, a spawn or a file alike.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from qbrec.config import RootConfig, parse_config
from qbrec.engine.context import StageContext
from qbrec.engine.ds_config import resolve_device
from qbrec.engine.progress import Progress
from qbrec.errors import QbrecError
from qbrec.storage.artifact import ArtifactStore, write_atomic


class Order(TypedDict):
    """One stage to run: everything a worker on any machine needs to know."""

    stage: str
    entry: str  # "module:function"
    key: str
    config: dict[str, Any]
    recipe: dict[str, Any]
    inputs: dict[str, str]  # name → directory of the artifact
    storage: str
    run_dir: str
    owner: str  # the driver's mark in the run directory, see `StageContext.check_owner`
    progress_file: str | None


def run_order(order: Order, *, alone: bool = False) -> str:
    """Run a stage in this process, which is one rank of the process group that exists, or the only one.

    Args:
        order: What to run.
        alone: The stage runs on the driver only, even where a process group exists.

    Returns:
        Directory of the artifact.
    """
    config = parse_config(order["config"])
    grouped = dist.is_initialized() and not alone
    rank, world = (dist.get_rank(), dist.get_world_size()) if grouped else (0, 1)
    device = torch.device(resolve_device(config.compute))
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    torch.set_num_threads(num_threads(config, world))
    shown = Path(order["progress_file"]) if order["progress_file"] else None
    # Files of a remote home are fetched when they are first touched, here in the worker.
    store = ArtifactStore(order["storage"], progress=partial(Progress, silent=rank != 0, file=shown))
    ctx = StageContext(
        store=store,
        run_dir=Path(order["run_dir"]),
        owner=order["owner"],
        stage=order["stage"],
        key=order["key"],
        seed=config.run.seed,
        rank=rank,
        world=world,
        device=device,
        compute=config.compute,
        recipe=order["recipe"],
        progress_file=shown,
        remote=config.run.remote,
    )
    inputs = {name: store.open(path) for name, path in order["inputs"].items()}
    artifact = entry_point(order["entry"])(ctx, config, inputs)
    return str(artifact.path)


def num_threads(config: RootConfig, world: int) -> int:
    """Threads of one worker: as configured, else the machine's cores divided among its workers."""
    if config.compute.threads_per_worker:
        return config.compute.threads_per_worker
    on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    return max((os.cpu_count() or 1) // max(on_this_machine, 1), 1)


def join_group(config: RootConfig) -> bool:
    """Join torchrun's process group, or one of this process alone; False where there is one already."""
    if dist.is_initialized():
        return False
    backend = "nccl" if resolve_device(config.compute) == "cuda" else "gloo"
    timeout = timedelta(seconds=config.compute.timeout_s)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        # DeepSpeed asks for these even where there is nobody to meet.
        os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
    return True


def leave_group() -> None:
    """Leave the process group that `join_group` joined, so that this process can join another one later."""
    # DeepSpeed remembers groups of its own: left to torch, they would be used in the next run and are gone.
    comm = sys.modules.get("deepspeed.comm")
    if comm is not None and comm.is_initialized():
        comm.destroy_process_group()
    else:
        dist.destroy_process_group()


def save_error(order: Order, error: QbrecError) -> None:
    """Leave a user's error for the driver: Ray hands back a wrapped text only."""
    document = {"kind": type(error).__name__, "what": error.what, "where": error.where, "fix": error.fix}
    document["owner"] = order["owner"]  # a worker that outlived its driver must not stop the next one
    error_file(order).parent.mkdir(parents=True, exist_ok=True)
    write_atomic(error_file(order), json.dumps(document).encode())


def error_file(order: Order) -> Path:
    """Where `save_error` leaves the error of a stage."""
    return Path(order["run_dir"]) / "errors" / f"{order['stage']}.json"


def entry_point(name: str) -> Callable[..., Any]:
    """The function of `module:function`."""
    module, function = name.split(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found
