"""Processes of a session, and ports: whatever a command starts stays in its session."""

from __future__ import annotations

import os
import signal
import socket
import time
from contextlib import ExitStack, suppress
from pathlib import Path


def members(session: int) -> list[int]:
    """Processes of a session, zombies left out."""
    found = []
    for entry in os.listdir("/proc"):
        with suppress(OSError, ValueError):
            fields = Path(f"/proc/{int(entry)}/stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(entry))
    return found


def kill_all(pids: list[int]) -> None:
    """`kill -9` of those that are still there."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def end_session(session: int, *, timeout: float) -> None:
    """`kill -9` until a session has no process."""
    deadline = time.monotonic() + timeout
    while left := members(session):
        kill_all(left)
        assert time.monotonic() < deadline
        time.sleep(0.1)


def free_ports(count: int, *, first: int, end: int) -> int:
    """First of `count` consecutive ports from `first` on, below `end`, that nobody listens on."""
    # Two test runs on one machine rarely look at the same ones.
    bases = range(first, end - count + 1, count)
    turn = os.getpid() % len(bases)
    for base in (*bases[turn:], *bases[:turn]):
        with ExitStack() as held:
            try:
                for port in range(base, base + count):
                    held.enter_context(socket.socket()).bind(("", port))
            except OSError:
                continue
            return base
    raise AssertionError("no free ports")
