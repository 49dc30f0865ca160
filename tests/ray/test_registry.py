"""Register, serve, gate, promote, roll back and report on a real MLflow store. Ray builds the catalogue."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from qbrec.config import RootConfig
from qbrec.errors import ConfigError, DataError
from qbrec.registry.bundle import open_part
from qbrec.registry.recommend import Recommender
from qbrec.registry.versions import by_alias, register
from qbrec.report import write_report
from qbrec.storage.catalog_view import CatalogView
from qbrec.tracking.client import connect, tracking_uri
from tests.support.mlflow_store import copy_store
from tests.support.tiny_run import TinyRun, tiny_run
from tests.unit.test_report import assert_self_contained

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> TinyRun:
    run = tiny_run(tmp_path_factory.mktemp("tiny"))
    copy_store(tmp_path_factory.getbasetemp(), Path(run.config.run.storage))
    return run


@pytest.fixture(scope="module")
def recommender(tiny: TinyRun) -> Recommender:
    return Recommender.from_artifacts(tiny.artifacts, ranking=tiny.config.ranking)


@pytest.fixture(scope="module")
def version(tiny: TinyRun) -> str:
    return register(tiny.config, tiny.run_dir, tiny.artifacts)


@pytest.fixture(scope="module")
def histories(tiny: TinyRun) -> list[list[str]]:
    catalog = CatalogView(tiny.artifacts["catalog"])
    rows = catalog.load_histories("shop").rows
    return [catalog.item_ids(rows.row(i)) for i in range(6)]


def alias(config: RootConfig, name: str) -> str | None:
    client, _ = connect(config)
    found = by_alias(client, config.registry.model_name, name)
    return None if found is None else str(found.version)


class TestRecommender:
    def test_is_the_scorers_order_without_the_seen(
        self, tiny: TinyRun, recommender: Recommender, histories: list[list[str]]
    ) -> None:
        lists = recommender.recommend(histories, k=20)
        for history, items in zip(histories, lists, strict=True):
            scores = [item["score"] for item in items]
            assert scores == sorted(scores, reverse=True)
            assert not {item["item_id"] for item in items} & set(history)
            assert all(item["semantic_id"].startswith("<a_") and item["label"][0] == "[" for item in items)
        everything = recommender.recommend(histories[:1], k=recommender.num_candidates, keep_seen=True)[0]
        assert len({item["item_id"] for item in everything}) == recommender.num_candidates
        rest = [item["item_id"] for item in everything if item["item_id"] not in histories[0]]
        assert rest[:20] == [item["item_id"] for item in lists[0]]

    def test_fewer_when_all_else_was_seen(self, recommender: Recommender) -> None:
        all_ids = recommender.popular(recommender.num_candidates)
        (left,) = recommender.recommend([all_ids[:-2]], k=10)
        assert {item["item_id"] for item in left} == set(all_ids[-2:])

    def test_what_the_caller_got_wrong(self, recommender: Recommender, histories: list[list[str]]) -> None:
        known = histories[0][0]
        with pytest.raises(DataError, match="did you mean") as caught:
            recommender.recommend([histories[1], [known + "x"]])
        assert known in str(caught.value)
        assert "history 1" in str(caught.value)
        with pytest.raises(DataError, match="empty"):
            recommender.recommend([[]])
        with pytest.raises(DataError, match="not a text"):
            recommender.recommend([[3]])  # type: ignore[list-item]
        for k in (0, recommender.num_candidates + 1):
            with pytest.raises(ConfigError, match="k is"):
                recommender.recommend([[known]], k=k)
        assert recommender.recommend([]) == []


class TestRegistered:
    def test_version_says_where_it_comes_from(self, tiny: TinyRun, version: str) -> None:
        client, _ = connect(tiny.config)
        found = client.get_model_version("qbrec", version)
        assert alias(tiny.config, "challenger") == version
        for kind in ("catalog", "quantizer", "finetune", "evaluation"):
            assert found.tags[f"qbrec.{kind}"] == tiny.artifacts[kind].fingerprint
        assert "metric.ndcg_at_10" in found.tags
        assert tiny.artifacts["finetune"].fingerprint in found.description

    def test_again_is_the_same_version(self, tiny: TinyRun, version: str) -> None:
        assert register(tiny.config, tiny.run_dir, tiny.artifacts) == version

    def test_served_elsewhere_it_gives_the_very_same_lists(
        self,
        tiny: TinyRun,
        version: str,
        recommender: Recommender,
        histories: list[list[str]],
        tmp_path: Path,
    ) -> None:
        """A bare process: no qbrec on its path, no deepspeed, no ray, nothing may be unpickled."""
        code = """
import json, pickle, sys
sys.modules["deepspeed"] = sys.modules["ray"] = None
import mlflow, pandas as pd
uri, histories = json.load(sys.stdin)
mlflow.set_tracking_uri(uri); mlflow.set_registry_uri(uri)
model = mlflow.pyfunc.load_model("models:/qbrec@challenger")
out = model.predict(pd.DataFrame({"history": histories}), params={"k": 7, "keep_seen": True})
import qbrec
print(json.dumps([out.to_dict("list"), qbrec.__file__]))
"""
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        environment |= {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        done = subprocess.run(
            [sys.executable, "-c", code],
            input=json.dumps([tracking_uri(tiny.config), histories]),
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        served, where = json.loads(done.stdout.splitlines()[-1])
        expected = recommender.recommend(histories, k=7, keep_seen=True)
        for column in ("item_id", "title", "semantic_id", "label"):
            assert served[column] == [[item[column] for item in items] for items in expected]  # type: ignore[literal-required]
        # The other process may have another number of threads, which sum in another order.
        np.testing.assert_allclose(
            served["score"], [[i["score"] for i in items] for items in expected], rtol=1e-5
        )
        assert "mlartifacts" in where or "code" in where

    def test_over_http(
        self, tiny: TinyRun, version: str, recommender: Recommender, histories: list[list[str]]
    ) -> None:
        import uvicorn
        from mlflow.pyfunc import load_model, scoring_server

        model = load_model(f"{_location(tiny.config, version)}")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        config = uvicorn.Config(scoring_server.init(model), host="127.0.0.1", port=port, log_level="error")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.02)
        try:
            body = {"dataframe_split": {"columns": ["history"], "data": [[histories[0]]]}, "params": {"k": 3}}
            answer = _post(port, body)["predictions"][0]
            expected = recommender.recommend(histories[:1], k=3)[0]
            assert answer["item_id"] == [item["item_id"] for item in expected]
            body["dataframe_split"]["data"] = [[["no such item"]]]  # type: ignore[index]
            with pytest.raises(urllib.error.HTTPError) as caught:
                _post(port, body)
            assert caught.value.code == 400
            assert "no such item" in caught.value.read().decode()
        finally:
            server.should_exit = True
            thread.join(10)

    def test_only_plain_files(self, tiny: TinyRun, version: str) -> None:
        files = [f for f in Path(_location(tiny.config, version)).rglob("*") if f.is_file()]
        inside = {f.suffix for f in files if "bundle" in f.parts}
        assert inside == {".json", ".npy", ".arrow", ".safetensors", ".parquet", ".md"}
        assert not [f for f in files if f.suffix in (".pkl", ".pickle", ".joblib", ".pt", ".bin", ".pyc")]

    def test_a_flipped_bit_is_named(self, tiny: TinyRun, version: str, tmp_path: Path) -> None:
        import shutil

        bundle = tmp_path / "bundle"
        shutil.copytree(Path(_location(tiny.config, version)) / "artifacts" / "bundle", bundle)
        Recommender.load(bundle)
        weights = bundle / "finetune" / "encoder.safetensors"
        data = bytearray(weights.read_bytes())
        data[-5] ^= 1
        weights.write_bytes(data)
        with pytest.raises(DataError, match=r"encoder\.safetensors"):
            Recommender.load(bundle)

    def test_large_parts_stay_where_they_are(
        self, tiny: TinyRun, recommender: Recommender, histories: list[list[str]], tmp_path: Path
    ) -> None:
        from qbrec.registry.bundle import write_bundle

        small = tiny.config.registry.model_copy(update={"max_part_bytes": 1000})
        config = tiny.config.model_copy(update={"registry": small})
        bundle = write_bundle(tmp_path / "b", config=config, artifacts=tiny.artifacts, card="")
        assert not (bundle / "catalog").exists()
        assert open_part(bundle, "catalog").path == tiny.artifacts["catalog"].path.resolve()
        assert Recommender.load(bundle).recommend(histories) == recommender.recommend(histories)


class TestReport:
    def test_everything_is_there(self, tiny: TinyRun) -> None:
        (tiny.run_dir / "run.json").write_text('{"stages": {"catalog": {"seconds": 61.0}}}')
        with open(tiny.run_dir / "metrics.jsonl", "a") as file:
            for step in range(50):
                line = {"time": 0, "stage": "fusion", "step": step, "metrics": {"loss": 1 / (step + 1)}}
                file.write(json.dumps(line) + "\n")
        html = write_report(tiny.config, tiny.run_dir, tiny.artifacts).read_text()
        assert_self_contained(html)
        for text in ("NDCG@10", "itemknn", "cold", "1 min 01 s", "&lt;a_", "what came next", "Perplexity"):
            assert text in html, text
        assert html.count("<svg") >= 6

    def test_titles_are_escaped(self, tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(CatalogView, "titles", lambda _, rows: ["<script>x</script>"] * len(rows))
        html = write_report(tiny.config, tiny.run_dir, tiny.artifacts).read_text()
        assert_self_contained(html)
        assert "&lt;script&gt;x" in html

    def test_unfinished_run(self, tiny: TinyRun, tmp_path: Path) -> None:
        html = write_report(tiny.config, tmp_path, {"catalog": tiny.artifacts["catalog"]}).read_text()
        assert_self_contained(html)
        assert "not run" in html
        assert_self_contained(write_report(tiny.config, tmp_path, {}).read_text())


def _location(config: RootConfig, version: str) -> str:
    """Folder of a version's files: the store of this test is a local one."""
    client, _ = connect(config)
    source = str(client.get_model_version("qbrec", version).source)
    model = client.get_logged_model(source.removeprefix("models:/"))
    return str(model.artifact_location).removeprefix("file://")


def _post(port: int, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.loads(answer.read())


def test_signature(tiny: TinyRun, version: str) -> None:
    import mlflow

    model = mlflow.pyfunc.load_model(_location(tiny.config, version))
    signature = model.metadata.signature
    assert signature.inputs.input_names() == ["history"]
    assert {p.name: p.default for p in signature.params} == {"k": 10, "keep_seen": False}
    with pytest.raises(mlflow.exceptions.MlflowException, match="unknown item id"):
        model.predict(pd.DataFrame({"history": [["no such item"]]}))
