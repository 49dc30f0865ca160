"""`kill -9` of the run in every stage; the same command goes on and ends with the same metrics."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.cli import ROOT, STAGES, Road, environment, must, small_config

TRAINING = ("fusion", "pretrain", "finetune")
Survivor = tuple[Road, dict[str, set[str]]]


class Victim:
    """A running `qbrec run` whose messages are read as they come."""

    def __init__(self, road: Road, log: Path) -> None:
        self.log, self.road = log, road
        with log.open("w") as file:
            command = [sys.executable, "-m", "qbrec", "run", "--config", str(road.config)]
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment(), stdout=file, stderr=file, start_new_session=True
            )

    def wait_for(self, stage: str, *, timeout: float = 240) -> None:
        """Wait until a stage has begun and, where it trains, until its first checkpoint is complete."""
        deadline = time.monotonic() + timeout
        while not self.reached(stage):
            assert self.process.poll() is None, f"ended before {stage}\n{self.log.read_text()}"
            assert time.monotonic() < deadline, f"never came to {stage}\n{self.log.read_text()}"
            time.sleep(0.01)

    def reached(self, stage: str) -> bool:
        if f"▸ {stage}\n" not in self.log.read_text():
            return False
        checkpoints = self.road.run_dir / "checkpoints" / stage
        return stage not in TRAINING or any(checkpoints.glob("step-*/manifest.json"))

    def kill(self) -> None:
        """Kill the driver alone: its workers have to notice by themselves."""
        self.process.send_signal(signal.SIGKILL)
        assert self.process.wait(timeout=30) == -signal.SIGKILL, "the fault did not fire"


def finished(road: Road) -> set[str]:
    return {path.parent.parent.name for path in (road.storage / "artifacts").glob("*/*/manifest.json")}


@pytest.fixture(scope="module")
def survivor(shop: Path, road: Road, tmp_path_factory: pytest.TempPathFactory) -> Survivor:
    """A run that was killed once in every stage and then let go, and what was finished at each death."""
    folder = tmp_path_factory.mktemp("killed")
    run = Road.write(folder, small_config(shop, folder / "storage"))
    at_death: dict[str, set[str]] = {}
    for stage in STAGES:
        victim = Victim(run, folder / f"{stage}.log")
        try:
            victim.wait_for(stage)
        finally:
            victim.kill()
        at_death[stage] = finished(run)
    must(run.run())
    return run, at_death


def test_every_kill_hit_its_stage(survivor: Survivor) -> None:
    _, at_death = survivor
    for position, stage in enumerate(STAGES):
        assert at_death[stage] == set(STAGES[:position])


def test_the_end_is_that_of_an_undisturbed_run(survivor: Survivor, road: Road) -> None:
    run, _ = survivor
    assert run.metrics() == road.metrics()
    ids = "semantic_ids.npy"
    assert (run.artifact("quantizer") / ids).read_bytes() == (road.artifact("quantizer") / ids).read_bytes()


def test_training_went_on_from_its_checkpoint(survivor: Survivor, road: Road) -> None:
    """A stage that was cut off wrote its first steps once: nothing before the checkpoint was done again."""
    run, _ = survivor
    for stage in TRAINING:
        steps = [step for name, step in logged_steps(run) if name == stage]
        assert steps.count(min(steps)) == 1, f"{stage} began anew"
        assert max(steps) == max(step for name, step in logged_steps(road) if name == stage)


def logged_steps(road: Road) -> list[tuple[str, int]]:
    import json

    lines = [json.loads(line) for line in (road.run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(line["stage"], line["step"]) for line in lines]


def test_no_worker_outlives_its_driver(survivor: Survivor) -> None:
    run, _ = survivor
    needle = str(run.storage).encode()
    deadline = time.monotonic() + 60
    while left := [pid for pid in os.listdir("/proc") if pid.isdigit() and needle in _command_line(pid)]:
        assert time.monotonic() < deadline, f"processes {left} still run"
        time.sleep(0.5)


def _command_line(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
