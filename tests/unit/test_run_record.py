"""Runs on disk: one owner at a time, one configuration per name."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

import pytest

from qbrec.config import RootConfig, load_config
from qbrec.engine.checkpoint import Checkpoints, Snapshot
from qbrec.engine.context import StageContext
from qbrec.errors import ConfigError, LaunchError
from qbrec.run_record import RunRecord, run_directory
from qbrec.storage.artifact import ArtifactStore


def _config(storage: Path, *overrides: str) -> RootConfig:
    return load_config(overrides=[f"run.storage={storage}", *overrides])


def test_a_name_in_use_with_another_configuration_is_refused(tmp_path: Path) -> None:
    RunRecord.own(_config(tmp_path), resume="auto").close()
    with pytest.raises(ConfigError, match="in use with another configuration") as caught:
        RunRecord.own(_config(tmp_path, "fusion.depth=1"), resume="auto")
    assert caught.value.exit_code == 2
    assert "fusion.depth is 3 there, 1 here" in caught.value.what
    many = ("fusion.heads=2", "fusion.width=64", "sequence.width=32", "sequence.layers=1", "run.seed=7")
    with pytest.raises(ConfigError, match="; and 1 more"):
        RunRecord.own(_config(tmp_path, *many), resume="auto")
    # Where and how wide it runs does not make another run.
    RunRecord.own(_config(tmp_path, "compute.num_workers=7", "tracking.enabled=false"), resume="auto").close()
    # Nor does what a version must show before it may serve.
    gate = "registry.gate.min_metrics={ndcg@10: 0.1}"
    RunRecord.own(_config(tmp_path, gate, "registry.model_name=shop"), resume="auto").close()


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


def test_the_time_of_attempts_adds_up_until_the_stage_is_done(tmp_path: Path) -> None:
    def attempt(key: str, *, fails: bool) -> float:
        record = RunRecord.own(_config(tmp_path), resume="auto")
        begin = time.monotonic()
        with suppress(InterruptedError), record.timed("fusion", key):
            time.sleep(0.15)
            if fails:
                raise InterruptedError
        spent = time.monotonic() - begin
        if not fails:
            record.complete("fusion", key=key, path=tmp_path)
        record.close()
        return spent

    def noted(kind: str = "stages") -> float:
        record = RunRecord.load(run_directory(_config(tmp_path)))
        return float(getattr(record, kind)["fusion"]["seconds"])

    rounding = 0.051  # once per attempt
    spent = attempt("a", fails=True)
    assert 0.15 - rounding <= noted("attempts") <= spent + rounding
    spent += attempt("a", fails=True) + attempt("a", fails=False)
    assert 0.45 - 3 * rounding <= noted() <= spent + 3 * rounding
    assert "fusion" not in RunRecord.load(run_directory(_config(tmp_path))).attempts
    spent = attempt("a", fails=False)  # made anew: what it took before is none of this one's
    assert 0.15 - rounding <= noted() <= spent + rounding
    attempt("b", fails=True)
    assert noted() <= spent + rounding, "the finished stage is there until another one takes its place"
    spent = attempt("c", fails=False)
    assert 0.15 - rounding <= noted() <= spent + rounding


def test_a_worker_that_outlived_its_driver_writes_nothing(tmp_path: Path) -> None:
    first = RunRecord.own(_config(tmp_path), resume="auto")
    late = StageContext.local(ArtifactStore(tmp_path), first.path)
    late.owner = first.owner
    late.log_metrics(1, {"loss": 1.0})
    first.close()  # as the death of its process does
    second = RunRecord.own(_config(tmp_path), resume="auto")
    before = sorted(tmp_path.rglob("*")), (first.path / "metrics.jsonl").read_bytes()
    for write in (
        lambda: late.log_metrics(2, {"loss": 0.5}),
        late.writer,
        lambda: late.commit(ArtifactStore(tmp_path).writer("stage", "0" * 64), meta={}, inputs={}),
        lambda: Checkpoints(late, keep=1).save(Snapshot(1, {}, {}, {}), best_step=None),
    ):
        with pytest.raises(LaunchError, match="taken over"):
            write()
    assert (sorted(tmp_path.rglob("*")), (first.path / "metrics.jsonl").read_bytes()) == before
    second.close()
