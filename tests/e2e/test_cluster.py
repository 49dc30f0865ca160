"""Runs on a real cluster of two nodes on this machine, started by cluster/local.sh with its token: sent by
`ray job submit`, and sent, followed and stopped by name."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import ROOT, STAGES, Road, environment, must, small_config
from tests.support.local_cluster import LocalCluster, local_cluster
from tests.support.scrape import scrape


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with local_cluster(2) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def reach(cluster: LocalCluster) -> dict[str, str]:
    return cluster.reach()


def client(reach: dict[str, str], *args: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "qbrec", *map(str, args)]
    return subprocess.Popen(
        command,
        cwd="/",  # the code that travels is not that of the current folder
        env=environment(reach) | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    out, error = process.communicate(timeout=900)
    return subprocess.CompletedProcess(process.args, process.returncode, out, error)


def status(reach: dict[str, str], run: str) -> dict[str, Any]:
    return dict(json.loads(must(end(client(reach, "status", run, "--json")))))


def wait_for_step(reach: dict[str, str], run: str, step: int) -> dict[str, Any]:
    """Until the newest attempt of a run has taken a step of fusion."""
    deadline = time.monotonic() + 600
    while True:
        found = status(reach, run)
        if found["stage"] == "fusion" and found.get("progress", {}).get("step", [0])[0] >= step:
            return found
        assert found["status"] in ("PENDING", "RUNNING"), found
        assert time.monotonic() < deadline, found
        time.sleep(1)


def test_two_nodes_are_up_and_want_the_token(cluster: LocalCluster) -> None:
    status = must(cluster("status"))
    assert status.count(": running") == 2
    assert "/2.0 CPU" in status
    address = must(cluster("env")).split("RAY_API_SERVER_ADDRESS=")[1].strip()
    command = [str(Path(sys.executable).parent / "ray"), "job", "list", "--address", address]
    for token in ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "guessed"}, {"RAY_AUTH_MODE": "disabled"}):
        stranger = subprocess.run(
            command, env=environment(token), capture_output=True, text=True, timeout=120
        )
        assert stranger.returncode != 0
        assert "uthentication" in stranger.stderr + stranger.stdout


def test_a_second_cluster_is_refused(cluster: LocalCluster) -> None:
    again = cluster("up", "2")
    assert again.returncode == 5
    assert "already runs" in again.stderr


@pytest.fixture(scope="module")
def submitted(road: Road, tmp_path_factory: pytest.TempPathFactory) -> Road:
    """The configuration of the undisturbed run, with a storage of its own."""
    folder = tmp_path_factory.mktemp("submitted")
    tree = deepcopy(road.tree)
    tree["run"] = {"name": "submitted", "storage": str(folder / "storage")}
    return Road.write(folder, tree)


def test_a_submitted_run_succeeds_with_the_same_metrics_and_is_seen_by_prometheus(
    cluster: LocalCluster, road: Road, submitted: Road
) -> None:
    # The driver runs on the head, whose metrics port is the 16th of the cluster's.
    port = int(must(cluster("env")).split("RAY_ADDRESS=127.0.0.1:")[1].split()[0]) + 15
    seen: set[tuple[str, str]] = set()
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(cluster.submit_run, submitted.config)
        while not job.done():
            seen |= {(name, labels["stage"]) for name, labels, _ in scrape(port, run="submitted")}
            time.sleep(1)
    assert "succeeded" in must(job.result())
    assert submitted.metrics() == road.metrics()
    assert "ray_qbrec_loss" in {name for name, _ in seen}
    assert {stage for _, stage in seen} <= set(STAGES)


def test_sent_by_name_the_same_run_goes_on_with_what_it_has(
    reach: dict[str, str], road: Road, submitted: Road
) -> None:
    """Both ways to send it mean the same run: (storage, name)."""
    done = end(client(reach, "submit", "--config", submitted.config))
    log = must(done)
    assert "qbrec-submitted-1: SUCCEEDED, exit code 0" in done.stderr
    assert submitted.metrics() == road.metrics()
    assert must(end(client(reach, "logs", "submitted"))) == log
    found = status(reach, "submitted")
    expected = ("SUCCEEDED", 0, str(submitted.storage))
    assert (found["status"], found["exit_code"], found["storage"]) == expected
    assert found["finished"] == dict.fromkeys(STAGES)  # up to date: none took any time


def test_the_exit_code_of_a_failing_run_comes_through(
    reach: dict[str, str], shop: Path, tmp_path: Path
) -> None:
    tree = small_config(shop, tmp_path / "storage", name="failing")
    tree["data"]["domains"]["shop"]["items"] = str(tmp_path / "nowhere.parquet")
    run = Road.write(tmp_path, tree)
    done = end(client(reach, "submit", "--config", run.config))
    assert done.returncode == 3, done.stderr
    assert "nowhere.parquet" in done.stdout
    assert "qbrec-failing-1: FAILED, exit code 3" in done.stderr
    found = status(reach, "failing")
    assert (found["status"], found["exit_code"]) == ("FAILED", 3)
    assert "nowhere.parquet" in found["error"]


def test_a_run_is_stopped_with_a_checkpoint_and_goes_on_from_it(
    reach: dict[str, str], shop: Path, tmp_path: Path
) -> None:
    tree = small_config(shop, tmp_path / "storage", name="long")
    tree["fusion"]["train"] |= {"epochs": 5000, "checkpoint_every": 100_000}
    run = Road.write(tmp_path, tree)
    must(end(client(reach, "submit", "--config", run.config, "--no-wait")))
    followed = client(reach, "logs", "long", "--follow")
    wait_for_step(reach, "long", 3)
    second = end(client(reach, "submit", "--config", run.config))
    assert second.returncode == 5
    assert "error: attempt 1 of the run 'long' is RUNNING" in second.stderr

    stopped = must(end(client(reach, "stop", "long")))
    assert "qbrec-long-1 is STOPPED" in stopped
    saved = re.search(r"stage 'fusion' was asked to stop, and saved step (\d+)", stopped)
    assert saved, stopped
    done = end(followed)
    assert done.returncode == 143, done.stderr
    assert "qbrec-long-1: STOPPED, exit code 143" in done.stderr
    assert (run.run_dir / "checkpoints" / "fusion" / f"step-{saved[1]}").is_dir()

    assert (
        "submitted qbrec-long-2 " in end(client(reach, "submit", "--config", run.config, "--no-wait")).stderr
    )
    found = wait_for_step(reach, "long", int(saved[1]) + 1)
    assert (found["attempt"], found["finished"]) == (2, {"catalog": None})
    steps = re.findall(r" step (\d+)/", must(end(client(reach, "logs", "long"))))
    assert int(steps[0]) > int(saved[1]), "it began anew"
    must(end(client(reach, "stop", "long")))
