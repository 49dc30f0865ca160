"""`ray job submit` to a real cluster of two nodes on this machine: cluster/local.sh, token and all."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path

import pytest

from tests.support.cli import ROOT, STAGES, Road, environment, must
from tests.support.processes import free_ports
from tests.support.scrape import scrape

Shell = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Shell]:
    """`cluster/local.sh` with two nodes up; the folder is short because sockets lie below it."""
    folder = tempfile.mkdtemp(prefix="qb-")
    env = environment(
        {
            "QBREC_CLUSTER_DIR": folder,
            "QBREC_CLUSTER_PORT": str(free_ports(40, first=28_000, end=32_000)),
            "QBREC_VENV": str(Path(sys.executable).parents[1]),
        }
    )

    def shell(*args: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(ROOT / "cluster" / "local.sh"), *args]
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)

    try:
        must(shell("up", "2"))
        yield shell
    finally:
        must(shell("down"))
        left = [p for p in Path("/proc").glob("[0-9]*/cmdline") if folder.encode() in _read(p)]
        shutil.rmtree(folder, ignore_errors=True)
        assert not left, f"`down` left processes behind: {left}"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_two_nodes_are_up_and_want_the_token(cluster: Shell) -> None:
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


def test_a_second_cluster_is_refused(cluster: Shell) -> None:
    again = cluster("up", "2")
    assert again.returncode == 5
    assert "already runs" in again.stderr


def test_a_submitted_run_succeeds_with_the_same_metrics_and_is_seen_by_prometheus(
    cluster: Shell, road: Road, tmp_path: Path
) -> None:
    tree = deepcopy(road.tree)
    tree["run"] = {"name": "submitted", "storage": str(tmp_path / "storage")}
    run = Road.write(tmp_path, tree)
    # The driver runs on the head, whose metrics port is the 16th of the cluster's.
    port = int(must(cluster("env")).split("RAY_ADDRESS=127.0.0.1:")[1].split()[0]) + 15
    seen: set[tuple[str, str]] = set()
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(
            cluster,
            "submit", "--working-dir", ".", "--runtime-env", "launch/runtime_env.yaml",
            "--", "python", "-m", "qbrec", "run", "--config", str(run.config),
        )  # fmt: skip
        while not job.done():
            seen |= {(name, labels["stage"]) for name, labels, _ in scrape(port, run="submitted")}
            time.sleep(1)
    assert "succeeded" in must(job.result())
    assert run.metrics() == road.metrics()
    assert "ray_qbrec_loss" in {name for name, _ in seen}
    assert {stage for _, stage in seen} <= set(STAGES)
