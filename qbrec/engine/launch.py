"""Start a stage's workers: in this process, as one rank under torchrun, or through Ray Train V2.

`compute.num_workers` may be (min, max). Ray resizes its workers within it; under torchrun, whose
`--nnodes min:max` does the same, it is what the ranks it started must fit into; in this process there is room
for one worker.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from qbrec.config import RootConfig, parse_config
from qbrec.config.sections import ComputeConfig
from qbrec.engine.worker import Order, join_group, leave_group, run_order
from qbrec.errors import LaunchError


def resolve_launcher(config: RootConfig) -> str:
    """`torchrun` under torchrun, `inprocess` for one worker, else `ray`."""
    wanted = config.compute.launcher
    if wanted != "auto":
        return wanted
    if "RANK" in os.environ and "MASTER_ADDR" in os.environ:
        return "torchrun"
    return "inprocess" if config.compute.max_workers == 1 else "ray"


def launch(order: Order) -> None:
    """Run a stage on all of its workers and wait for them.

    Raises:
        QbrecError: What a worker raised for the user.
        LaunchError: Workers could not be started or were lost more often than `compute.max_failures` allows.
    """
    config = parse_config(order["config"])
    launcher = resolve_launcher(config)
    if launcher == "ray":
        from qbrec.engine.ray_launch import launch_ray  # brings Ray along

        launch_ray(order, config)
        return
    if launcher == "torchrun" and "RANK" not in os.environ:
        raise LaunchError(
            "compute.launcher is torchrun, but this process was not started by it",
            fix="start it as `torchrun --nproc-per-node 2 -m qbrec run …`, or set compute.launcher=auto",
        )
    check_workers(config.compute, launcher)
    with process_group(config):
        run_order(order)


def check_workers(compute: ComputeConfig, launcher: str) -> None:
    """Whether the workers there are without Ray fit `compute.num_workers`.

    Raises:
        LaunchError: They do not.
    """
    least, most = compute.worker_range
    if launcher == "inprocess" and least > 1:
        raise LaunchError(
            f"compute.launcher is inprocess, which has one worker; compute.num_workers asks for {least}",
            fix="set compute.launcher=ray, start it under torchrun, or set compute.num_workers=1",
        )
    if launcher == "torchrun" and isinstance(compute.num_workers, tuple):
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if not least <= world <= most:
            raise LaunchError(
                f"torchrun started {world} ranks; compute.num_workers allows {least} to {most}",
                fix="match --nnodes and --nproc-per-node with it, or drop compute.num_workers: it does not "
                "start ranks under torchrun",
            )


@contextlib.contextmanager
def process_group(config: RootConfig) -> Iterator[None]:
    """A process group for the time of the block; one that exists already is left alone."""
    joined = join_group(config)
    try:
        yield
    finally:
        if joined:
            leave_group()
