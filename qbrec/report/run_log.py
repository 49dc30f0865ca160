"""What a run left behind in its directory: curves from metrics.jsonl, seconds per stage from run.json."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

RUN_FILE = "run.json"
Curves = dict[str, dict[str, list[tuple[float, float]]]]


def read_seconds(run_dir: Path) -> dict[str, float]:
    """Seconds that each stage took when it was built, from the pipeline's `run.json`; empty without one."""
    try:
        stages = json.loads((run_dir / RUN_FILE).read_text(encoding="utf-8"))["stages"]
        return {str(name): float(entry["seconds"]) for name, entry in stages.items() if "seconds" in entry}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return {}


def read_curves(run_dir: Path) -> Curves:
    """`{stage: {metric: [(step, value)]}}` in the order of steps.

    A resumed or repeated stage writes a step again: the last word counts. A half-written line is left out.
    """
    path = run_dir / "metrics.jsonl"
    found: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    if path.is_file():
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    entry = json.loads(line)
                    for name, value in entry["metrics"].items():
                        found[str(entry["stage"])][str(name)][int(entry["step"])] = float(value)
                except (ValueError, KeyError, TypeError, AttributeError):
                    continue
    return {
        stage: {name: sorted((float(s), v) for s, v in points.items()) for name, points in metrics.items()}
        for stage, metrics in found.items()
    }


def duration(seconds: float) -> str:
    """`850 ms`, `42 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"
