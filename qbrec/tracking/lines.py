"""Reading `metrics.jsonl` while it is written: whole lines from an offset on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NamedTuple

METRICS_FILE = "metrics.jsonl"
_CHUNK = 4 << 20  # bytes of one pass


class Line(NamedTuple):
    """What a stage reported at one step. `time_ms`: since 1970."""

    stage: str
    step: int
    time_ms: int
    metrics: dict[str, float]


class Chunk(NamedTuple):
    """Whole lines of one pass, those that are none, and the offset (bytes) to read on from."""

    lines: list[Line]
    refused: list[bytes]
    end: int


def read_chunk(path: Path, offset: int) -> Chunk | None:
    """The next whole lines after an offset; None where there are none. A file that shrank is read anew."""
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        start = offset if offset <= path.stat().st_size else 0
        file.seek(start)
        chunk = file.read(_CHUNK)
    end = chunk.rfind(b"\n") + 1  # the last line may still be in the writer's hands
    if end == 0:
        return None
    parsed = [(raw, _parse(raw)) for raw in chunk[:end].splitlines()]
    return Chunk(
        lines=[line for _, line in parsed if line is not None],
        refused=[raw for raw, line in parsed if line is None],
        end=start + end,
    )


def _parse(raw: bytes) -> Line | None:
    try:
        entry = json.loads(raw)
        metrics = {str(k): float(v) for k, v in entry["metrics"].items()}
        when = float(entry["time"])
        if not math.isfinite(when):
            return None
        return Line(str(entry["stage"]), int(entry["step"]), int(when * 1000), metrics)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
