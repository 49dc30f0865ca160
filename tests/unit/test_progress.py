"""Lines of progress, here and through a file that another process draws."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from qbrec.engine.progress import Progress, ProgressWatcher, read_line


def test_a_line_says_what_it_was_made_of() -> None:
    progress = Progress(400, "fusion", silent=True, done=100)
    progress.update(20, loss=4.25, step="120/400")
    found = read_line(progress.line())
    assert found is not None
    assert (found.label, found.share) == ("fusion", 0.3)
    assert found.info == {"loss": "4.25", "step": "120/400"}


def test_work_that_goes_on_says_from_where(capfd: pytest.CaptureFixture[str]) -> None:
    with Progress(10, "fusion", done=4) as progress:
        progress.update(6)
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "  fusion: goes on from 4 of 10"
    assert "100%" in lines[-1]
    assert sum("goes on" in line for line in lines) == 1


def test_the_driver_hears_of_every_start(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Also where a worker that was started again goes on from the same checkpoint as before."""
    file, shown = tmp_path / "fusion.json", ""
    with ProgressWatcher(file, period_s=0.0):
        for start, done in enumerate((0, 4, 4, 0)):
            with Progress(10, "fusion", file=file, done=done) as progress:
                progress.update(1, start=f"no. {start}")
            deadline = time.monotonic() + 60
            while f"no. {start}" not in shown:
                assert time.monotonic() < deadline, shown
                shown += capfd.readouterr().err
                time.sleep(0.01)
    assert re.findall(r"goes on from (\d+) of 10", shown) == ["4", "4"]


def test_a_log_has_few_lines_and_every_note(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Resumed work that is over soon is followed by other work that writes over its file."""
    file = tmp_path / "fusion.json"
    with ProgressWatcher(file, period_s=60.0):
        with Progress(16, "fusion", file=file, done=4) as progress:
            for _ in range(12):
                progress.update(1)
                time.sleep(0.1)
        with Progress(1, "embed items", file=file) as progress:
            progress.update(1)
    shown = capfd.readouterr().err
    assert shown.count("fusion: goes on from 4 of 16") == 1
    assert shown.count("%") <= 4


def test_the_driver_draws_the_end_once_in_a_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file, shown = tmp_path / "fusion.json", ""
    with ProgressWatcher(file, period_s=0.0), Progress(2, "fusion", file=file) as progress:
        progress.update(1)
        deadline = time.monotonic() + 60
        while "50%" not in shown:
            assert time.monotonic() < deadline
            shown += capfd.readouterr().err
            time.sleep(0.01)
        time.sleep(0.6)  # the file is written twice a second
        progress.update(1)
        time.sleep(0.6)
    shown += capfd.readouterr().err
    assert re.findall(r"(\d+)%", shown) == ["50", "100"]


def test_nothing_to_do_is_all_done() -> None:
    """A rank that has no shard of its own embeds nothing."""
    assert "100%" in Progress(0, "embed items", silent=True).line()


def test_a_log_is_told_of_the_end_once(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("qbrec.engine.progress._LOG_PERIOD_S", 0.0)
    with Progress(2, "embed items") as progress:
        progress.update(1)
        progress.update(1)
        progress.update(0)
    assert re.findall(r"(\d+)%", capfd.readouterr().err) == ["50", "100"]
