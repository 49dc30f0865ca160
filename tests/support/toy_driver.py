"""Processes that run the toy stage, watched from outside and sent signals."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

import safetensors.torch
import torch

from tests.support.cli import ROOT, environment
from tests.support.processes import end_session, members
from tests.support.toy_stage import losses, weights_file


class Driver:
    """A driver of the toy stage in a process session of its own; whatever is left of it ends with the block.

    Args:
        folder: What `write_order` wrote to.
        launcher: Command in front of the module, such as torchrun's; none: the driver itself.
        env: Further variables.
    """

    module = "tests.support.toy_stage"  # what runs, given the folder

    def __init__(self, folder: Path, *launcher: str, env: dict[str, str] | None = None) -> None:
        self.folder, self.log = folder, folder / f"driver-{len(list(folder.glob('driver-*.log')))}.log"
        command = [sys.executable, "-m", *launcher, self.module, str(folder)]
        # A cluster started by `ray start` has no token, where Ray's own local one makes one.
        given = environment({"RAY_AUTH_MODE": "disabled", **(env or {})})
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=given, stdout=file, stderr=file, start_new_session=True
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        end_session(self.process.pid, timeout=60)
        self.process.wait(timeout=30)

    def members(self) -> list[int]:
        """Living processes of the driver's session."""
        return members(self.process.pid)

    def wait_for_step(
        self, step: int, *, world: int | None = None, skip: int = 0, timeout: float = 240
    ) -> dict[str, Any]:
        """Wait until a step at or past this one was taken (by so many ranks); the line about it.

        Args:
            step: Steps taken.
            world: Number of ranks; None: any.
            skip: Lines of the losses not to look at.
            timeout: Seconds.
        """
        deadline = time.monotonic() + timeout
        while True:
            for line in losses(self.folder)[skip:]:
                if line["step"] >= step and world in (None, line["world"]):
                    return line
            assert self.process.poll() is None, f"ended before step {step}\n{self.log.read_text()}"
            assert time.monotonic() < deadline, f"never came to step {step}\n{self.log.read_text()}"
            time.sleep(0.05)

    def ask_to_stop(self) -> None:
        """SIGTERM to the driver alone."""
        assert self.process.poll() is None, "the fault did not fire"
        self.process.send_signal(signal.SIGTERM)

    def end(self, *, timeout: float = 300) -> int:
        """Exit code."""
        return self.process.wait(timeout=timeout)

    def must_succeed(self) -> None:
        """The stage has to end with its artifact."""
        code = self.end()
        assert code == 0, f"ended with {code}\n{self.log.read_text()}"


def assert_same_training(folder: Path, reference: Path, *, exact: bool = False) -> None:
    """Every step of a run, those done twice included, gave the loss of the reference; so did the weights."""
    want = {line["step"]: line["loss"] for line in losses(reference)}
    taken = losses(folder)
    assert {line["step"] for line in taken} == set(want)
    tolerance = 0.0 if exact else 1e-5
    torch.testing.assert_close(
        torch.tensor([line["loss"] for line in taken]),
        torch.tensor([want[line["step"]] for line in taken]),
        rtol=tolerance,
        atol=tolerance,
    )
    mine, theirs = (safetensors.torch.load_file(weights_file(where)) for where in (folder, reference))
    torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
