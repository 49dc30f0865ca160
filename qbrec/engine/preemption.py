"""Being asked to stop: SIGTERM, a driver that is told to end, a node that is taken away.

Whoever asks, the training loop hears it through `StopRequest` between two steps, writes a checkpoint and
raises `Preempted`: the same command goes on with the very next step. There are three ways in:

- SIGTERM to this process (torchrun's agent forwards it to its ranks, Slurm sends it to all of them). A loop
  in the main thread has the handler itself. Under Ray a worker's loop runs in a thread of its own, where
  Python lets nobody handle signals; `ray_launch` installs the handler from the worker's main thread.
- SIGTERM to a driver whose workers Ray has (`ray job stop`, KubeRay): `DriverStop` leaves a mark in the run
  directory that the workers look for, and waits for their checkpoint.
- A node that Ray drains: `ray_launch` asks Ray Train and calls `ask_to_stop`.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Self

from qbrec.errors import Preempted
from qbrec.storage.atomic import write_atomic

MARK = "stop"  # in a run directory: the driver of this mark wants its workers to stop
LISTENING = "stoppable"  # in a run directory: workers of this driver look for its mark
_LOOK_EVERY_S = 1.0


class _Process:
    """What this process was asked, and whether anybody in it listens."""

    asked: str | None = None
    listeners = 0


def ask_to_stop(reason: str) -> None:
    """Let the training loop of this process stop after its step; from any thread or a signal handler."""
    _Process.asked = _Process.asked or reason


def leave_mark(run_dir: Path, owner: str) -> None:
    """Ask all workers of a driver to stop, wherever they are: its mark in the run directory."""
    write_atomic(run_dir / MARK, owner.encode())


def has_mark(run_dir: Path, owner: str | None) -> bool:
    """Whether that driver, and no earlier one of this run, asked its workers to stop."""
    return bool(owner) and _read(run_dir / MARK) == owner


class StopRequest:
    """Whether this rank was asked to stop; for the time of a `with` block around a training loop.

    Each rank sees only what reached it, so the loop reduces the answer over all ranks before it acts on it.
    A request that comes after the last look is not lost: the signal is raised again when the block ends.

    Args:
        run_dir: The run's directory.
        owner: Mark of the driver that this rank works for; None or empty: there is none elsewhere.
    """

    def __init__(self, run_dir: Path, owner: str | None) -> None:
        self._run_dir, self._owner = run_dir, owner or None
        self._marked, self._next_look = False, 0.0
        self._earlier: Any = None
        self._handles = False

    def __enter__(self) -> Self:
        _Process.listeners += 1
        self._handles = threading.current_thread() is threading.main_thread()
        if self._handles:
            self._earlier = signal.signal(signal.SIGTERM, _note_signal)
        elif self._owner is not None:
            # Not atomic: all ranks write the same, and a reader that finds it half written looks again.
            (self._run_dir / LISTENING).write_text(self._owner, encoding="utf-8")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        _Process.listeners -= 1
        if not self._handles:
            if self._owner is not None and _read(self._run_dir / LISTENING) == self._owner:
                (self._run_dir / LISTENING).unlink(missing_ok=True)
            return
        # None: it was not installed from Python, so there is nothing to go back to but the default.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if self._earlier is None else self._earlier)
        asked, _Process.asked = _Process.asked, None
        if asked is not None and kind is None:
            signal.raise_signal(signal.SIGTERM)

    def __bool__(self) -> bool:
        """Whether to stop; looks at the file system about once a second."""
        if _Process.asked is not None or self._marked:
            return True
        now = time.monotonic()
        if self._owner is not None and now >= self._next_look:
            self._next_look = now + _LOOK_EVERY_S
            self._marked = has_mark(self._run_dir, self._owner)
        return self._marked


class DriverStop:
    """What a driver does on SIGTERM while Ray has its workers; for the time of a `with` block.

    The handler runs in the main thread in the midst of whatever waits for Ray, asks the workers by a mark,
    gives them time for their checkpoint and raises `Preempted` there. In another thread than the main one
    signals are somebody else's, and `leave_mark` does the same.

    Args:
        run_dir: The run's directory.
        owner: Mark of this driver.
        stage: What runs.
        grace_s: Seconds to wait for the workers.
        report: The error that the workers have left by now, or None.
    """

    def __init__(
        self, run_dir: Path, owner: str, *, stage: str, grace_s: float, report: Callable[[], Exception | None]
    ) -> None:
        self._run_dir, self._owner, self._stage = run_dir, owner, stage
        self._grace_s, self._report = grace_s, report
        self._earlier: Any = None
        self._handles, self._asked = False, False
        self._error: Preempted | None = None

    def __enter__(self) -> Self:
        for name in (MARK, LISTENING):  # of an earlier stage or driver
            (self._run_dir / name).unlink(missing_ok=True)
        self._handles = threading.current_thread() is threading.main_thread()
        if self._handles:
            self._earlier = signal.signal(signal.SIGTERM, self._stop)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if self._handles:
            signal.signal(signal.SIGTERM, signal.SIG_DFL if self._earlier is None else self._earlier)
        if self._error is not None and error is not self._error:
            # What a handler raises inside of Ray's native code comes out as a SystemError, or not at all.
            raise self._error from None

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            return  # asked twice: the first one waits already
        self._asked = True
        leave_mark(self._run_dir, self._owner)
        deadline = time.monotonic() + self._grace_s
        left = None  # since when nobody listens; a worker's report comes right after it stopped listening
        while (now := time.monotonic()) < deadline and self._report() is None:
            listening = _read(self._run_dir / LISTENING) == self._owner
            left = None if listening else left or now
            if left is not None and now - left > 2 * _LOOK_EVERY_S:
                break
            time.sleep(0.1)
        found = self._report()
        if not isinstance(found, Preempted):
            found = Preempted(
                f"stage {self._stage!r} was stopped by SIGTERM before its workers wrote a new checkpoint",
                where=str(self._run_dir),
                fix="run the same command again: it goes on from the last checkpoint",
            )
        self._error = found
        raise found


@contextlib.contextmanager
def stop_on_sigterm() -> Iterator[None]:
    """SIGTERM ends the block with `Preempted`, so that what is open gets closed.

    Between stages and in those without steps there is nothing to wait for. Where a training loop listens in a
    thread of this process, it is asked instead.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    raised: list[Preempted] = []

    def handler(number: int, frame: FrameType | None) -> None:
        if _Process.listeners:
            ask_to_stop("SIGTERM")
            return
        raised.append(
            Preempted("stopped by SIGTERM", fix="run the same command again: finished stages are kept")
        )
        raise raised[-1]

    earlier = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    except Preempted:
        raise
    except BaseException:
        if raised:  # see `DriverStop`: native code turns the error into another one
            raise raised[-1] from None
        raise
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if earlier is None else earlier)


def note_signals() -> None:
    """Let SIGTERM ask the training loop of this process to stop, for good; from the main thread."""
    signal.signal(signal.SIGTERM, _note_signal)


def _note_signal(number: int, frame: FrameType | None) -> None:
    ask_to_stop("SIGTERM")


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
