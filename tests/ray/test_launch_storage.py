"""Ray's workers and a run whose home is an object store; what Ray itself keeps is never needed again."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.cli import ROOT, Road, environment, must, qbrec, small_config
from tests.support.s3_server import FaultProxy

pytestmark = [pytest.mark.slow, pytest.mark.ray]


def steps_of_fusion(road: Road) -> list[tuple[int, tuple[str, ...]]]:
    """What was logged: step and names of the metrics."""
    file = road.run_dir / "metrics.jsonl"
    lines = map(json.loads, file.read_text().splitlines()) if file.exists() else ()
    return [(line["step"], tuple(line["metrics"])) for line in lines if line["stage"] == "fusion"]


def checkpoints(road: Road) -> list[int]:
    found = (road.run_dir / "checkpoints" / "fusion").glob("step-*/manifest.json")
    return sorted(int(path.parent.name.removeprefix("step-")) for path in found)


def test_a_stopped_run_resumes_without_what_ray_kept_and_its_home_serves_others(
    s3: FaultProxy, tmp_path: Path
) -> None:
    home = s3.bucket() + "/home"
    must(qbrec("synth", tmp_path / "shop", "--items", "400", "--users", "600", "--no-images"))
    roads = []
    for name in ("here", "there"):
        tree = small_config(tmp_path / "shop", tmp_path / name)
        tree["run"]["remote"] = home
        tree["fusion"]["train"] |= {"epochs": 60, "checkpoint_every": 10_000}
        tree["tracking"] = {"enabled": False}
        roads.append(Road.write(tmp_path / f"{name}-config", tree))
    here, there = roads

    log = tmp_path / "stopped.log"
    with log.open("w") as file:
        command = [sys.executable, "-m", "qbrec", "fuse", "--config", str(here.config)]
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=file, stderr=file)
    try:
        deadline = time.monotonic() + 300
        while not steps_of_fusion(here):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 143, log.read_text()
    finally:
        process.kill()
        process.wait()
    stopped = checkpoints(here)[-1]
    assert f"was asked to stop, and saved step {stopped}" in log.read_text()
    before = steps_of_fusion(here)
    assert before[-1][0] <= stopped

    shutil.rmtree(here.storage / "ray")
    must(qbrec("fuse", "--config", here.config))
    after = steps_of_fusion(here)
    assert after[: len(before)] == before
    assert stopped < after[-1][0]
    assert len(set(after)) == len(after)  # nothing was done twice

    # Another machine with the same home computes nothing anew: the next stage's workers fetch what they read.
    said = qbrec("quantize", "--config", there.config)
    must(said)
    assert "fusion      up to date" in said.stderr
    assert there.artifact("fusion").name == here.artifact("fusion").name
    assert s3.fetched(".tar")
