"""Run a function on several gloo ranks, each a process of its own, and bring back what they return."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(fn: Callable[..., Any], world: int, *args: Any) -> list[Any]:
    """Call `fn(rank, world, *args)` on every rank; `fn` must be a module-level function."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, args=(fn, world, folder, args), nprocs=world)
        # We wrote these files ourselves a moment ago: results of tests, not artifacts.
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(world)]


def _rank(rank: int, fn: Callable[..., Any], world: int, folder: str, args: tuple[Any, ...]) -> None:
    os.environ.update(DS_ACCELERATOR="cpu", RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        torch.save(fn(rank, world, *args), Path(folder) / f"{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()
