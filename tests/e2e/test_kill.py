"""`kill -9` of the run in every stage; the same command goes on and ends with the same metrics."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.cli import ROOT, STAGES, Road, environment, must, small_config
from tests.support.processes import members

TRAINING = ("fusion", "pretrain", "finetune", "sasrec")
# Here everything dies at once, as in a power cut, so that the stage cannot end by itself. In the other stages
# only the driver is killed: its workers live on for a while beside those of the next one.
POWER_CUT = ("fusion", "pretrain")
# The work of the last two is over in a moment: they die while their workers start.
LAST_LINE_BEFORE = {
    "catalog": "writing items",
    "neighbours": "▸ neighbours\n",
    "evaluation": "▸ evaluation\n",
}
# Two helpers of Ray wait a minute for the dead head before they end; they touch nothing of ours.
# Linux keeps the first 15 characters of a process's name.
RAY_AGENTS = ("ray::DashboardA", "ray::RuntimeEnv")


class Victim:
    """A running `qbrec run` in a process session of its own."""

    def __init__(self, road: Road, log: Path) -> None:
        self.log, self.road = log, road
        with log.open("w") as file:
            command = [sys.executable, "-m", "qbrec", "run", "--config", str(road.config)]
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment(), stdout=file, stderr=file, start_new_session=True
            )

    def wait_for(self, stage: str, *, timeout: float = 300) -> None:
        """Wait until a stage is in the middle of its work."""
        deadline = time.monotonic() + timeout
        while not self.reached(stage):
            assert self.process.poll() is None, f"ended before {stage}\n{self.log.read_text()}"
            assert time.monotonic() < deadline, f"never came to {stage}\n{self.log.read_text()}"
            time.sleep(0.01)

    def reached(self, stage: str) -> bool:
        text = self.log.read_text()
        if f"▸ {stage}\n" not in text:
            return False
        if stage in TRAINING:  # a checkpoint lies there that is not older than the first logged step
            return bool(saved_steps(self.road, stage) and logged_before_checkpoint(self.road, stage))
        if stage == "quantizer":
            return any(name == stage for name, _ in logged_steps(self.road))
        return LAST_LINE_BEFORE[stage] in text

    def kill(self, *, everything: bool) -> None:
        """`kill -9` of the driver, and of all it has started if asked to."""
        others = members(self.process.pid) if everything else []
        for pid in (self.process.pid, *others):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                assert pid != self.process.pid, "the fault did not fire"
        assert self.process.wait(timeout=30) == -signal.SIGKILL, "the fault did not fire"


@dataclass
class Death:
    """What there was when a run was killed."""

    session: int
    finished: set[str]
    logged: set[tuple[str, int]] = field(default_factory=set)


@dataclass
class Survivor:
    """A run that was killed once in every stage and then let go."""

    road: Road
    deaths: dict[str, Death]


def name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def finished(road: Road) -> set[str]:
    return {path.parent.parent.name for path in (road.storage / "artifacts").glob("*/*/manifest.json")}


def saved_steps(road: Road, stage: str) -> list[int]:
    found = (road.run_dir / "checkpoints" / stage).glob("step-*/manifest.json")
    return sorted(int(path.parent.name.removeprefix("step-")) for path in found)


def logged_steps(road: Road) -> list[tuple[str, int]]:
    file = road.run_dir / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [(line["stage"], line["step"]) for line in map(json.loads, lines)]


def logged_before_checkpoint(road: Road, stage: str) -> set[tuple[str, int]]:
    last = saved_steps(road, stage)[-1]
    return {(name, step) for name, step in logged_steps(road) if name == stage and step <= last}


@pytest.fixture(scope="module")
def survivor(shop: Path, road: Road, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Survivor]:
    folder = tmp_path_factory.mktemp("killed")
    survivor = Survivor(Road.write(folder, small_config(shop, folder / "storage")), {})
    try:
        for stage in STAGES:
            victim = Victim(survivor.road, folder / f"{stage}.log")
            try:
                victim.wait_for(stage)
            finally:
                victim.kill(everything=stage in POWER_CUT)
                survivor.deaths[stage] = Death(victim.process.pid, finished(survivor.road))
            if stage in TRAINING:
                survivor.deaths[stage].logged = logged_before_checkpoint(survivor.road, stage)
        must(survivor.road.run())
        yield survivor
    finally:
        for death in survivor.deaths.values():
            for pid in members(death.session):
                os.kill(pid, signal.SIGKILL)


def test_every_kill_hit_its_stage(survivor: Survivor) -> None:
    for position, stage in enumerate(STAGES):
        assert survivor.deaths[stage].finished == set(STAGES[:position])


def test_the_end_is_that_of_an_undisturbed_run(survivor: Survivor, road: Road) -> None:
    run = survivor.road
    assert run.metrics() == road.metrics()
    ids = "semantic_ids.npy"
    assert (run.artifact("quantizer") / ids).read_bytes() == (road.artifact("quantizer") / ids).read_bytes()


def test_training_went_on_from_its_checkpoint(survivor: Survivor, road: Road) -> None:
    """Nothing that came before the checkpoint was done again, and all that came after it was done."""
    everything = logged_steps(survivor.road)
    for stage in TRAINING:
        before = survivor.deaths[stage].logged
        assert before
        assert all(everything.count(entry) == logged_steps(road).count(entry) for entry in before)
    assert set(everything) == set(logged_steps(road))


def test_no_process_outlives_its_driver(survivor: Survivor) -> None:
    deadline = time.monotonic() + 30
    sessions = [death.session for death in survivor.deaths.values()]
    while left := [
        (pid, name_of(pid))
        for session in sessions
        for pid in members(session)
        if not name_of(pid).startswith(RAY_AGENTS)
    ]:
        assert time.monotonic() < deadline, f"processes {left} still run"
        time.sleep(0.2)
