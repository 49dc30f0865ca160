"""Runs on disk: one owner at a time, one configuration per name."""

from __future__ import annotations

from pathlib import Path

import pytest

from qbrec.config import RootConfig, load_config
from qbrec.errors import ConfigError, LaunchError
from qbrec.run_record import RunRecord, run_directory


def _config(storage: Path, *overrides: str) -> RootConfig:
    return load_config(overrides=[f"run.storage={storage}", *overrides])


def test_a_name_in_use_with_another_configuration_is_refused(tmp_path: Path) -> None:
    RunRecord.own(_config(tmp_path), resume="auto").close()
    with pytest.raises(ConfigError, match="in use with another configuration") as caught:
        RunRecord.own(_config(tmp_path, "fusion.depth=1"), resume="auto")
    assert caught.value.exit_code == 2
    # Where and how wide it runs does not make another run.
    RunRecord.own(_config(tmp_path, "compute.num_workers=7", "tracking.enabled=false"), resume="auto").close()


def test_resume_must_and_never(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run to resume"):
        RunRecord.own(_config(tmp_path), resume="must")
    RunRecord.own(_config(tmp_path), resume="never").close()
    with pytest.raises(ConfigError, match="exists already"):
        RunRecord.own(_config(tmp_path), resume="never")


def test_a_run_has_one_owner(tmp_path: Path) -> None:
    record = RunRecord.own(_config(tmp_path), resume="auto")
    with pytest.raises(LaunchError, match="another process"):
        RunRecord.own(_config(tmp_path), resume="auto")
    record.stages["catalog"] = {"key": "k", "path": "p", "seconds": 1.0}
    record.save()
    record.close()
    assert RunRecord.load(run_directory(_config(tmp_path))).stages["catalog"]["key"] == "k"
