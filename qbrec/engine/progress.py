"""Progress with an ETA: drawn on the terminal, or left in a file that the driver draws."""

from __future__ import annotations

import json
import math
import re
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TextIO

from qbrec.storage.artifact import write_atomic

_TERMINAL_PERIOD_S = 0.2
_LOG_PERIOD_S = 5.0
_FILE_PERIOD_S = 0.5
_LOOK_PERIOD_S = 0.2  # at that file
_LINE = re.compile(
    r"  (?P<label>\S.*?) +[█·]{20} +(?P<percent>\d+)%"
    r"  (?P<word>eta|took) (?P<clock>\d+(?::\d\d)+)(?P<info>.*)"
)


class Progress:
    """Counts finished units of one piece of work.

    Args:
        total: Units in all.
        label: What is being done.
        silent: True on every rank but 0.
        file: Where to leave the state for the driver instead of drawing it.
        done: Units finished before (a resumed stage): a line of its own says where it goes on.
    """

    def __init__(
        self, total: int, label: str, *, silent: bool = False, file: Path | None = None, done: int = 0
    ) -> None:
        # Where there is nothing to do (a rank without a shard of its own), all of it is done.
        self.total, self.done = (total, done) if total > 0 else (1, 1)
        self.label = label
        self._first, self._start, self._drawn = self.done, time.monotonic(), 0.0
        self._silent, self._file, self._info, self._shown = silent, file, "", ""
        self._note = f"  {label}: goes on from {done} of {self.total}" if done else ""
        self._lock = threading.Lock()

    def update(self, n: int = 1, /, **info: float | str) -> None:
        """Count `n` more units; `info` is shown behind the bar."""
        with self._lock:
            self.done += n
            if info:
                self._info = "  ".join(
                    f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in info.items()
                )
            self._draw(final=False)

    def close(self) -> None:
        """Draw the last state."""
        with self._lock:
            self._draw(final=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def line(self) -> str:
        """State in one line: label, share, ETA, info."""
        share = min(self.done / self.total, 1.0)
        elapsed = time.monotonic() - self._start
        fresh = self.done - self._first
        left = (self.total - self.done) * elapsed / fresh if fresh > 0 else None
        filled = int(share * 20)
        eta = f"eta {clock(left)}" if left is not None and share < 1 else f"took {clock(elapsed)}"
        bar = "█" * filled + "·" * (20 - filled)
        return f"  {self.label:<26} {bar} {share:>4.0%}  {eta:<12} {self._info}".rstrip()

    def _draw(self, *, final: bool) -> None:
        if self._silent:
            return
        now = time.monotonic()
        if self._file is not None:
            if final or now - self._drawn > _FILE_PERIOD_S:
                self._drawn = now
                state = {"line": self.line(), "final": final, "label": self.label}
                state |= {"note": self._note, "start": self._start, "over": self.done >= self.total}
                write_atomic(self._file, json.dumps(state).encode())
            return
        if self._note:
            draw_line(self._note, final=True)
            self._note = ""
        in_place = sys.stderr.isatty()
        # In a log the end is told once, by `close`: what comes after the last unit takes time as well.
        due = self.done < self.total or in_place
        if final or (due and now - self._drawn > (_TERMINAL_PERIOD_S if in_place else _LOG_PERIOD_S)):
            line = self.line()
            if line != self._shown or in_place:
                draw_line(line, final=final)
            self._drawn, self._shown = now, line


@dataclass(frozen=True)
class Reading:
    """What a progress line says.

    Attributes:
        label: What is being done.
        share: Part of it that is done, 0 to 1, to a hundredth.
        eta_s: Seconds that are left; None where it is over or not known yet.
        info: What stands behind the bar, such as `loss`, `epoch` (`2/4`) and `step` (`120/400`).
    """

    label: str
    share: float
    eta_s: int | None
    info: dict[str, str]


def read_line(line: str) -> Reading | None:
    """The other way round: what a line that `Progress.line` made says; None for any other line."""
    found = _LINE.fullmatch(line.rstrip())
    if found is None:
        return None
    seconds = 0
    for part in found["clock"].split(":"):
        seconds = 60 * seconds + int(part)
    pairs = (pair.rpartition(" ") for pair in found["info"].split("  ") if pair.strip())
    return Reading(
        label=found["label"],
        share=int(found["percent"]) / 100,
        eta_s=seconds if found["word"] == "eta" else None,
        info={name.strip(): value for name, _, value in pairs},
    )


def draw_line(line: str, *, final: bool, stream: TextIO | None = None) -> None:
    """Print a progress line: in place on a terminal, as a line of its own in a log."""
    stream = stream or sys.stderr
    if stream.isatty():
        stream.write(f"\r\033[K{line}" + ("\n" if final else ""))
    else:
        stream.write(line + "\n")
    stream.flush()


class ProgressWatcher:
    """Draws on the driver what a worker's `Progress` leaves in a file.

    Args:
        file: That file.
        period_s: Seconds between two lines; None: few in a log.
    """

    def __init__(self, file: Path, *, period_s: float | None = None) -> None:
        self._file, self._stop = file, threading.Event()
        self._period = period_s if period_s is not None else (0.0 if sys.stderr.isatty() else _LOG_PERIOD_S)
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> ProgressWatcher:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.unlink(missing_ok=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        shown, start, drawn = "", 0.0, -math.inf
        while True:
            # Often: short work that follows writes over what is told of this one.
            stopping = self._stop.wait(_LOOK_PERIOD_S)
            try:
                state = json.loads(self._file.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                state = None  # not written yet, or replaced this very moment: the next look sees it
            if state and state["start"] != start:  # the workers', too, when they were started again
                start, shown = state["start"], ""
                if state["note"]:
                    draw_line(state["note"], final=True)
            now = time.monotonic()
            # As `Progress` itself: a log is told of the end once.
            end = stopping or (state is not None and state["final"])
            due = now - drawn >= self._period and not (state and state["over"] and not sys.stderr.isatty())
            if state and (end or due) and state["line"] != shown:
                shown, drawn = state["line"], now
                draw_line(shown, final=end)
            if stopping:
                return


def clock(seconds: float) -> str:
    """`4:05` or `1:04:05`."""
    minutes, second = divmod(int(seconds + 0.5), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
