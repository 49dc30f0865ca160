"""A rank that stalls, freezes or dies is named by the others."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from qbrec.config.sections import ComputeConfig
from qbrec.engine.context import StageContext
from qbrec.engine.heartbeat import Heartbeat, heartbeat_folder, last_heard, watch_collectives
from qbrec.errors import CollectiveError
from qbrec.storage.artifact import ArtifactStore

STAGE, TIMEOUT_S, FAULT_STEP = "pretrain", 4, 5


def context(folder: Path, *, rank: int = 0, world: int = 2) -> StageContext:
    return StageContext(
        store=ArtifactStore(folder),
        run_dir=folder,
        stage=STAGE,
        key="0" * 64,
        seed=0,
        rank=rank,
        world=world,
        compute=ComputeConfig(timeout_s=TIMEOUT_S),
    )


def freeze() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def sleep() -> None:
    time.sleep(60)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _rank(rank: int, folder: Path, fault: Callable[[], None], own_group: bool, pipe: Connection) -> None:
    torch.set_num_threads(1)
    # A group of the world with another time-out, as DeepSpeed makes one.
    wide = timedelta(seconds=TIMEOUT_S if not own_group else 600)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=wide
    )
    group = dist.new_group([0, 1]) if own_group else None
    try:
        with Heartbeat(context(folder, rank=rank)) as heartbeat, watch_collectives(heartbeat):
            for step in range(1000):
                heartbeat.beat(step)
                if rank == 1 and step == FAULT_STEP:
                    pipe.send("fault")
                    fault()
                dist.all_reduce(torch.ones(1), group=group)
    except CollectiveError as error:
        pipe.send(str(error))
    os._exit(0)


def failure(folder: Path, fault: Callable[[], None], *, own_group: bool = False) -> tuple[str, int, float]:
    """Message of rank 0, process of rank 1, seconds between the fault and the message."""
    spawn = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    try:
        for rank in (0, 1):
            here, there = spawn.Pipe()
            process = spawn.Process(target=_rank, args=(rank, folder, fault, own_group, there))
            process.start()
            pipes.append(here)
            processes.append(process)
        assert pipes[1].poll(120)
        assert pipes[1].recv() == "fault"
        start = time.monotonic()
        assert pipes[0].poll(60), "rank 0 never gave up"
        return pipes[0].recv(), int(processes[1].pid or 0), time.monotonic() - start
    finally:
        for process in processes:
            process.kill()
            process.join()


@pytest.mark.dist
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (sleep, rf"waited {TIMEOUT_S} s for .* has been in step {FAULT_STEP} \(training\) for"),
        (freeze, rf"waited {TIMEOUT_S} s for .* has not been heard of since step \d+ \(\w+\)"),
        (die, r"lost the connection to .* is gone since step"),
    ],
    ids=["sleep", "freeze", "die"],
)
def test_the_rank_to_blame_is_named(tmp_path: Path, fault: Callable[[], None], says: str) -> None:
    message, pid, seconds = failure(tmp_path, fault)
    assert re.search(says, message), message
    assert f"rank 1 (host {socket.gethostname()}, pid {pid})" in message
    assert f"rank 0 at step {FAULT_STEP}" in message
    assert (seconds >= TIMEOUT_S) == (fault is not die)
    assert seconds < 2 * TIMEOUT_S + 10


@pytest.mark.dist
def test_groups_made_by_others_get_the_same_timeout(tmp_path: Path) -> None:
    message, _, seconds = failure(tmp_path, sleep, own_group=True)
    assert f"waited {TIMEOUT_S} s" in message
    assert TIMEOUT_S <= seconds < 60  # torch's own default is half an hour


def test_errors_about_nobody_else_pass(tmp_path: Path) -> None:
    for world, error in ((2, RuntimeError("mat1 and mat2 shapes cannot be multiplied")), (1, _timeout())):
        with (
            pytest.raises(RuntimeError) as caught,
            Heartbeat(context(tmp_path, world=world)) as heartbeat,
            watch_collectives(heartbeat),
        ):
            raise error
        assert caught.value is error


def test_a_beat_is_there_while_training_and_gone_after_it(tmp_path: Path) -> None:
    file = heartbeat_folder(tmp_path, STAGE) / "rank-1.json"
    heartbeat = Heartbeat(context(tmp_path, rank=1))
    heartbeat._timed = True  # no process group here
    with heartbeat:
        seen: list[dict[str, Any]] = []
        for step in range(300):
            heartbeat.beat(step, phase="evaluation")
            beat = json.loads(file.read_text())
            if not seen or beat != seen[-1]:
                seen.append(beat)
            time.sleep(0.01)
        assert 3 <= len(seen) <= 5  # about one a second, however many steps
        assert seen[-1]["phase"] == "evaluation"
        assert seen[-1]["step"] > 100
        assert (seen[-1]["pid"], seen[-1]["rank"]) == (os.getpid(), 1)
        assert f"pid {os.getpid()}" in last_heard(tmp_path, STAGE)
    assert not heartbeat_folder(tmp_path, STAGE).exists()
    assert last_heard(tmp_path, STAGE) == ""


def test_beats_of_a_larger_group_are_forgotten(tmp_path: Path) -> None:
    folder = heartbeat_folder(tmp_path, STAGE)
    folder.mkdir(parents=True)
    (folder / "rank-7.json").write_text("{}")
    with Heartbeat(context(tmp_path)):
        assert sorted(path.name for path in folder.iterdir()) == ["rank-0.json"]


def _timeout() -> RuntimeError:
    return RuntimeError("Timed out waiting 4000ms for recv operation to complete")
