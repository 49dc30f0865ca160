"""Attempts at a run: ranks forked from a process that has torch and DeepSpeed loaded, or a driver under Ray.

An attempt costs a second instead of ten, so that every point of a protocol can have its own death.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Self

from tests.fault import stage
from tests.support.s3_server import free_port
from tests.support.toy_driver import Driver

_TIMEOUT_S = 240


class Attempt:
    """All ranks of one attempt at what `stage.write_order` wrote; they end with the block.

    Args:
        folder: Storage of the run.
        world: Number of ranks; more than one meet as torchrun's do.
    """

    def __init__(self, folder: Path, *, world: int = 1) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.fault.preload"])
        number = len(list(folder.glob("attempt-*-0.log")))
        self.logs = [folder / f"attempt-{number}-{rank}.log" for rank in range(world)]
        port = free_port()
        self.processes = [
            context.Process(target=_rank, args=(folder, log, rank, world, port), daemon=True)
            for rank, log in enumerate(self.logs)
        ]
        for process in self.processes:
            process.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()

    def end(self) -> list[int | None]:
        """Exit codes of all ranks; minus the signal's number where one was killed."""
        deadline = time.monotonic() + _TIMEOUT_S
        for process in self.processes:
            process.join(max(deadline - time.monotonic(), 0))
            assert process.exitcode is not None, f"a rank does not end\n{self.text()}"
        return [process.exitcode for process in self.processes]

    def text(self) -> str:
        """What all ranks wrote."""
        return "\n".join(log.read_text() for log in self.logs if log.exists())


def attempt(folder: Path, *, world: int = 1) -> tuple[list[int | None], str]:
    """Exit codes of all ranks, and what they wrote."""
    with Attempt(folder, world=world) as started:
        return started.end(), started.text()


def must(folder: Path, *, world: int = 1) -> None:
    """An attempt that has to succeed."""
    codes, text = attempt(folder, world=world)
    assert codes == [0] * world, f"ended with {codes}\n{text}"


def must_die(folder: Path, *, rank: int = 0, world: int = 1) -> list[int | None]:
    """An attempt in which a rank is killed by its fault."""
    codes, text = attempt(folder, world=world)
    assert codes[rank] == -signal.SIGKILL, f"the fault did not fire: {codes}\n{text}"
    return codes


def _rank(folder: Path, log: Path, rank: int, world: int, port: int) -> None:
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if world > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    code = stage.drive(folder)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: what is left of a process group would wait in its destructors for ranks that are gone.
    os._exit(code)


class FaultDriver(Driver):
    """A driver of the stage with faults in a process session of its own, as users start one."""

    module = "tests.fault.stage"
