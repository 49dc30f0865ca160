"""`qbrec` commands in processes of their own, forked from one that has everything loaded, with faults.

Production code knows nothing of the faults: a child wraps what the commands call. Every call that changes the
registry is an event, numbered from 1; a fault strikes before or after one, and leaves a mark first.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from tests.support.cli import ROOT, environment

WRITES = (
    "set_model_version_tag",
    "set_registered_model_tag",
    "set_registered_model_alias",
    "delete_registered_model_alias",
)
KILL, KILL_PROCESS, WAIT_FOR = "kill", "kill process", "wait for"
TRYING = "trying"  # a file in a command's folder, once it has asked for the registry's lock


@dataclass(frozen=True)
class Fault:
    """What happens at one event.

    Attributes:
        write: Number of the call that changes the registry.
        after: Whether it has been done by then.
        action: KILL this process, KILL_PROCESS group `target`, or WAIT_FOR the file `target`.
        target: See there.
    """

    write: int
    after: bool = False
    action: str = KILL
    target: str = ""


@dataclass(frozen=True)
class Done:
    """How a command ended, and what it wrote.

    Attributes:
        code: Its exit code; minus the signal's number where it was killed.
        text: Its output and its errors.
        writes: What it was about to change, in order: name of the call and its arguments.
        struck: Numbers of the writes at which its faults struck.
    """

    code: int
    text: str
    writes: list[list[str]]
    struck: list[int]


class Started:
    """A command under way."""

    def __init__(self, commands: Commands, pid: int, folder: Path) -> None:
        self._commands, self._pid, self._folder = commands, pid, folder

    def has_tried(self) -> None:
        """Wait until it has asked for the registry's lock."""
        _wait_for(self._folder / TRYING)

    def end(self) -> Done:
        """Wait for it."""
        code = int(self._commands.ask({"wait": self._pid}))
        lines = [json.loads(line) for line in _lines(self._folder / "writes")]
        struck = [int(line) for line in _lines(self._folder / "struck")]
        return Done(code, (self._folder / "log").read_text(), lines, struck)


class Commands:
    """The process that they are forked from; it ends with the block."""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.registry_commands"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=environment({"OMP_NUM_THREADS": "1", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}),
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def start(self, folder: Path, *args: str | Path, faults: Sequence[Fault] = ()) -> Started:
        """Start `qbrec ARGS` with faults.

        Args:
            folder: Made; its own, for its output and its marks.
            args: Of the command line.
            faults: Each strikes once.
        """
        folder.mkdir()
        order = {"args": list(map(str, args)), "faults": [asdict(fault) for fault in faults]}
        return Started(self, int(self.ask({"folder": str(folder), **order})), folder)

    def run(self, folder: Path, *args: str | Path, faults: Sequence[Fault] = ()) -> Done:
        """Start it and wait for its end."""
        return self.start(folder, *args, faults=faults).end()

    def ask(self, order: dict[str, Any]) -> str:
        """One line there, one line back."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline()


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _serve() -> None:
    """Fork a child for every order; nothing here may start a thread."""
    import torch

    torch.set_num_threads(1)
    from qbrec.tracking.client import quiet_mlflow

    quiet_mlflow()
    import pyarrow.parquet  # noqa: F401

    import qbrec.cli.registry
    import qbrec.registry.promote  # noqa: F401

    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            _, status = os.waitpid(order["wait"], 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            _child(order)
        print(pid, flush=True)


def _child(order: dict[str, Any]) -> None:
    folder = Path(order["folder"])
    log = os.open(folder / "log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    code = 1
    try:
        _wrap(folder, [Fault(**fault) for fault in order["faults"]])
        from qbrec.cli.main import main

        sys.argv = ["qbrec", *order["args"]]
        main()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wrap(folder: Path, faults: list[Fault]) -> None:
    import fcntl

    from mlflow import MlflowClient

    flock, count = fcntl.flock, 0

    def lock(file: Any, operation: int) -> None:
        (folder / TRYING).touch()
        flock(file, operation)

    def strike(after: bool) -> None:
        for fault in faults:
            if (fault.write, fault.after) == (count, after):
                with open(folder / "struck", "a") as file:
                    file.write(f"{count}\n")
                _act(fault)

    def wrapped(name: str) -> Any:
        inner = getattr(MlflowClient, name)

        def call(client: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            with open(folder / "writes", "a") as file:
                file.write(json.dumps([name, *map(str, args)]) + "\n")
            strike(after=False)
            result = inner(client, *args, **kwargs)
            strike(after=True)
            return result

        return call

    fcntl.flock = lock  # type: ignore[assignment]
    for name in WRITES:
        setattr(MlflowClient, name, wrapped(name))


def _act(fault: Fault) -> None:
    if fault.action == KILL:
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.action == KILL_PROCESS:
        os.killpg(int(fault.target), signal.SIGKILL)
    elif fault.action == WAIT_FOR:
        _wait_for(Path(fault.target))


def _wait_for(file: Path) -> None:
    deadline = time.monotonic() + 240
    while not file.exists():
        assert time.monotonic() < deadline, f"{file} does not come"
        time.sleep(0.02)


if __name__ == "__main__":
    _serve()
