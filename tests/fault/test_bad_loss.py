"""A loss that is NaN on one rank stops all of them; without the cause the same command goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fault.checks import assert_equal_end, repeated_steps, whole_checkpoints
from tests.fault.processes import attempt, must
from tests.fault.stage import write_order
from tests.support.faults import LOSS, NAN, Fault, plan, struck
from tests.support.toy_stage import losses


@pytest.mark.parametrize("rows", [False, True], ids=["module", "module-and-rows"])
def test_nan_on_one_rank_stops_all(rows: bool, tmp_path: Path) -> None:
    quiet, folder = tmp_path / "quiet", tmp_path / "bad"
    for where in (quiet, folder):
        write_order(where, rows=rows, launcher="torchrun")
    must(quiet, world=2)
    plan(folder, Fault(LOSS, NAN, rank=1, step=8))
    codes, text = attempt(folder, world=2)
    assert [mark["rank"] for mark in struck(folder)] == [1], "the fault did not fire"
    assert codes == [1, 1], text
    # Both ranks say it: nobody waits for a rank that has left.
    assert text.count("error: the loss of stage 'toy' is nan at step 8\n") == 2
    assert text.count("earlier checkpoints are kept") == 2
    assert [line["step"] for line in losses(folder)] == list(range(1, 9))
    assert whole_checkpoints(folder)[-1] == 6
    must(folder, world=2)
    assert repeated_steps(folder) == 2
    assert_equal_end(folder, quiet)
