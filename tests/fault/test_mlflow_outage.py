"""MLflow's server is gone for a whole run, or dies in its middle: the run ends well, and nothing is lost."""

from __future__ import annotations

import json
import math
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from qbrec.config import parse_config
from qbrec.tracking.client import connect
from qbrec.tracking.flatten import safe_name
from tests.support.cli import ROOT, Road, environment, must, qbrec, small_config
from tests.support.mlflow_server import served
from tests.support.mlflow_store import copy_store
from tests.support.s3_server import free_port

TRAINING = ("fusion", "pretrain", "finetune", "sasrec", "bert4rec")
LOG_EVERY = 20  # steps, see `engine.train`
Point = tuple[str, str, int, float, int]  # stage, metric, step, value, time in ms


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shop")
    must(qbrec("synth", folder, "--items", "150", "--users", "200", "--no-images"))
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the empty database of a server."""
    folder = tmp_path_factory.mktemp("mlflow")
    return copy_store(folder, folder / "server")


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all runs: they share the catalogue."""
    return tmp_path_factory.mktemp("storage")


def alone(shop: Path, storage: Path, *, name: str, port: int) -> dict[str, Any]:
    tree = small_config(shop, storage, name=name)
    tree["compute"] = {"launcher": "inprocess", "threads_per_worker": 1, "device": "cpu"}
    tree["evaluation"]["baselines"] = ["popularity", "itemknn", "sasrec", "bert4rec"]
    tree["tracking"] = {"uri": f"http://127.0.0.1:{port}", "experiment": name}
    return tree


def lines(road: Road) -> list[dict[str, Any]]:
    file = road.run_dir / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def logged(road: Road) -> Counter[Point]:
    """All points of metrics.jsonl."""
    found: Counter[Point] = Counter()
    for line in lines(road):
        for name, value in line["metrics"].items():
            assert math.isfinite(value)
            found[line["stage"], safe_name(name), line["step"], value, int(line["time"] * 1000)] += 1
    return found


def tracked(road: Road) -> Counter[Point]:
    """All points that MLflow has in the runs of stages."""
    client, experiment = connect(parse_config(road.tree))
    found: Counter[Point] = Counter()
    for run in client.search_runs([experiment]):
        stage = run.data.tags.get("qbrec.stage")
        for name in run.data.metrics if stage else ():
            for point in client.get_metric_history(run.info.run_id, name):
                found[stage, name, point.step, point.value, point.timestamp] += 1
    return found


def assert_caught_up(road: Road) -> None:
    """`qbrec track`, twice: every point is there, and once."""
    for _ in range(2):
        assert "MLflow has the whole run" in must(qbrec("track", "--config", road.config))
        there, wanted = tracked(road), logged(road)
        assert wanted
        assert {point: there[point] for point in wanted} == dict(wanted)
        assert set(there.values()) == {1}


def test_a_run_without_its_server(shop: Path, storage: Path, store: Path, tmp_path: Path) -> None:
    with socket.socket() as held:
        # Bound, so that nobody else gets it, but without `listen`: every connection is refused.
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            pass
        road = Road.write(tmp_path, alone(shop, storage, name="unserved", port=port))
        done = road.run()
        must(done)
        assert done.stderr.count("the run goes on, nothing is lost") == 1
        assert "not registered: " in done.stderr
        late = qbrec("track", "--config", road.config)
        assert late.returncode == 5
        assert "nothing is lost" in late.stderr
    for stage in TRAINING:
        total = json.loads((road.artifact(stage) / "manifest.json").read_text())["meta"]["steps"]
        steps = [line["step"] for line in lines(road) if line["stage"] == stage and "loss" in line["metrics"]]
        assert steps == sorted({*range(LOG_EVERY, total, LOG_EVERY), total})
    with served(store, port):
        assert_caught_up(road)


def test_a_server_that_dies_in_mid_run(shop: Path, storage: Path, store: Path, tmp_path: Path) -> None:
    port = free_port()
    tree = alone(shop, storage, name="abandoned", port=port)
    tree["fusion"]["train"] |= {"epochs": 100, "checkpoint_every": 1000}
    road = Road.write(tmp_path, tree)
    log = tmp_path / "run.log"
    with served(store, port) as server, log.open("wb") as file:
        command = [sys.executable, "-m", "qbrec", "fuse", "--config", str(road.config)]
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=file, stderr=file)
        try:
            deadline = time.monotonic() + 240
            while not any(stage == "fusion" for stage, *_ in tracked(road)):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
            server.kill()
            last = max(line["step"] for line in lines(road) if line["stage"] == "fusion")
            assert process.poll() is None, "the fault did not fire: the run was over"
            assert process.wait(timeout=240) == 0, log.read_text()
        finally:
            process.kill()
            process.wait()
    assert log.read_text().count("the run goes on, nothing is lost") == 1
    assert max(line["step"] for line in lines(road)) > last, "the fault came after the last metric"
    with served(store, port):
        before = tracked(road)
        assert 0 < sum(before.values()) < sum(logged(road).values())
        assert_caught_up(road)
