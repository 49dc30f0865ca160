"""Faults that strike once, at a named point of a real training: death, a frozen process, NaN, a full disk.

Production code knows nothing of them. The stage of a test calls `Injector.install` in its own process, which
wraps functions that the engine calls. A fault that strikes leaves a mark first: the process that is started
again goes on undisturbed, and the test sees that its fault has fired.
"""

from __future__ import annotations

import builtins
import errno
import fnmatch
import json
import math
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

STEP = "step"  # before an optimiser step
LOSS = "loss"  # in the forward pass of that step, while the other ranks go on to the next collective
PREPARE = "prepare"  # before the directory of a checkpoint is emptied and made
PREPARED = "prepared"  # after it
WRITE = "write"  # half of a file's bytes are on disk, under its temporary name
SYNC = "sync"  # a file is written, but not yet safe on disk
RENAME = "rename"  # a file is whole, but has its temporary name
RENAMED = "renamed"  # a file has its name
REMOVE = "remove"  # before a directory is removed
REMOVED_HALF = "removed half"  # half of its files are gone

KILL, FREEZE, KILL_DRIVER, NAN, FULL = "kill", "freeze", "kill driver", "nan", "full"

LOSSES = "losses.jsonl"  # in the run directory: every step, as `toy_stage.losses` reads it
READS = "reads.jsonl"  # in the run directory: every checkpoint that was opened
DRIVER = "driver.pid"  # beside the run directory: what KILL_DRIVER kills
_PLAN = "faults.json"
_STEP = re.compile(r"^step-(\d+)")
_TEMPORARY = re.compile(r"\.\d+\.tmp$")


@dataclass(frozen=True)
class Fault:
    """One fault; it strikes at the first event that fits.

    Attributes:
        event: Where.
        action: What happens.
        rank: On which rank.
        step: Optimiser steps taken by then, of a checkpoint's file those of the checkpoint; None: any.
        file: Pattern of the last parts of the path of the file, or of the directory that is removed.
    """

    event: str
    action: str = KILL
    rank: int = 0
    step: int | None = None
    file: str = "*"


def plan(folder: Path, *faults: Fault) -> None:
    """Let these faults strike whatever is started for this folder; marks of earlier ones go."""
    for mark in folder.glob("struck-*.json"):
        mark.unlink()
    (folder / _PLAN).write_text(json.dumps([asdict(fault) for fault in faults]))


def struck(folder: Path) -> list[dict[str, Any]]:
    """What the faults that have struck said: number in the plan, event, step, file, rank, pid."""
    return [json.loads(mark.read_text()) for mark in sorted(folder.glob("struck-*.json"))]


def reads(folder: Path) -> list[Path]:
    """Checkpoints that were opened, in order."""
    file = folder / "run" / READS
    return [Path(line) for line in file.read_text().splitlines()] if file.exists() else []


class Injector:
    """The faults of one rank; its process is wrapped for good.

    Args:
        folder: Where `plan` was called; the run directory is `run` below it.
        rank: This rank.
        world: Number of ranks.
    """

    def __init__(self, folder: Path, *, rank: int, world: int) -> None:
        self.folder, self.rank, self.world = folder, rank, world
        file = folder / _PLAN
        entries = json.loads(file.read_text()) if file.exists() else []
        self.faults = [Fault(**entry) for entry in entries]
        self.step: int | None = None  # the step that is being taken

    def install(self) -> None:
        """Wrap what the engine calls."""
        self._wrap_steps()
        self._wrap_files()
        self._wrap_checkpoints()

    def loss(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        """A task's loss with faults."""

        def loss(module: Any, batch: Any) -> Any:
            found = inner(module, batch)
            return found * math.nan if self.strike(LOSS, step=self.step) == NAN else found

        return loss

    def strike(self, event: str, *, step: int | None = None, file: str = "") -> str | None:
        """Let the fault of this event happen, if there is one that has not; its action where it returns."""
        for number, fault in enumerate(self.faults):
            if (fault.event, fault.rank) != (event, self.rank) or fault.step not in (None, step):
                continue
            if _fits(file, fault.file) and self._mark(number, event, step, file):
                self._act(fault, file)
                return fault.action
        return None

    def _mark(self, number: int, event: str, step: int | None, file: str) -> bool:
        """Leave the mark; False where it is there already."""
        document = {"number": number, "event": event, "step": step, "file": file}
        document |= {"rank": self.rank, "pid": os.getpid(), "time": time.time()}
        try:
            descriptor = os.open(self.folder / f"struck-{number}.json", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return False
        os.write(descriptor, json.dumps(document).encode())
        os.close(descriptor)
        return True

    def _act(self, fault: Fault, file: str) -> None:
        if fault.action == KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault.action == KILL_DRIVER:
            os.kill(int((self.folder / DRIVER).read_text()), signal.SIGKILL)
        elif fault.action == FREEZE:
            os.kill(os.getpid(), signal.SIGSTOP)
        elif fault.action == FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file)

    def _wrap_steps(self) -> None:
        from qbrec.engine.step import Stepper

        inner = Stepper.__call__

        def call(stepper: Any, batches: Sequence[Any], step: int, *, stop: bool) -> Any:
            self.step = step
            self.strike(STEP, step=step)
            done = inner(stepper, batches, step, stop=stop)
            if self.rank == 0:
                line = {"step": step + 1, "loss": done.loss, "world": self.world, "pid": os.getpid()}
                self._note(LOSSES, json.dumps(line))
            return done

        Stepper.__call__ = call  # type: ignore[method-assign]

    def _wrap_files(self) -> None:
        from qbrec.engine import context
        from qbrec.storage import atomic

        replace, fsync, rmtree = os.replace, os.fsync, shutil.rmtree

        def open_(file: Any, *args: Any, **kwargs: Any) -> Any:
            opened = builtins.open(file, *args, **kwargs)  # noqa: SIM115 - the caller closes it
            step, name = _place(Path(file))
            fits = any(f.event == WRITE and _fits(name, f.file) for f in self.faults)
            return _HalfWritten(opened, lambda: self.strike(WRITE, step=step, file=name)) if fits else opened

        def os_replace(source: Any, target: Any, **kwargs: Any) -> None:
            step, name = _place(Path(target))
            self.strike(RENAME, step=step, file=name)
            replace(source, target, **kwargs)
            self.strike(RENAMED, step=step, file=name)

        def os_fsync(descriptor: int) -> None:
            step, name = _place(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
            self.strike(SYNC, step=step, file=name)
            fsync(descriptor)

        def shutil_rmtree(path: Any, *args: Any, **kwargs: Any) -> None:
            directory = Path(path)
            if _STEP.match(directory.name) and directory.is_dir():
                step = int(_STEP.match(directory.name)[1])  # type: ignore[index]
                self.strike(REMOVE, step=step, file=str(directory))
                if any(fault.event == REMOVED_HALF for fault in self.faults):
                    files = sorted(directory.iterdir())
                    for file in files[: len(files) // 2]:
                        file.unlink()
                    self.strike(REMOVED_HALF, step=step, file=str(directory))
            rmtree(path, *args, **kwargs)

        # A module's own name comes before the built-in one.
        atomic.open = open_  # type: ignore[attr-defined]
        context.open = open_  # type: ignore[attr-defined]
        os.replace, os.fsync = os_replace, os_fsync
        shutil.rmtree = shutil_rmtree  # type: ignore[assignment]

    def _wrap_checkpoints(self) -> None:
        from qbrec.storage.artifact import ArtifactStore, ArtifactWriter

        prepare, open_ = ArtifactWriter.prepare, ArtifactStore.open

        def prepared(writer: ArtifactWriter) -> None:
            found = _STEP.match(writer.path.name)
            if found:
                self.strike(PREPARE, step=int(found[1]))
            prepare(writer)
            if found:
                self.strike(PREPARED, step=int(found[1]))

        def opened(store: ArtifactStore, path: Any) -> Any:
            if _STEP.match(Path(path).name):
                self._note(READS, str(path))
            return open_(store, path)

        ArtifactWriter.prepare = prepared  # type: ignore[method-assign]
        ArtifactStore.open = opened  # type: ignore[method-assign]

    def _note(self, name: str, line: str) -> None:
        with builtins.open(self.folder / "run" / name, "a", encoding="utf-8") as file:
            file.write(line + "\n")


class _HalfWritten:
    """A file in which a fault strikes when half of what is written lies on disk."""

    def __init__(self, file: Any, strike: Callable[[], object]) -> None:
        self._file, self._strike = file, strike

    def write(self, data: Any) -> int:
        half = len(data) // 2
        self._file.write(data[:half])
        self._file.flush()
        self._strike()
        return half + int(self._file.write(data[half:]))

    def __enter__(self) -> _HalfWritten:
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        return self._file.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _fits(path: str, pattern: str) -> bool:
    return pattern == "*" or fnmatch.fnmatch(path, f"*/{pattern}")


def _place(path: Path) -> tuple[int | None, str]:
    """The step of the checkpoint that a file belongs to, if it does, and the path that it is to have."""
    found = _STEP.match(path.parent.name)
    return int(found[1]) if found else None, _TEMPORARY.sub("", str(path))
