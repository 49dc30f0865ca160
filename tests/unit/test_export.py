"""What a run reports, as gauges: names, labels, which lines count."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from qbrec.tracking.export import GAUGES, Exporter, Sample, samples_of
from qbrec.tracking.lines import Line
from tests.support.cli import ROOT, environment


def append(run_dir: Path, stage: str, step: int, **metrics: float) -> None:
    with open(run_dir / "metrics.jsonl", "a") as file:
        line = {"time": 1000.0 + step, "stage": stage, "step": step, "metrics": metrics}
        file.write(json.dumps(line) + "\n")


class Published:
    """Stands where Ray's gauges do, and remembers the last samples it was given."""

    def __init__(self) -> None:
        self.count, self.last = 0, dict[tuple[str, str], float]()

    def __call__(self, samples: Iterable[Sample]) -> None:
        self.last = {(s.name, dict(s.labels)["stage"]): s.value for s in samples}
        self.count += 1

    def wait(self, times: int = 2) -> dict[tuple[str, str], float]:
        """What is published once everything written before has been read."""
        until, deadline = self.count + times, time.monotonic() + 20
        while self.count < until:
            assert time.monotonic() < deadline, "nothing was published"
            time.sleep(0.01)
        return self.last


def test_a_line_becomes_gauges_with_its_run_and_stage() -> None:
    line = Line("pretrain", 40, 1_500, {"loss": 2.0, "time/forward": 0.25, "ndcg@10": 0.5, "mfu": 0.3})
    labels = (("run", "first"), ("stage", "pretrain"))
    found = samples_of(line, run="first")
    assert found == [
        Sample("qbrec_step", labels, 40.0),
        Sample("qbrec_report_time_seconds", labels, 1.5),
        Sample("qbrec_loss", labels, 2.0),
        Sample("qbrec_phase_seconds", (*labels, ("phase", "forward")), 0.25),
        Sample("qbrec_metric", (*labels, ("metric", "ndcg@10")), 0.5),
        Sample("qbrec_mfu_ratio", labels, 0.3),
    ]
    assert {sample.name for sample in found} < set(GAUGES)


def test_the_latest_values_of_the_stage_at_work_are_published_again_and_again(tmp_path: Path) -> None:
    append(tmp_path, "fusion", 1, loss=9.0)  # of an earlier driver
    published = Published()
    with Exporter(tmp_path, run="r", publish=published, poll_s=0.02):
        time.sleep(0.2)
        assert published.count == 0
        append(tmp_path, "fusion", 20, loss=4.0, learning_rate=0.1)
        append(tmp_path, "fusion", 40, loss=3.0)
        with open(tmp_path / "metrics.jsonl", "a") as file:
            file.write("torn\n")
        now = published.wait()
        assert now["qbrec_loss", "fusion"] == 3.0
        assert now["qbrec_learning_rate", "fusion"] == 0.1
        assert now["qbrec_step", "fusion"] == 40.0
        assert published.wait() == now  # nothing new was written
        append(tmp_path, "pretrain", 5, loss=7.0)
        assert {stage for _, stage in published.wait()} == {"pretrain"}
    at_the_end = published.count
    time.sleep(0.1)
    assert published.count == at_the_end


def test_without_ray_nothing_is_imported_and_nothing_fails() -> None:
    code = """
import sys
from qbrec.engine.ray_metrics import RayGauges
from qbrec.tracking.export import GAUGES, Sample
RayGauges(GAUGES)([Sample("qbrec_loss", (("run", "r"), ("stage", "s")), 1.0)])
assert "ray" not in sys.modules, "Ray was imported"
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), check=True)
