"""Every key of a gate decides about a registered version."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from qbrec.config import RootConfig
from qbrec.registry.gate import Verdict, load_gate
from qbrec.registry.judge import Judge
from qbrec.registry.latency import measure_latency
from qbrec.registry.recommend import Recommender
from qbrec.registry.versions import register
from qbrec.storage.artifact import Artifact, ArtifactStore
from qbrec.storage.catalog_view import CatalogView
from qbrec.tracking.client import connect
from tests.registry.conftest import Registry

Ask = Callable[..., Verdict]


@pytest.fixture(scope="module")
def ask(registered: Registry, tmp_path_factory: pytest.TempPathFactory) -> Ask:
    """The verdict of a gate, written as in its file, on a version."""

    def answer(
        tree: dict[str, Any], *, version: str = "2", champion: str | None = None, name: str = "qbrec"
    ) -> Verdict:
        folder = tmp_path_factory.mktemp("gate")
        (folder / "gate.yaml").write_text(yaml.safe_dump(tree))
        gate = load_gate(folder / "gate.yaml")
        config = under(registered, name)
        return Judge(config, version, gate=gate, gate_name="gate", folder=folder).against(champion)

    return answer


def under(registered: Registry, name: str, **registry: Any) -> RootConfig:
    """The configuration with another name of the model, and other settings of the registry."""
    update = registered.config.registry.model_copy(update={"model_name": name, **registry})
    return registered.config.model_copy(update={"registry": update})


@pytest.fixture(scope="module")
def coldstart(registered: Registry) -> Artifact:
    """As `qbrec coldstart` leaves it, with the figures of an evaluation."""
    metrics = registered.run.artifacts["evaluation"].load_json("metrics.json")
    race = {key: metrics[key] for key in ("models", "slices")} | {"random": {"ndcg@10": 0.01}}
    writer = ArtifactStore(registered.config.run.storage).writer("coldstart", "5" * 64)
    writer.prepare()
    protocol = {"num_held_out": 12, "num_users": 34}
    writer.save_json("coldstart.json", {"protocol": protocol, "catalogue": race, "held_out": race})
    return writer.commit(meta=protocol, inputs={}, config={}, seed=0)


@pytest.fixture(scope="module")
def measured(registered: Registry, coldstart: Artifact) -> str:
    """The one version of the model `measured`: with a cold start, without histories."""
    config, run = under(registered, "measured", probe_histories=0), registered.run
    return register(config, run.run_dir, {**run.artifacts, "coldstart": coldstart})


def said_no(verdict: Verdict) -> list[str]:
    return [check.name for check in verdict.checks if not check.passed]


def floor(registered: Registry, name: str) -> float:
    """What version 2 reaches in a metric."""
    metrics = registered.runs["2"].artifacts["evaluation"].load_json("metrics.json")
    part, _, metric = name.rpartition("/")
    table = metrics["slices"][part] if part else metrics
    return float(table["models"]["qbrec"]["removed"][metric]["mean"])


@pytest.mark.parametrize("name", ["ndcg@10", "non_duplicate/ndcg@10", "tail/hr@20"])
def test_min_metrics(ask: Ask, registered: Registry, name: str) -> None:
    reached = floor(registered, name)
    assert reached > 0
    assert ask({"min_metrics": {name: reached}}).passed
    assert not ask({"min_metrics": {name: reached + 1e-6}}).passed


@pytest.mark.parametrize("name", ["ndcg@10", "tail/ndcg@10"])
def test_max_loss(ask: Ask, name: str) -> None:
    lenient = {"ndcg@10": 1.0}
    assert ask({"max_loss": lenient | {name: 1.0}}, version="1", champion="2").passed
    refused = ask({"max_loss": lenient | {name: 0.0}}, version="1", champion="2")
    assert [check.name for check in refused.checks if not check.passed] == [
        f"not worse than @champion in {name}"
    ]


@pytest.mark.parametrize(
    ("key", "passes", "refuses"),
    [("min_no_collision_rate", 0.9, 1.0), ("min_perplexity_share", 0.5, 1.0), ("max_largest_bucket", 2, 1)],
)
def test_semantic_ids(ask: Ask, key: str, passes: float, refuses: float) -> None:
    assert ask({"ids": {key: passes}}).passed
    refused = ask({"ids": {key: refuses}})
    assert [name.partition(",")[0] for name in said_no(refused)] == ["semantic IDs"]


class TestLatency:
    def reason(self, verdict: Verdict) -> str:
        return next(check.reason for check in verdict.checks if check.name.startswith("latency"))

    def test_threshold(self, ask: Ask) -> None:
        fast = ask({"latency": {"max_p95_ms": 60_000, "histories": 7}})
        assert fast.passed
        assert "ms ≤ 60000 ms" in self.reason(fast)
        assert "over 7 histories on " in self.reason(fast)
        slow = ask({"latency": {"max_p95_ms": 0.001, "histories": 7}})
        assert not slow.passed
        assert "ms > 0.001 ms" in self.reason(slow)

    def test_time_is_bounded(self, ask: Ask) -> None:
        verdict = ask({"latency": {"max_p95_ms": 60_000, "histories": 9, "max_seconds": 1e-6}})
        assert "over 1 histories" in self.reason(verdict)
        assert "8 more were left out after 1e-06 s" in self.reason(verdict)

    def test_histories_are_real_ones(self, registered: Registry) -> None:
        """Of the hold-out, each up to the item sought, with a user's id nowhere."""
        found = json.loads((registered.bundle("2") / "probe" / "histories.json").read_text())
        view = CatalogView(registered.run.artifacts["catalog"])
        histories = view.load_histories("shop")
        real = [
            view.item_ids(histories.rows.row(user)[: histories.cut[user, 1]])
            for user in range(len(histories))
            if 1 <= histories.cut[user, 1] < histories.rows.lengths[user]
        ]
        assert len(real) > 100
        assert found == real

    def test_requests_are_single(self, registered: Registry) -> None:
        recommender = Recommender.load(registered.bundle("2"))
        ids = recommender.popular(3)
        found = measure_latency(recommender, [ids, ids[:1], ids[1:]], max_seconds=60)
        assert found.num_requests == 3
        assert 0 < found.p50_ms <= found.p95_ms

    def test_without_histories(self, ask: Ask, measured: str) -> None:
        verdict = ask({"latency": {"max_p95_ms": 60_000}}, version=measured, name="measured")
        assert not verdict.passed
        assert "registry.probe_histories" in self.reason(verdict)


def test_min_coldstart(ask: Ask, registered: Registry, measured: str) -> None:
    refused = ask({"min_coldstart": {"held_out/ndcg@10": 0.0}})
    assert not refused.passed
    assert "run `qbrec coldstart` with its configuration" in refused.checks[0].reason
    reached = registered.ndcg("1")
    for value, passes in ((reached, True), (reached + 1e-6, False)):
        floors = {"held_out/ndcg@10": value, "catalogue/tail/hr@20": 0.0}
        assert ask({"min_coldstart": floors}, version=measured, name="measured").passed is passes


def test_coldstart_makes_another_version(registered: Registry, measured: str, coldstart: Artifact) -> None:
    config, run = under(registered, "measured"), registered.run
    client, _ = connect(config)
    card = client.get_model_version("measured", measured).description
    assert "12 items were held out" in card
    assert f"NDCG@10 among those held out: {registered.ndcg('1'):.4f}" in card
    assert register(config, run.run_dir, {**run.artifacts, "coldstart": coldstart}) == measured
    assert register(config, run.run_dir, run.artifacts) != measured
