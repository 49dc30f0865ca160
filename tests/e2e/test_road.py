"""The whole road through the real command line: what it leaves behind, what a second run reuses."""

from __future__ import annotations

import json
import math
from copy import deepcopy
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.support.cli import STAGES, Road, environment, must, qbrec

ALONE = ("--set", "compute.launcher=inprocess", "--workers", "1")  # no cluster to wait for
METRICS = ("hr@1", "hr@5", "hr@10", "ndcg@5", "ndcg@10")


def last_items(shop: Path, count: int) -> list[str]:
    rows = pq.read_table(shop / "interactions.parquet").sort_by(
        [("user_id", "ascending"), ("timestamp", "ascending")]
    )
    return [str(item) for item in rows["item_id"].to_pylist()[:count]]


def mlflow_client(road: Road):
    mlflow = pytest.importorskip("mlflow")
    uri = f"sqlite:///{road.storage / 'mlflow.db'}"
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    return mlflow.MlflowClient(uri, uri)


def test_the_table_has_every_model_metric_and_interval(road: Road) -> None:
    metrics = road.metrics()
    for model in ("qbrec", "popularity", "itemknn", "sasrec"):
        for seen in ("removed", "kept"):
            for name in METRICS:
                value = metrics["models"][model][seen][name]
                assert 0 <= value["low"] <= value["mean"] <= value["high"] <= 1
    shown = road.outputs[0].stdout
    assert all(word in shown for word in ("qbrec", "popularity", "itemknn", "sasrec", "NDCG@10"))


def test_every_stage_left_an_artifact_and_progress_with_an_eta(road: Road) -> None:
    assert set(road.stages()) >= set(STAGES)
    assert all((road.artifact(stage) / "manifest.json").is_file() for stage in STAGES)
    lines = [json.loads(line) for line in (road.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in lines} >= {"fusion", "pretrain", "finetune", "sasrec"}
    assert all(math.isfinite(value) for line in lines for value in line["metrics"].values())
    assert "eta " in road.outputs[0].stderr or "took " in road.outputs[0].stderr


def test_variants_share_what_they_do_not_change(road: Road) -> None:
    shown = must(
        qbrec(
            "ablate",
            "--config",
            road.config,
            *ALONE,
            "--only",
            "random-ids",
            "--only",
            "no-pretraining",
        )
    )
    found = json.loads((road.run_dir / "ablation.json").read_text())
    assert set(found) == {"full", "random-ids", "no-pretraining"}
    full = road.metrics()["models"]["qbrec"]["removed"]["ndcg@10"]["mean"]
    assert found["full"]["qbrec"]["metrics"]["ndcg@10"]["mean"] == pytest.approx(full)
    assert found["random-ids"]["qbrec"]["minus_full"]["ndcg@10"]["low"] <= 0
    assert "− full" in shown
    other = road.run_dir.with_name(f"{road.run_dir.name}-random-ids") / "run.json"
    stages = json.loads(other.read_text())["stages"]
    assert stages["fusion"]["key"] == road.stages()["fusion"]["key"]
    assert stages["quantizer"]["key"] != road.stages()["quantizer"]["key"]


def test_further_seeds_are_runs_of_their_own_on_one_catalogue(road: Road) -> None:
    must(qbrec("evaluate", "--config", road.config, *ALONE, "--seeds", "2", "--set", "run.name=seeds"))
    folders = [road.run_dir.with_name(name) for name in ("seeds", "seeds-seed-1")]
    stages = [json.loads((folder / "run.json").read_text())["stages"] for folder in folders]
    assert "evaluation" not in stages[1]
    assert stages[0]["finetune"]["key"] == road.stages()["finetune"]["key"] != stages[1]["finetune"]["key"]
    assert "catalog" not in stages[1]  # it is the first run's
    metrics = json.loads((Path(stages[0]["evaluation"]["path"]) / "metrics.json").read_text())
    values = metrics["seeds"]["qbrec"]["removed"]["ndcg@10"]["values"]
    assert values[0] == pytest.approx(road.metrics()["models"]["qbrec"]["removed"]["ndcg@10"]["mean"])
    assert len(set(values)) == 2


def test_the_report_is_one_self_contained_page(road: Road) -> None:
    page = (road.run_dir / "report.html").read_text()
    assert "NDCG@10" in page
    assert 'src="http' not in page
    assert 'href="http' not in page.replace('href="https://arxiv.org', "")


def test_mlflow_has_a_parent_run_with_a_nested_run_per_stage(road: Road) -> None:
    client = mlflow_client(road)
    (experiment,) = [e for e in client.search_experiments() if e.name == "qbrec"]
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if run.info.run_name == "tiny"]  # variants and seeds are runs too
    assert "mlflow.parentRunId" not in parent.data.tags
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == len(STAGES)
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert parent.inputs.dataset_inputs


def test_the_registered_model_and_the_command_line_recommend_the_same(road: Road, shop: Path) -> None:
    history = last_items(shop, 3)
    out = must(qbrec("recommend", "--config", road.config, "--history", *history, "--k", "10", "--json"))
    told = json.loads(out)
    assert len(told) == 10
    assert not {row["item_id"] for row in told} & set(history)
    mlflow_client(road)
    import mlflow
    import pandas as pd

    model = mlflow.pyfunc.load_model("models:/qbrec@challenger")
    served = model.predict(pd.DataFrame({"history": [history]}), params={"k": 10}).iloc[0]
    assert list(served["item_id"]) == [row["item_id"] for row in told]
    assert list(served["semantic_id"]) == [row["semantic_id"] for row in told]
    assert list(served["score"]) == pytest.approx([row["score"] for row in told], rel=1e-6)


def test_ids_are_shown_with_their_labels(road: Road) -> None:
    lines = must(qbrec("ids", "show", "--config", road.config, "--count", "5")).strip().splitlines()
    assert sum("<a_" in line and "[" in line for line in lines) == 5


def test_a_second_run_skips_everything(road: Road) -> None:
    def state() -> dict[str, tuple[int, int]]:
        files = [f for f in (road.storage / "artifacts").rglob("*") if f.is_file()]
        return {str(f): (f.stat().st_mtime_ns, f.stat().st_size) for f in files}

    before, client = state(), mlflow_client(road)
    versions = len(client.search_model_versions("name = 'qbrec'"))
    again = road.run()
    must(again)
    assert state() == before
    assert all(f"✓ {stage:<11} up to date" in again.stderr for stage in STAGES)
    assert len(client.search_model_versions("name = 'qbrec'")) == versions


def test_another_run_shares_the_stages_that_are_equal(road: Road) -> None:
    tree = deepcopy(road.tree)
    tree["run"]["name"] = "sibling"
    tree["sequence"]["finetune"]["epochs"] = 1
    tree["compute"] |= {"launcher": "inprocess", "num_workers": 1}
    sibling = Road.write(road.config.parent, tree)
    must(sibling.run())
    same = {stage for stage in STAGES if sibling.stages()[stage]["key"] == road.stages()[stage]["key"]}
    assert same == {"catalog", "fusion", "quantizer", "neighbours", "pretrain", "sasrec"}


def test_promotion_asks_the_gate(road: Road) -> None:
    client = mlflow_client(road)
    must(qbrec("promote", "--config", road.config))
    champion = client.get_model_version_by_alias("qbrec", "champion")
    assert champion.version == client.get_model_version_by_alias("qbrec", "challenger").version
    refused = qbrec("promote", "--config", road.config, "--set", "registry.gate.min_metrics={ndcg@10: 0.99}")
    assert refused.returncode == 6, refused.stderr
    assert client.get_model_version_by_alias("qbrec", "champion").version == champion.version


def test_torchrun_without_ray_gives_the_same_metrics(road: Road, tmp_path: Path) -> None:
    import subprocess
    import sys

    tree = deepcopy(road.tree)
    tree["run"] = {"name": "torchrun", "storage": str(tmp_path / "storage")}
    tree["compute"]["launcher"] = "torchrun"
    run = Road.write(tmp_path, tree)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "qbrec",
    ]
    done = subprocess.run(
        [*command, "run", "--config", str(run.config)],
        cwd=Path(__file__).parents[2],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    must(done)
    assert run.metrics() == road.metrics()
