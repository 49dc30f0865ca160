"""Run functions on several gloo ranks, each a process of its own.

Starting a rank costs many seconds (torch, DeepSpeed), so the ranks of a world size stay for the whole test
session.
"""

from __future__ import annotations

import atexit
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

_TIMEOUT_S = 300
_pools: dict[int, _Ranks] = {}


class RankError(AssertionError):
    """A rank raised; the text holds its traceback."""


def run_ranks(fn: Callable[..., Any], world: int, *args: Any) -> list[Any]:
    """Call `fn(rank, world, *args)` on every rank, return what each gave; `fn` is a module-level function."""
    pool = _pools.pop(world, None) or _Ranks(world)
    try:
        results = pool.call(fn, args)
    except BaseException:
        pool.stop()  # the ranks may be out of step: the next call gets fresh ones
        raise
    _pools[world] = pool
    return results


class _Ranks:
    def __init__(self, world: int) -> None:
        self.world, self.folder = world, tempfile.TemporaryDirectory()
        context = mp.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(world):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world, self.folder.name, there), daemon=True)
            process.start()
            self.pipes.append(here)
            self.processes.append(process)

    def call(self, fn: Callable[..., Any], args: tuple[Any, ...]) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((fn, args))
        results: dict[int, Any] = {}
        deadline = time.monotonic() + _TIMEOUT_S
        waiting = {pipe: rank for rank, pipe in enumerate(self.pipes)}
        while waiting:
            # Whoever raises leaves the others waiting for it: its error is the one to show.
            for pipe in wait(list(waiting), timeout=max(deadline - time.monotonic(), 0)) or ():
                rank = waiting.pop(pipe)
                results[rank], error = pipe.recv()
                if error is not None:
                    raise RankError(f"rank {rank} of {self.world}:\n{error}")
            if waiting and time.monotonic() > deadline:
                late = sorted(waiting.values())
                raise RankError(f"ranks {late} of {self.world} did not answer within {_TIMEOUT_S} s")
        return [results[rank] for rank in range(self.world)]

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()


def _serve(rank: int, world: int, folder: str, pipe: Connection) -> None:
    os.environ.update(DS_ACCELERATOR="cpu", RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    while True:
        fn, args = pipe.recv()
        try:
            pipe.send((fn(rank, world, *args), None))
        except BaseException:
            pipe.send((None, traceback.format_exc()))


@atexit.register
def _stop_all() -> None:
    for pool in _pools.values():
        pool.stop()
