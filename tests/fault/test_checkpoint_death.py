"""`kill -9` at every point of a checkpoint's life: the last good one survives, the end is the same."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.fault.checks import (
    assert_equal_end,
    checkpoint_dir,
    repeated_steps,
    tensors,
    whole_checkpoints,
)
from tests.fault.processes import attempt, must, must_die
from tests.fault.stage import CHECKPOINT_EVERY, write_order
from tests.support.faults import (
    LOSSES,
    PREPARE,
    PREPARED,
    REMOVE,
    REMOVED_HALF,
    RENAME,
    RENAMED,
    SYNC,
    WRITE,
    Fault,
    plan,
    reads,
    struck,
)
from tests.support.toy_driver import assert_same_training
from tests.support.toy_stage import losses

ROWS_0, ROWS_LAST = "rows-000000000000.safetensors", "rows-000000000039.safetensors"
# The checkpoint of step 9 is written while those of steps 3, 5 (the best) and 6 lie there; then 3 is removed.
# By point: the fault, and the newest step that is safe when it strikes.
POINTS = {
    "before-prepare": (Fault(PREPARE, step=9), 6),
    "after-prepare": (Fault(PREPARED, step=9), 6),
    "in-the-first-rows-file": (Fault(WRITE, step=9, file=ROWS_0), 6),
    "before-a-rows-file-has-its-name": (Fault(RENAME, step=9, file=ROWS_0), 6),
    "after-the-last-rows-file": (Fault(RENAMED, step=9, file=ROWS_LAST), 6),
    "in-the-weights": (Fault(WRITE, step=9, file="weights.safetensors"), 6),
    "after-the-weights": (Fault(RENAMED, step=9, file="weights.safetensors"), 6),
    "before-the-moments-are-on-disk": (Fault(SYNC, step=9, file="moments.safetensors"), 6),
    "after-the-moments": (Fault(RENAMED, step=9, file="moments.safetensors"), 6),
    "in-the-manifest": (Fault(WRITE, step=9, file="manifest.json"), 6),
    "before-the-manifest-has-its-name": (Fault(RENAME, step=9, file="manifest.json"), 6),
    "after-the-manifest": (Fault(RENAMED, step=9, file="manifest.json"), 9),
    "before-the-old-one-is-removed": (Fault(REMOVE, step=3), 9),
    "when-half-of-the-old-one-is-removed": (Fault(REMOVED_HALF, step=3), 9),
    "in-the-very-last-one": (Fault(RENAME, step=20, file="manifest.json"), 18),
}


def resumed_at(folder: Path) -> int:
    """Steps that the last process found done."""
    taken = losses(folder)
    return int(next(line["step"] for line in taken if line["pid"] == taken[-1]["pid"])) - 1


def assert_only_whole_ones_were_read(folder: Path, whole: list[int], *, since: int) -> None:
    """Of what lay there after a death only what was whole was opened."""
    opened = {int(path.name.removeprefix("step-")) for path in reads(folder)[since:]}
    at_resume = {step for step in opened if step <= max(whole)}
    assert at_resume <= set(whole)
    assert max(whole) in opened


@pytest.mark.parametrize("point", POINTS)
def test_a_death_while_saving_costs_no_checkpoint(point: str, alone: Path, tmp_path: Path) -> None:
    fault, safe = POINTS[point]
    write_order(tmp_path, rows=True)
    plan(tmp_path, fault)
    must_die(tmp_path)
    assert [mark["event"] for mark in struck(tmp_path)] == [fault.event]
    whole = whole_checkpoints(tmp_path)
    assert whole[-1] == safe
    before = len(reads(tmp_path))
    must(tmp_path)
    assert_only_whole_ones_were_read(tmp_path, whole, since=before)
    done = 20 if fault.step == 20 else 9
    assert repeated_steps(tmp_path) == done - safe
    if safe < done:
        assert resumed_at(tmp_path) == safe
    assert_equal_end(tmp_path, alone)


def test_deaths_in_the_clean_up_of_an_earlier_death(alone: Path, tmp_path: Path) -> None:
    write_order(tmp_path, rows=True)
    half = Fault(RENAMED, step=9, file="weights.safetensors")
    plan(tmp_path, half, Fault(REMOVED_HALF, step=9, file="*.old"), Fault(PREPARED, step=9))
    for died in range(1, 4):
        must_die(tmp_path)
        assert len(struck(tmp_path)) == died
        assert whole_checkpoints(tmp_path)[-1] == 6
    must(tmp_path)
    assert_equal_end(tmp_path, alone)


PAIR_POINTS = {
    "one-is-in-its-rows": (Fault(WRITE, rank=1, step=9, file=ROWS_LAST), 6),
    "one-has-its-rows-written": (Fault(RENAMED, rank=1, step=9, file=ROWS_LAST), 6),
    "zero-is-before-the-manifest": (Fault(RENAME, rank=0, step=9, file="manifest.json"), 6),
    "zero-has-written-the-manifest": (Fault(RENAMED, rank=0, step=9, file="manifest.json"), 9),
}


@pytest.mark.parametrize("point", PAIR_POINTS)
def test_a_rank_dies_between_rows_and_manifest(point: str, pair: Path, tmp_path: Path) -> None:
    """The other one says which is gone; the same command goes on from the last checkpoint of both."""
    fault, safe = PAIR_POINTS[point]
    write_order(tmp_path, rows=True, launcher="torchrun")
    plan(tmp_path, fault)
    codes, text = attempt(tmp_path, world=2)
    assert codes[fault.rank] == -signal.SIGKILL, f"the fault did not fire\n{text}"
    assert len(struck(tmp_path)) == 1
    assert codes[1 - fault.rank] == 5, text
    assert f"lost the connection to other ranks: rank {fault.rank} (host " in text
    assert "the same command goes on from the last checkpoint" in text
    assert whole_checkpoints(tmp_path)[-1] == safe
    must(tmp_path, world=2)
    assert repeated_steps(tmp_path) == 9 - safe
    assert_equal_end(tmp_path, pair)


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_a_damaged_checkpoint_is_passed_over_and_written_anew(alone: Path, tmp_path: Path) -> None:
    write_order(tmp_path, rows=True)
    plan(tmp_path, Fault(PREPARE, step=10))
    must_die(tmp_path)
    assert struck(tmp_path)
    flip_a_bit(checkpoint_dir(tmp_path) / "step-9" / ROWS_0)
    assert whole_checkpoints(tmp_path) == [5, 6]
    must(tmp_path)
    assert repeated_steps(tmp_path, at_most=2 * CHECKPOINT_EVERY) == 10 - 6
    assert_equal_end(tmp_path, alone)


def test_a_damaged_best_checkpoint_is_written_anew(alone: Path, tmp_path: Path) -> None:
    """It is never the newest again, but the end takes its weights."""
    write_order(tmp_path, rows=True)
    plan(tmp_path, Fault(PREPARE, step=6))
    must_die(tmp_path)
    assert struck(tmp_path)
    flip_a_bit(checkpoint_dir(tmp_path) / "step-5" / "weights.safetensors")
    assert whole_checkpoints(tmp_path) == [3]
    must(tmp_path)
    assert_equal_end(tmp_path, alone)


def test_checkpoints_of_another_configuration_do_not_stand_in_for_ours(alone: Path, tmp_path: Path) -> None:
    """Nor do newer ones among them push ours out."""
    write_order(tmp_path, rows=True, seed=1, key="cd" * 32)
    plan(tmp_path, Fault(PREPARE, step=10))
    must_die(tmp_path)
    (tmp_path / "run" / LOSSES).unlink()
    write_order(tmp_path, rows=True)
    plan(tmp_path, Fault(PREPARE, step=6))
    must_die(tmp_path)
    assert struck(tmp_path)
    must(tmp_path)
    assert resumed_at(tmp_path) == 5
    assert repeated_steps(tmp_path) == 6 - 5
    assert_same_training(tmp_path, alone, exact=True)
    ours, theirs = tensors(tmp_path), tensors(alone)
    assert {name: ours[name] for name in theirs} == theirs
