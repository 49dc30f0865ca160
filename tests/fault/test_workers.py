"""Workers die, freeze or fail under Ray Train and torchrun: they start again, or the driver says why."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fault.checks import assert_equal_end, checkpoint_dir, repeated_steps, whole_checkpoints
from tests.fault.processes import FaultDriver, must
from tests.fault.stage import write_order
from tests.support.faults import FREEZE, FULL, KILL_DRIVER, LOSS, NAN, STEP, WRITE, Fault, plan, struck
from tests.support.ray_nodes import Nodes, ray_nodes
from tests.support.toy_stage import losses

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def cluster() -> Iterator[Nodes]:
    """One node that all tests of this file use."""
    with ray_nodes(cpus=(2,)) as nodes:
        yield nodes


def ray_order(folder: Path, cluster: Nodes, *, max_failures: int = 0, timeout_s: int = 60) -> None:
    write_order(
        folder,
        rows=True,
        launcher="ray",
        num_workers=2,
        ray_address=cluster.address,
        max_failures=max_failures,
        timeout_s=timeout_s,
    )


def processes_of_rank_0(folder: Path) -> int:
    return len({line["pid"] for line in losses(folder)})


def test_a_killed_worker_is_replaced_and_a_killed_driver_resumed(
    cluster: Nodes, pair: Path, tmp_path: Path
) -> None:
    """The workers outlive their driver for a moment, and write nothing into the run of the next one."""
    ray_order(tmp_path, cluster, max_failures=1)
    plan(tmp_path, Fault(LOSS, rank=1, step=8), Fault(STEP, KILL_DRIVER, rank=1, step=13))
    with FaultDriver(tmp_path) as driver:
        assert driver.end() == -signal.SIGKILL, driver.log.read_text()
        assert [mark["rank"] for mark in struck(tmp_path)] == [1, 1], "the fault did not fire"
        before = losses(tmp_path)
        assert len({line["pid"] for line in before}) == 2
        # Steps 7 and 8 are done twice: the last checkpoint was that of step 6.
        assert [line["step"] for line in before][:13] == [*range(1, 9), *range(7, 12)]
        with FaultDriver(tmp_path) as second:
            second.must_succeed()
    taken = losses(tmp_path)
    resumed = [line["step"] for line in taken if line["pid"] == taken[-1]["pid"]]
    assert resumed == list(range(resumed[0], 21))
    assert resumed[0] - 1 >= 12  # the last checkpoint before the driver died, or one its workers still wrote
    assert_equal_end(tmp_path, pair)


def test_a_frozen_worker_is_named_and_replaced(cluster: Nodes, pair: Path, tmp_path: Path) -> None:
    ray_order(tmp_path, cluster, timeout_s=5, max_failures=1)
    plan(tmp_path, Fault(STEP, FREEZE, rank=1, step=8))
    error_file = tmp_path / "run" / "errors" / "toy.json"
    with FaultDriver(tmp_path) as driver:
        # With no start left the driver ends with this error, see tests/ray/test_launch_stop.py; here the next
        # start of the workers removes it.
        while not error_file.exists():
            assert driver.process.poll() is None, driver.log.read_text()
            time.sleep(0.05)
        error = json.loads(error_file.read_text())
        driver.must_succeed()
    (mark,) = struck(tmp_path)
    assert error["what"].startswith("rank 0 at step 8 waited 5 s for other ranks: rank 1 (host ")
    assert f"pid {mark['pid']}) has not been heard of since step " in error["what"]
    assert processes_of_rank_0(tmp_path) == 2
    assert repeated_steps(tmp_path) == 2
    assert_equal_end(tmp_path, pair)


def test_what_a_new_start_cannot_mend_reaches_the_driver(cluster: Nodes, pair: Path, tmp_path: Path) -> None:
    """NaN, then a full disk: no worker tries again, and without the cause the same command goes on."""
    ray_order(tmp_path, cluster, max_failures=2)
    plan(tmp_path, Fault(LOSS, NAN, rank=1, step=8), Fault(WRITE, FULL, rank=1, step=12, file="rows-*"))
    with FaultDriver(tmp_path) as driver:
        assert driver.end() == 1, driver.log.read_text()
        assert "error: the loss of stage 'toy' is nan at step 8\n" in driver.log.read_text()
    assert len(struck(tmp_path)) == 1, "the fault did not fire"
    assert (processes_of_rank_0(tmp_path), len(losses(tmp_path))) == (1, 8)
    assert whole_checkpoints(tmp_path)[-1] == 6
    with FaultDriver(tmp_path) as driver:
        assert driver.end() == 3, driver.log.read_text()
        text = driver.log.read_text()
    assert len(struck(tmp_path)) == 2, "the fault did not fire"
    assert "error: the disk is full\n" in text
    assert f"where: {checkpoint_dir(tmp_path) / 'step-12' / 'rows-'}" in text
    assert processes_of_rank_0(tmp_path) == 2
    assert whole_checkpoints(tmp_path)[-1] == 10
    write_order(tmp_path, rows=True, launcher="torchrun")
    must(tmp_path, world=2)  # Ray's part has been tested above, and takes its time
    assert repeated_steps(tmp_path, at_most=6) == (8 - 6) + (12 - 10)
    assert_equal_end(tmp_path, pair)


def test_torchrun_starts_the_group_again(pair: Path, tmp_path: Path) -> None:
    write_order(tmp_path, rows=True, launcher="torchrun")
    plan(tmp_path, Fault(LOSS, rank=1, step=8))
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "-m")
    # Otherwise all starts share one store, and ranks may find the addresses of their predecessors there.
    with FaultDriver(tmp_path, *launcher, env={"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}) as driver:
        driver.must_succeed()
    assert [mark["rank"] for mark in struck(tmp_path)] == [1], "the fault did not fire"
    assert processes_of_rank_0(tmp_path) == 2
    assert repeated_steps(tmp_path) == 2
    assert_equal_end(tmp_path, pair)
