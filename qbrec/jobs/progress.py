"""How far a run has come, and how it ended, from what its driver has written."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from qbrec.engine.progress import Reading, read_line

# What `pipeline.say` marks stages with.
_BEGUN = re.compile(r"▸ (?P<stage>[\w-]+)")
_DONE = re.compile(r"✓ (?P<stage>[\w-]+) +(?:(?P<seconds>\d+\.\d) s|up to date) ")
_ERROR = "error: "


@dataclass(frozen=True)
class Seen:
    """What a log tells.

    Attributes:
        finished: Seconds by finished stage; None for one that an earlier attempt had finished.
        stage: The stage that runs, or that the run ended in; None between two.
        reading: The newest progress of that stage.
        error: The error that the driver ended with, with its reason and remedy.
    """

    finished: dict[str, float | None]
    stage: str | None = None
    reading: Reading | None = None
    error: str | None = None

    def document(self) -> dict[str, Any]:
        """The same for JSON: steps and epochs as numbers."""
        document: dict[str, Any] = {"stage": self.stage, "finished": self.finished, "error": self.error}
        if self.reading is not None:
            document["progress"] = {
                "label": self.reading.label,
                "share": self.reading.share,
                "eta_s": self.reading.eta_s,
                **{name: _number(value) for name, value in self.reading.info.items()},
            }
        return document


def read_log(text: str) -> Seen:
    """What a driver's log tells about its run."""
    finished: dict[str, float | None] = {}
    stage: str | None = None
    reading: Reading | None = None
    lines = text.splitlines()
    for line in lines:
        if (begun := _BEGUN.fullmatch(line)) is not None:
            stage, reading = begun["stage"], None
        elif (done := _DONE.match(line)) is not None:
            finished[done["stage"]] = float(done["seconds"]) if done["seconds"] else None
            stage, reading = None, None
        elif stage is not None and (found := read_line(line)) is not None:
            reading = found
    return Seen(finished=finished, stage=stage, reading=reading, error=_last_error(lines))


def _last_error(lines: list[str]) -> str | None:
    """The last error as the command line prints it: its first line, and those that are indented below it."""
    starts = [i for i, line in enumerate(lines) if line.startswith(_ERROR)]
    if not starts:
        return None
    error = [lines[starts[-1]].removeprefix(_ERROR)]
    for line in lines[starts[-1] + 1 :]:
        if not line.startswith("  "):
            break
        error.append(line)
    return "\n".join(error)


def _number(text: str) -> Any:
    """`3.2` as a number, `120/400` as two of them, anything else as it is."""
    try:
        if (parts := text.split("/"))[1:]:
            return [int(part) for part in parts]
        return float(text)
    except ValueError:
        return text
