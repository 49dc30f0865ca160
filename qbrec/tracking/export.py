"""What a run reports, as gauges for Prometheus: `metrics.jsonl` tailed by the driver.

Who serves the gauges is not known here: a `publish` function takes them. On a Ray cluster it is the metrics
port of the driver's node (`qbrec.engine.ray_metrics`), which is scraped with all other ports of Ray.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, Self

from qbrec.tracking.lines import METRICS_FILE, Line, read_chunk

# Name -> what it says, in ASCII for Ray's sake. Labels: `run`, `stage`, and what stands behind "by".
GAUGES = {
    "qbrec_step": "Optimiser step of the last report.",
    "qbrec_report_time_seconds": "Unix time of the last report.",
    "qbrec_loss": "Loss per target, mean of the last steps.",
    "qbrec_learning_rate": "Learning rate.",
    "qbrec_step_seconds": "Seconds of an optimiser step, mean of the last steps.",
    "qbrec_phase_seconds": "Seconds of a step by phase: data, prepare, forward, backward, optimizer, ...",
    "qbrec_data_wait_ratio": "Share of a step that waits for data.",
    "qbrec_mfu_ratio": "Share of the device's arithmetic that is used (MFU).",
    "qbrec_metric": "What else a stage reports, by metric: validation, figures of the quantizer.",
}
_NAMES = {
    "loss": "qbrec_loss",
    "learning_rate": "qbrec_learning_rate",
    "step_seconds": "qbrec_step_seconds",
    "data_wait": "qbrec_data_wait_ratio",
    "mfu": "qbrec_mfu_ratio",
}
_PHASE = "time/"  # what `StepMeter` puts before the names of phases


class Sample(NamedTuple):
    """One value of one gauge."""

    name: str
    labels: tuple[tuple[str, str], ...]
    value: float


Publish = Callable[[Iterable[Sample]], None]


def samples_of(line: Line, *, run: str) -> list[Sample]:
    """A line of `metrics.jsonl` as samples."""
    labels = (("run", run), ("stage", line.stage))
    found = [
        Sample("qbrec_step", labels, float(line.step)),
        Sample("qbrec_report_time_seconds", labels, line.time_ms / 1000),
    ]
    for name, value in line.metrics.items():
        if name in _NAMES:
            found.append(Sample(_NAMES[name], labels, value))
        elif name.startswith(_PHASE):
            phase = name.removeprefix(_PHASE)
            found.append(Sample("qbrec_phase_seconds", (*labels, ("phase", phase)), value))
        else:
            found.append(Sample("qbrec_metric", (*labels, ("metric", name)), value))
    return found


class Exporter:
    """Publishes the latest values of the stage that reported last, again and again while the block lasts.

    A gauge that nobody sets any more vanishes from Ray's port after some seconds: a slow stage is published
    as often as a fast one, and one that another has followed ends.

    Args:
        run_dir: Directory with `metrics.jsonl`; what is in it already is left out.
        run: Name of the run, a label of every sample.
        publish: Takes the samples; called from a thread of its own.
        poll_s: Seconds between two looks; Ray's own ports are refreshed every 10 s.
    """

    def __init__(self, run_dir: Path, *, run: str, publish: Publish, poll_s: float = 5.0) -> None:
        self._path, self._run, self._publish, self._poll = run_dir / METRICS_FILE, run, publish, poll_s
        self._offset = self._path.stat().st_size if self._path.is_file() else 0
        self._stage = ""
        self._latest: dict[tuple[str, tuple[tuple[str, str], ...]], Sample] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="qbrec-export", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _loop(self) -> None:
        while not self._stop.wait(self._poll):
            # Shared storage may be away for a moment; the next look catches up.
            with contextlib.suppress(OSError):
                self._read()
            if self._latest:
                self._publish(self._latest.values())

    def _read(self) -> None:
        while (chunk := read_chunk(self._path, self._offset)) is not None:
            self._offset = chunk.end
            for line in chunk.lines:
                if line.stage != self._stage:
                    self._stage, self._latest = line.stage, {}
                for sample in samples_of(line, run=self._run):
                    self._latest[sample.name, sample.labels] = sample
