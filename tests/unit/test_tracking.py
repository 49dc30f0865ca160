"""The mirror in MLflow: a real SQLite store, tailed, interrupted, and replayed."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import pytest

from qbrec.config import RootConfig, parse_config
from qbrec.errors import ConfigError, RegistryError
from qbrec.storage.artifact import ArtifactStore
from qbrec.tracking import Tracker, replay
from qbrec.tracking.client import artifact_location, connect, tracking_uri
from qbrec.tracking.flatten import flatten_numbers, flatten_params, safe_name
from qbrec.tracking.state import STATE_FILE, load_state
from tests.support.mlflow_store import copy_store


def make_config(storage: Path, **tracking: object) -> RootConfig:
    return parse_config(
        {
            "run": {"name": "demo", "storage": str(storage)},
            "data": {"domains": {"pets": {"items": "/data/items.parquet", "interactions": "/data/clicks"}}},
            "tracking": dict(tracking),
        }
    )


def add_lines(run_dir: Path, stage: str, steps: range, *, at: float | None = None) -> None:
    with open(run_dir / "metrics.jsonl", "a") as file:
        for step in steps:
            entry = {"time": (at or time.time()) + step, "stage": stage, "step": step}
            file.write(
                json.dumps({**entry, "metrics": {"loss": 1.0 / (step + 1), "ndcg@10": step / 10}}) + "\n"
            )


def runs_by_name(config: RootConfig) -> dict[str, list]:
    client, experiment = connect(config)
    found: dict[str, list] = {}
    for run in client.search_runs([experiment], order_by=["attributes.start_time ASC"]):
        found.setdefault(run.info.run_name, []).append(run)
    return found


@pytest.fixture
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_store(tmp_path_factory.getbasetemp(), tmp_path_factory.mktemp("storage"))


class TestNames:
    def test_params_are_flat_texts(self) -> None:
        tree = {"a": {"b": 1, "c": {}}, "d": None, "e": (1, 2), "f": "x", "g": True}
        assert flatten_params(tree) == {"a.b": "1", "d": "null", "e": "[1, 2]", "f": "x", "g": "true"}

    def test_numbers_only_and_finite(self) -> None:
        tree = {"m": {"ndcg@10": {"mean": 0.5, "name": "x", "bad": float("nan")}, "ok": True}, "n": 3}
        assert dict(flatten_numbers(tree)) == {"m/ndcg_at_10/mean": 0.5, "n": 3.0}

    def test_names_fit_mlflow(self) -> None:
        assert safe_name("hr@5 (cold)") == "hr_at_5 _cold_"

    def test_places(self, tmp_path: Path) -> None:
        config = make_config(tmp_path)
        assert tracking_uri(config) == f"sqlite:///{tmp_path}/mlflow.db"
        assert artifact_location(config) == f"file://{tmp_path}/mlartifacts/qbrec"
        assert artifact_location(make_config(tmp_path, uri="http://h:5000")) is None
        with pytest.raises(ConfigError, match=r"tracking\.uri"):
            tracking_uri(parse_config({"run": {"storage": "s3://bucket/x"}}))


class TestMirror:
    def test_stages_become_nested_runs(self, database: Path, tmp_path: Path) -> None:
        config, run_dir = make_config(database), tmp_path / "run"
        run_dir.mkdir()
        (run_dir / "config.yaml").write_text("run: {}\n")
        extra = tmp_path / "curve.json"
        extra.write_text("[]")
        tracker = Tracker(config, run_dir, poll_s=0.05)
        with tracker.stage("fusion", key="k1", artifacts=[extra]) as record:
            add_lines(run_dir, "fusion", range(1500))
            record.metrics({"items@all": 7})
        with pytest.raises(RuntimeError), tracker.stage("quantizer", key="k2", params={"own": {"x": 1}}):
            raise RuntimeError
        assert tracker.finish("FAILED")

        runs = runs_by_name(config)
        parent, fusion, quantizer = runs["demo"][0], runs["fusion"][0], runs["quantizer"][0]
        client, _ = connect(config)
        assert parent.info.run_id == tracker.run_id
        assert (parent.info.status, fusion.info.status, quantizer.info.status) == (
            "FAILED",
            "FINISHED",
            "FAILED",
        )
        assert fusion.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert fusion.data.params["fusion.train.epochs"] == str(config.fusion.train.epochs)
        assert quantizer.data.params == {"own.x": "1"}
        assert parent.data.params["run.name"] == "demo"
        history = client.get_metric_history(fusion.info.run_id, "loss")
        assert sorted((m.step, m.value) for m in history) == [(s, 1.0 / (s + 1)) for s in range(1500)]
        assert fusion.data.metrics["items_at_all"] == 7
        assert [f.path for f in client.list_artifacts(fusion.info.run_id)] == ["curve.json"]
        assert [f.path for f in client.list_artifacts(parent.info.run_id)] == ["config.yaml"]
        assert (
            database / "mlartifacts" / "qbrec" / parent.info.run_id / "artifacts" / "config.yaml"
        ).is_file()

    def test_resumed_stage_goes_on_in_its_run(self, database: Path, tmp_path: Path) -> None:
        config = make_config(database)
        for attempt in range(2):
            tracker = Tracker(config, tmp_path, poll_s=0.05)
            try:
                with tracker.stage("fusion", key="k"):
                    add_lines(tmp_path, "fusion", range(attempt * 5, attempt * 5 + 5))
                    if attempt == 0:
                        raise KeyboardInterrupt
            except KeyboardInterrupt:
                tracker.finish("KILLED")
            else:
                tracker.finish()
        tracker = Tracker(config, tmp_path, poll_s=0.05)
        with tracker.stage("fusion", key="other"):
            pass
        tracker.finish()
        runs = runs_by_name(config)
        assert len(runs["demo"]) == 1
        client, _ = connect(config)
        first = runs["fusion"][0]
        assert [run.info.status for run in runs["fusion"]] == ["FINISHED", "FINISHED"]
        assert {m.step for m in client.get_metric_history(first.info.run_id, "loss")} == set(range(10))

    def test_changed_parameter_becomes_a_tag(self, database: Path, tmp_path: Path) -> None:
        Tracker(make_config(database), tmp_path).finish()
        config = make_config(database)
        config = config.model_copy(update={"run": config.run.model_copy(update={"seed": 5})})
        state = replay(make_config(database), tmp_path)
        tracker = Tracker(config, tmp_path)
        tracker.finish()
        replay(config, tmp_path)
        run = runs_by_name(config)["demo"][0]
        assert (run.info.run_id, run.data.params["run.seed"]) == (state.parent.run_id, "0")
        assert run.data.tags["changed.run.seed"] == "5"

    def test_disabled_does_nothing(self, tmp_path: Path) -> None:
        tracker = Tracker(make_config(tmp_path, enabled=False), tmp_path / "run")
        with tracker.stage("fusion") as record:
            record.metrics({"x": 1})
        assert tracker.finish()
        assert tracker.run_id is None
        assert list(tmp_path.iterdir()) == []

    def test_artifact_and_data_set(self, database: Path, tmp_path: Path) -> None:
        config, store = make_config(database), ArtifactStore(tmp_path / "store")
        writer = store.writer("evaluation", "e" * 64)
        writer.prepare()
        writer.save_json("metrics.json", {"models": {"qbrec": {"removed": {"ndcg@10": {"mean": 0.25}}}}})
        artifact = writer.commit(meta={"num_items": 9, "levels": [4, 4]}, inputs={}, config={}, seed=0)
        tracker = Tracker(config, tmp_path, poll_s=0.05)
        with tracker.stage("evaluation", key="k") as record:
            record.complete(artifact)
        tracker.dataset(artifact)
        tracker.reused("fusion", artifact)
        assert tracker.flush()
        assert tracker.run_id is not None
        assert tracker.finish()
        runs = runs_by_name(config)
        stage, parent = runs["evaluation"][0], runs["demo"][0]
        assert stage.data.metrics["qbrec/ndcg_at_10"] == 0.25
        assert stage.data.metrics["num_items"] == 9
        assert stage.data.tags["qbrec.fingerprint"] == artifact.fingerprint
        assert parent.data.tags["qbrec.reused.fusion"] == artifact.fingerprint
        client, _ = connect(config)
        names = {f.path for f in client.list_artifacts(stage.info.run_id)}
        assert names == {"manifest.json", "metrics.json"}
        dataset = parent.inputs.dataset_inputs[0].dataset
        assert (dataset.name, dataset.digest) == ("demo.pets", artifact.fingerprint[:32])
        assert json.loads(dataset.profile)["num_items"] == 9
        import mlflow

        assert mlflow.data.get_source(dataset).uri == "/data/items.parquet"


class TestOutage:
    def test_nothing_is_lost_and_one_warning(
        self,
        database: Path,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        dead = make_config(database, uri="http://127.0.0.1:9")  # nothing listens on the discard port
        started = time.monotonic()
        with caplog.at_level(logging.WARNING, logger="qbrec.tracking"):
            tracker = Tracker(dead, tmp_path, poll_s=0.02)
            with tracker.stage("fusion", key="k"):
                add_lines(tmp_path, "fusion", range(20))
                while not caplog.records and time.monotonic() - started < 20:
                    time.sleep(0.02)
            with tracker.stage("quantizer", key="k"):
                add_lines(tmp_path, "quantizer", range(3))
            assert not tracker.finish(timeout_s=5)
        assert [r.getMessage() for r in caplog.records if "nothing is lost" in r.getMessage()]
        assert len(caplog.records) == 1
        with pytest.raises(RegistryError, match="nothing is lost"):
            replay(dead, tmp_path)

        alive = make_config(database)
        replay(alive, tmp_path)
        replay(alive, tmp_path)  # sending twice changes nothing
        runs = runs_by_name(alive)
        client, _ = connect(alive)
        assert {name: len(found) for name, found in runs.items()} == {"demo": 1, "fusion": 1, "quantizer": 1}
        assert runs["fusion"][0].info.status == "FINISHED"
        assert len(client.get_metric_history(runs["fusion"][0].info.run_id, "loss")) == 20
        assert len(client.get_metric_history(runs["quantizer"][0].info.run_id, "ndcg_at_10")) == 3

    def test_cut_between_sending_and_noting(self, database: Path, tmp_path: Path) -> None:
        config = make_config(database)
        add_lines(tmp_path, "fusion", range(7))
        before = replay(config, tmp_path)
        state = load_state(tmp_path)
        assert state is not None
        state.offset = 0  # as if the process had died before the acknowledgement was on disk
        state.nodes[1].run_id = None
        state.save(tmp_path)
        after = replay(config, tmp_path)
        client, _ = connect(config)
        assert after.nodes[1].run_id == before.nodes[1].run_id
        assert len(client.get_metric_history(str(after.nodes[1].run_id), "loss")) == 7

    def test_deleted_run_is_written_anew(self, database: Path, tmp_path: Path) -> None:
        config = make_config(database)
        add_lines(tmp_path, "fusion", range(4))
        first = replay(config, tmp_path).parent.run_id
        client, _ = connect(config)
        client.delete_run(str(first))
        second = replay(config, tmp_path)
        assert second.parent.run_id != first
        assert len(client.get_metric_history(str(second.nodes[1].run_id), "loss")) == 4

    def test_half_line_waits_and_rubbish_is_noted(self, database: Path, tmp_path: Path) -> None:
        config = make_config(database)
        add_lines(tmp_path, "fusion", range(2))
        with open(tmp_path / "metrics.jsonl", "a") as file:
            file.write('not json\n{"time": 1, "stage": "fus')
        state = replay(config, tmp_path)
        assert len(state.refused) == 1
        assert "not json" in state.refused[0]
        with open(tmp_path / "metrics.jsonl", "a") as file:
            file.write('ion", "step": 9, "metrics": {"loss": NaN}}\n')
        state = replay(config, tmp_path)
        client, _ = connect(config)
        assert 9 in {m.step for m in client.get_metric_history(str(state.nodes[1].run_id), "loss")}

    def test_two_drivers(self, database: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        config = make_config(database)
        first = Tracker(config, tmp_path)
        second = Tracker(config, tmp_path)
        assert "another process" in caplog.text
        with second.stage("fusion"):
            pass
        with pytest.raises(RegistryError, match="another process"):
            replay(config, tmp_path)
        first.finish()
        replay(config, tmp_path)

    def test_damaged_state(self, database: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        (tmp_path / STATE_FILE).write_text('{"nodes": [{"bad": 1}]}')
        add_lines(tmp_path, "fusion", range(2))
        state = replay(make_config(database), tmp_path)
        assert "anew" in caplog.text
        assert state.offset > 0
