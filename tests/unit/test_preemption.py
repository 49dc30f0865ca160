"""SIGTERM between two steps: a checkpoint at that very step, and a run that goes on as if undisturbed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qbrec.config import load_config
from qbrec.engine import preemption
from qbrec.engine.launch import check_workers
from qbrec.engine.preemption import DriverStop, StopRequest, has_mark, leave_mark, stop_on_sigterm
from qbrec.errors import CollectiveError, DataError, LaunchError, Preempted
from tests.support.ray_nodes import free_ports
from tests.support.toy_driver import Driver, assert_same_training
from tests.support.toy_stage import change_drill, checkpoints, losses, write_order

STEPS = 20
COMPUTE = {"launcher": "auto", "timeout_s": 60}


def terminate() -> None:
    signal.raise_signal(signal.SIGTERM)


@pytest.fixture(autouse=True)
def handler() -> Iterator[list[int]]:
    """Signals that nobody in the code under test took."""
    taken: list[int] = []
    earlier = signal.signal(signal.SIGTERM, lambda number, _: taken.append(number))
    yield taken
    signal.signal(signal.SIGTERM, earlier)


def test_a_signal_is_heard_and_the_handler_given_back(tmp_path: Path, handler: list[int]) -> None:
    def train() -> None:
        with StopRequest(tmp_path, None) as stop:
            assert not stop
            terminate()
            assert stop
            raise Preempted("stopped")

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match=r"^stopped$"):
        train()
    assert signal.getsignal(signal.SIGTERM) is before
    assert handler == []
    with StopRequest(tmp_path, None) as stop:
        assert not stop  # what was obeyed is over


def test_a_signal_after_the_last_look_is_not_lost(tmp_path: Path, handler: list[int]) -> None:
    with StopRequest(tmp_path, None):
        terminate()
    assert handler == [signal.SIGTERM]


def test_a_mark_is_for_the_workers_of_its_driver_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preemption, "_LOOK_EVERY_S", 0.0)
    leave_mark(tmp_path, "earlier")
    with StopRequest(tmp_path, "mine") as stop, StopRequest(tmp_path, None) as alone:
        assert not stop
        leave_mark(tmp_path, "mine")
        assert stop
        assert not alone
    assert has_mark(tmp_path, "mine")
    assert not has_mark(tmp_path, "")


def test_looking_costs_the_file_system_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[Path] = []
    monkeypatch.setattr(preemption, "has_mark", lambda path, _: bool(looks.append(path)))
    with StopRequest(tmp_path, "mine") as stop:
        start = time.monotonic()
        while time.monotonic() - start < 1.5:
            assert not stop
    assert len(looks) == 2


def test_a_driver_waits_for_workers_that_listen(tmp_path: Path) -> None:
    report: list[Preempted] = []

    def work() -> None:
        with StopRequest(tmp_path, "me") as stop:
            listening.set()
            while not stop:
                time.sleep(0.05)
            time.sleep(0.5)  # the checkpoint
        report.append(Preempted("checkpoint of step 7"))

    listening = threading.Event()
    worker = threading.Thread(target=work)

    def drive() -> None:
        with driver_stop(tmp_path, report=report, grace_s=20):
            worker.start()
            assert listening.wait(5)
            terminate()

    with pytest.raises(Preempted, match="checkpoint of step 7"):
        drive()
    worker.join()


@pytest.mark.parametrize("listening", [False, True])
def test_a_driver_does_not_wait_for_ever(tmp_path: Path, listening: bool) -> None:
    def drive() -> None:
        with driver_stop(tmp_path, report=[], grace_s=4):
            if listening:
                (tmp_path / preemption.LISTENING).write_text("me")
            terminate()

    start = time.monotonic()
    with pytest.raises(Preempted, match="before its workers"):
        drive()
    seconds = time.monotonic() - start
    # Where nobody listens, nobody has anything to save.
    assert 4 <= seconds < 10 if listening else seconds < 4


def test_a_mangled_error_comes_out_as_what_it_was(tmp_path: Path) -> None:
    def native() -> None:
        try:
            terminate()
        except Preempted as error:
            raise SystemError("returned a result with an exception set") from error

    with pytest.raises(Preempted), driver_stop(tmp_path, report=[], grace_s=0.1):
        native()
    with pytest.raises(Preempted), stop_on_sigterm():
        native()


def driver_stop(run_dir: Path, *, report: list[Preempted], grace_s: float) -> DriverStop:
    return DriverStop(
        run_dir, "me", stage="toy", grace_s=grace_s, report=lambda: report[0] if report else None
    )


def test_between_stages_a_signal_ends_the_run() -> None:
    with pytest.raises(Preempted, match="SIGTERM") as caught, stop_on_sigterm():
        terminate()
    assert (caught.value.exit_code, caught.value.retry) == (143, True)


def test_errors_say_whether_another_try_helps() -> None:
    assert not DataError("").retry
    assert not LaunchError("").retry
    assert CollectiveError("").retry


def test_the_run_in_this_process_resumes_bit_for_bit(tmp_path: Path) -> None:
    stopped_and_resumed(tmp_path)


@pytest.mark.slow
@pytest.mark.dist
def test_ranks_of_torchrun_resume_bit_for_bit(tmp_path: Path) -> None:
    stopped_and_resumed(tmp_path, "torch.distributed.run", "--nproc-per-node", "2", "-m")


def stopped_and_resumed(folder: Path, *launcher: str) -> None:
    """SIGTERM in mid-training, to torchrun's agent where there is one; then the same command again."""
    if launcher:
        launcher = (
            *launcher[:1],
            "--master-port",
            str(free_ports(1, first=20_000, end=21_900)),
            *launcher[1:],
        )
    undisturbed, stopped = folder / "undisturbed", folder / "stopped"
    for where in (undisturbed, stopped):
        write_order(where, COMPUTE, checkpoint_every=1000, seconds=0.3 if where is stopped else 0.0)
    with Driver(undisturbed, *launcher) as driver:
        driver.must_succeed()
    with Driver(stopped, *launcher) as driver:
        driver.wait_for_step(4)
        driver.ask_to_stop()
        code, text = driver.end(), driver.log.read_text()
        last = losses(stopped)[-1]["step"]
        assert 4 <= last < STEPS, "the fault did not fire"
        assert checkpoints(stopped) == [last]
        assert f"was asked to stop, and saved step {last}" in text
        if not launcher:  # torchrun has an exit code of its own
            assert code == 143
        assert code != 0
    change_drill(stopped, seconds=0.0)
    with Driver(stopped, *launcher) as driver:
        driver.must_succeed()
    assert [line["step"] for line in losses(stopped)] == list(range(1, STEPS + 1))
    assert_same_training(stopped, undisturbed, exact=True)


@pytest.mark.parametrize(
    ("workers", "launcher", "world", "fits"),
    [
        ("[1,4]", "inprocess", "1", True),
        ("[2,4]", "inprocess", "1", False),
        ("2", "inprocess", "1", False),
        ("[2,4]", "torchrun", "3", True),
        ("[2,4]", "torchrun", "5", False),
        ("1", "torchrun", "5", True),  # torchrun alone says how many
    ],
)
def test_a_range_of_workers_without_ray(
    workers: str, launcher: str, world: str, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", world)
    compute = load_config(overrides=[f"compute.num_workers={workers}"]).compute
    if fits:
        check_workers(compute, launcher)
        return
    with pytest.raises(LaunchError, match=r"compute\.num_workers"):
        check_workers(compute, launcher)


def test_a_driver_killed_by_ctrl_c_or_sigterm_before_ray_keeps_its_exit_code(tmp_path: Path) -> None:
    """`ray.init` would make SIGTERM end the process with exit code 15."""
    code = (
        "import os, signal, sys\n"
        "from qbrec.engine.preemption import stop_on_sigterm\n"
        "from qbrec.engine.ray_session import ensure_ray\n"
        "from qbrec.config.sections import ComputeConfig\n"
        "from qbrec.errors import Preempted\n"
        "try:\n"
        "    with stop_on_sigterm():\n"
        "        ensure_ray(ComputeConfig())\n"
        "        signal.raise_signal(signal.SIGTERM)\n"
        "except Preempted as error:\n"
        "    sys.exit(error.exit_code)\n"
    )
    env = {**os.environ, "TMPDIR": "/tmp"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 143, done.stderr
