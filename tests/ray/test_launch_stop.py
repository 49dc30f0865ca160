"""Ray's workers and their driver are told to stop, or stall: nothing is lost, and the driver says why."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.support.toy_driver import Driver, assert_same_training
from tests.support.toy_stage import change_drill, checkpoints, losses, write_order

pytestmark = [pytest.mark.slow, pytest.mark.ray]
COMPUTE = {"launcher": "ray", "num_workers": 2, "timeout_s": 60, "max_failures": 0}
STEPS = 20


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    write_order(folder, COMPUTE, checkpoint_every=1000)
    with Driver(folder) as driver:
        driver.must_succeed()
    assert not list((folder / "run").glob("heartbeats/toy/*"))
    return folder


def test_a_driver_told_to_stop_waits_for_the_checkpoint(undisturbed: Path, tmp_path: Path) -> None:
    # With failures allowed Ray would start the workers again: the driver has to end that as well.
    write_order(tmp_path, {**COMPUTE, "max_failures": 2}, checkpoint_every=1000, seconds=0.5)
    with Driver(tmp_path) as driver:
        driver.wait_for_step(4)
        driver.ask_to_stop()
        assert driver.end() == 143, driver.log.read_text()
        last = losses(tmp_path)[-1]["step"]
        assert 4 <= last < STEPS
        assert checkpoints(tmp_path) == [last]
        assert f"saved step {last}" in driver.log.read_text()
    change_drill(tmp_path, seconds=0.0)
    with Driver(tmp_path) as driver:  # the earlier driver's mark is not meant for this one
        driver.must_succeed()
    assert [line["step"] for line in losses(tmp_path)] == list(range(1, STEPS + 1))
    assert_same_training(tmp_path, undisturbed, exact=True)


def test_a_worker_told_to_stop_is_restarted_and_no_step_is_lost(undisturbed: Path, tmp_path: Path) -> None:
    """`max_failures` is 0: a stop request is not a failure."""
    write_order(tmp_path, COMPUTE, checkpoint_every=1000, seconds=0.5)
    with Driver(tmp_path) as driver:
        worker = driver.wait_for_step(4)["pid"]
        os.kill(worker, signal.SIGTERM)
        driver.must_succeed()
    taken = losses(tmp_path)
    assert len({line["pid"] for line in taken}) == 2, "the fault did not fire"
    assert [line["step"] for line in taken] == list(range(1, STEPS + 1))
    assert_same_training(tmp_path, undisturbed, exact=True)


def test_a_stalled_worker_is_named_and_the_group_started_again(undisturbed: Path, tmp_path: Path) -> None:
    compute = {**COMPUTE, "timeout_s": 5}
    write_order(tmp_path, compute, stall=[1, 7])
    with Driver(tmp_path) as driver:
        assert driver.end() == 5, driver.log.read_text()
        text = driver.log.read_text()
        assert (tmp_path / "stalled").exists(), "the fault did not fire"
        assert "rank 0 at step 7 waited 5 s for other ranks: rank 1 (host " in text
        assert "has been in step " in text
    (tmp_path / "stalled").unlink()
    write_order(tmp_path, {**compute, "max_failures": 1}, stall=[1, 15])
    with Driver(tmp_path) as driver:
        driver.must_succeed()
        assert (tmp_path / "stalled").exists(), "the fault did not fire"
    assert_same_training(tmp_path, undisturbed, exact=True)


def test_workers_that_do_not_see_the_run_directory_say_so(tmp_path: Path) -> None:
    write_order(tmp_path, COMPUTE)
    change_drill(tmp_path, hidden=True)
    with Driver(tmp_path) as driver:
        assert driver.end() == 5, driver.log.read_text()
        text = driver.log.read_text()
    assert "a worker does not see the run directory" in text
    assert f"{tmp_path / 'run'} on {os.uname().nodename}" in text
