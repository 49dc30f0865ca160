"""What each rank does and since when; which rank is to blame when a collective fails.

A failed collective tells a rank only that somebody did not come. So every rank leaves
`<run>/heartbeats/<stage>/rank-R.json` about once a second, from a thread of its own: a rank whose file goes
on but whose step does not is stuck, one whose file stands still is frozen or gone with its machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

import torch.distributed as dist

from qbrec.engine.context import StageContext
from qbrec.errors import CollectiveError

PERIOD_S = 1.0
# What gloo, nccl and torch's store say; a RuntimeError of anything else is not about other ranks.
_COLLECTIVE = re.compile(r"gloo|nccl|timed out|timeout|connection (closed|reset|refused)|broken pipe", re.I)
_TIMEOUT = re.compile(r"timed out|timeout", re.I)


class Heartbeat:
    """Leaves what this rank does; for the time of a `with` block around a training loop.

    Args:
        ctx: The rank's context.
    """

    def __init__(self, ctx: StageContext) -> None:
        self.rank, self.world, self.timeout_s = ctx.rank, ctx.world, ctx.compute.timeout_s
        self.folder = heartbeat_folder(ctx.run_dir, ctx.stage)
        self._now: tuple[int, str, float] = (0, "start", time.monotonic())
        self._count, self._failed = 0, ""
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._write_on, name="heartbeat", daemon=True)
        self._timed = False

    def __enter__(self) -> Self:
        if self.world > 1:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.rank == 0:
                self._forget_larger_groups()
            self._write()
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.world == 1:
            return
        self._ended.set()
        self._thread.join()
        if kind is not None and issubclass(kind, CollectiveError):
            return  # the other ranks are about to ask what became of this one
        self._file(self.rank).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # other ranks' files are still there
            self.folder.rmdir()

    def beat(self, step: int, *, phase: str = "training") -> None:
        """This rank begins step `step`, or another phase at that step; costs no file access."""
        self._now = (step, phase, time.monotonic())
        if not self._timed and self.world > 1:
            # DeepSpeed has made groups of its own by now, with torch's default time-out instead of ours.
            set_group_timeouts(self.timeout_s)
            self._timed = True

    def explain(self, error: BaseException) -> CollectiveError:
        """What a failed collective means: which rank did not come, where it is and what it does.

        Waits a few seconds, in which the other ranks notice and say so: who says nothing is to blame.
        """
        timed_out = bool(_TIMEOUT.search(str(error)))
        self._failed = "timeout" if timed_out else "lost"
        self._write()
        others = [rank for rank in range(self.world) if rank != self.rank]
        before = {rank: read_beat(self._file(rank)) for rank in others}
        time.sleep(3 * PERIOD_S)
        after = {rank: read_beat(self._file(rank)) for rank in others}
        # The first to give up closes its connections: to the others that looks as if it had died.
        timed_out = timed_out or any(beat.get("failed") == "timeout" for beat in after.values())
        silent = [rank for rank in others if not after[rank].get("failed")]
        step = self._now[0]
        if not silent:
            lines = [f"all {self.world} ranks noticed, this one (rank {self.rank}) at step {step}"]
            lines += [_describe(rank, after[rank]) for rank in others if after[rank].get("step", step) < step]
            fix = "check the network between the machines, then run the same command again"
        else:
            lines = [_describe(rank, after[rank], before=before[rank]) for rank in silent]
            fix = "; ".join(_look_at(after[rank]) for rank in silent)
            fix += "; the same command goes on from the last checkpoint"
            if timed_out:
                fix += "; if a step may take that long, raise compute.timeout_s"
        what = f"waited {self.timeout_s} s for" if timed_out else "lost the connection to"
        return CollectiveError(
            f"rank {self.rank} at step {step} {what} other ranks: {'; '.join(lines)}",
            where=str(self.folder),
            fix=fix,
        )

    def _file(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.json"

    def _forget_larger_groups(self) -> None:
        for file in self.folder.glob("rank-*.json"):
            if int(file.stem.removeprefix("rank-")) >= self.world:
                file.unlink(missing_ok=True)

    def _write_on(self) -> None:
        while not self._ended.wait(PERIOD_S):
            with contextlib.suppress(OSError):  # the next one may succeed; training does not depend on it
                self._write()

    def _write(self) -> None:
        step, phase, since = self._now
        with self._lock:
            self._count += 1
            document = {
                "rank": self.rank,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "step": step,
                "phase": phase,
                "seconds": round(time.monotonic() - since, 1),  # in this step and phase
                "time": round(time.time(), 1),
                "count": self._count,
                "failed": self._failed,
            }
            # Not `write_atomic`: that waits for the disk, and a heartbeat need not survive a power cut.
            temporary = self._file(self.rank).with_suffix(".tmp")
            temporary.write_text(json.dumps(document), encoding="utf-8")
            os.replace(temporary, self._file(self.rank))


@contextlib.contextmanager
def watch_collectives(heartbeat: Heartbeat) -> Iterator[None]:
    """Turn a failed collective inside the block into an error that names the rank to blame.

    Gloo raises in the rank that waits. Under nccl a time-out is noticed by torch's watchdog thread, which
    ends the process before Python sees anything; there the driver reads the files that are left, see
    `last_heard`.

    Raises:
        CollectiveError: A rank stalled, or its connection was lost.
    """
    try:
        yield
    except RuntimeError as error:  # torch.distributed's own errors are RuntimeErrors too
        about_ranks = isinstance(error, dist.DistError) or _COLLECTIVE.search(str(error))
        if heartbeat.world == 1 or not about_ranks:
            raise
        raise heartbeat.explain(error) from error


def heartbeat_folder(run_dir: Path, stage: str) -> Path:
    """Where the ranks of a stage leave what they do."""
    return run_dir / "heartbeats" / stage


def read_beat(path: Path) -> dict[str, Any]:
    """What a rank left; empty where there is nothing."""
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return document


def last_heard(run_dir: Path, stage: str) -> str:
    """One line about every rank whose process ended without leaving its training loop."""
    # A stage may have several loops, each with a folder below the stage's.
    files = sorted(heartbeat_folder(run_dir, stage).rglob("rank-*.json"))
    beats = [beat for beat in map(read_beat, files) if beat]
    return "; ".join(_describe(beat["rank"], beat) for beat in beats)


def set_group_timeouts(seconds: float) -> None:
    """Give all process groups of this rank one time-out.

    `torch.distributed.new_group` takes torch's default where none is named, not that of the world, and
    DeepSpeed names none. torch can set it afterwards, but has no public name for that.
    """
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def _describe(rank: int, beat: Mapping[str, Any], *, before: Mapping[str, Any] | None = None) -> str:
    if not beat:
        return f"rank {rank} has not come to this stage, or has left it"
    who = f"rank {rank} (host {beat['host']}, pid {beat['pid']})"
    doing = f"step {beat['step']} ({beat['phase']})"
    if before is not None and beat["count"] > before.get("count", 0):
        return f"{who} has been in {doing} for {beat['seconds']:.0f} s"
    gone = _is_gone(beat)
    silent = max(time.time() - beat["time"], 0.0)
    return f"{who} {'is gone' if gone else 'has not been heard of'} since {doing}, {silent:.0f} s ago"


def _look_at(beat: Mapping[str, Any]) -> str:
    if not beat:
        return "look at the log of that rank"
    if _is_gone(beat):
        return f"look on {beat['host']} why process {beat['pid']} ended (its own error, or out of memory)"
    return f"look on {beat['host']} what process {beat['pid']} does (py-spy dump), its disk and its network"


def _is_gone(beat: Mapping[str, Any]) -> bool:
    """Whether the process is known to have ended: it can be asked on this machine only."""
    if beat["host"] != socket.gethostname():
        return False
    try:
        return (
            Path(f"/proc/{beat['pid']}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z"
        )
    except FileNotFoundError:
        return True
