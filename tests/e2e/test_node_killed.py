"""A node of a real cluster dies in mid-training of a submitted run."""

from __future__ import annotations

import os
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path

from tests.support.cli import Road, must
from tests.support.local_cluster import LocalCluster, local_cluster


def _freeze_a_worker(cluster: LocalCluster, checkpoints: Path, *, step: int) -> int:
    """Wait for a checkpoint of this step or a later one, then stop a training worker in mid-step.

    Returns its node (never the head).
    """
    deadline = time.monotonic() + 600
    # A checkpoint exists once its manifest does.
    while not any(int(path.parent.name[5:]) >= step for path in checkpoints.glob("step-*/manifest.json")):
        assert time.monotonic() < deadline, f"no checkpoint in {checkpoints}"
        time.sleep(0.01)
    workers = {pid: node for pid, node in cluster.processes(b"RayTrainWorker").items() if node != 0}
    assert workers, "both workers are on the head"
    pid, node = workers.popitem()
    os.kill(pid, signal.SIGSTOP)
    return node


def test_three_nodes_one_dies_and_the_metrics_are_those_of_an_undisturbed_run(
    road: Road, tmp_path: Path
) -> None:
    tree = deepcopy(road.tree)
    tree["run"] = {"name": "killed", "storage": str(tmp_path / "storage")}
    run = Road.write(tmp_path, tree)
    with local_cluster(3) as cluster, ThreadPoolExecutor(1) as pool:
        job = pool.submit(cluster.submit_run, run.config)
        node = _freeze_a_worker(cluster, run.run_dir / "checkpoints" / "fusion", step=4)
        assert "fusion" not in run.stages(), "it had finished"
        must(cluster("kill", str(node)))
        assert f"n{node}: gone" in cluster("status").stdout
        log = must(job.result())
    assert "succeeded" in log
    again = re.search(r"fusion: goes on from (\d+) of (\d+)", log)
    assert again, log
    assert 4 <= int(again[1]) < int(again[2])
    assert run.metrics() == road.metrics()
