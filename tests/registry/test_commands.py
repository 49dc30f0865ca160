"""`qbrec registry list|show|diff` and the gates by name, through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner, Result

from qbrec.cli.main import cli
from qbrec.config.sections import GateConfig
from qbrec.errors import ConfigError, GateError, RegistryError
from qbrec.evaluation.results import MODEL
from qbrec.ranking import METRICS, metrics_of_ranks
from qbrec.registry.comparison import RANKS
from qbrec.registry.describe import show_version
from qbrec.registry.promote import promote
from qbrec.registry.versions import register
from tests.registry.conftest import Registry
from tests.registry.test_promotion import broken
from tests.support.registry_run import registry_run

ANY = GateConfig(max_loss={})


@pytest.fixture
def config(registry: Registry, tmp_path: Path) -> Path:
    tree = {"run": {"storage": registry.config.run.storage}}
    (tmp_path / "shop.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "shop.yaml"


def qbrec(*args: str | Path) -> Result:
    done = CliRunner().invoke(cli, [str(arg) for arg in args])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def document(*args: str | Path) -> Any:
    return json.loads(qbrec(*args, "--json").stdout)


def test_list(registry: Registry, config: Path) -> None:
    promote(registry.config, version="1", gate=ANY, gate_name="any")
    promote(registry.config, version="2", gate=ANY, gate_name="any")
    with pytest.raises(GateError):
        promote(registry.config, version="3", gate=GateConfig(min_metrics={"mrr": 0.99}), gate_name="hard")
    found = document("registry", "list", "--config", config)
    assert [one["version"] for one in found] == ["3", "2", "1"]
    assert [one["aliases"] for one in found] == [["challenger"], ["champion"], ["previous"]]
    assert {one["run"] for one in found} == {"tiny"}
    assert [one["means"]["ndcg@10"] for one in found] == pytest.approx(
        [registry.ndcg(version) for version in "321"], abs=1e-6
    )
    assert [one["verdict"]["passed"] for one in found] == [False, True, True]
    lines = qbrec("registry", "list", "--config", config).stdout.splitlines()
    assert " ".join(lines[0].split()) == "version aliases run registered NDCG@10 HR@10 gate"
    assert "@champion" in lines[2]
    assert f"{registry.ndcg('2'):.4f}" in lines[2]
    assert lines[2].endswith("passed (any)")
    assert lines[1].endswith("refused (hard)")
    assert found[0]["created"] in lines[1]


def test_list_of_nothing(config: Path) -> None:
    done = qbrec("registry", "list", "--config", config, "--set", "registry.model_name=unknown")
    assert "'unknown' has no version yet" in done.stdout


def test_show(registry: Registry, config: Path) -> None:
    with pytest.raises(RegistryError, match="no @champion"):
        qbrec("registry", "show", "--config", config)
    with pytest.raises(GateError):
        promote(registry.config, version="2", gate=GateConfig(min_metrics={"mrr": 0.99}), gate_name="hard")
    promote(registry.config, version="2", gate=ANY, gate_name="any")
    found = document("registry", "show", "--config", config)
    assert found == document("registry", "show", "@champion", "--config", config)
    assert found == document("registry", "show", "2", "--config", config)
    run = registry.runs["2"]
    metrics = run.artifacts["evaluation"].load_json("metrics.json")
    assert found["metrics"] == metrics["models"][MODEL]["removed"]
    assert found["slices"]["tail"] == metrics["slices"]["tail"]["models"][MODEL]["removed"]
    quality = run.artifacts["quantizer"].load_json("quality.json")
    assert found["ids"]["levels"] == quality["levels"]
    assert found["ids"]["largest_bucket"] == quality["largest_bucket"]
    for kind, artifact in run.artifacts.items():
        assert found["fingerprints"][kind] == artifact.fingerprint
    assert found["coldstart"] is None
    assert found["fingerprints"]["coldstart"] == "none"
    files = [path for path in registry.bundle("2").glob("*/*") if path.name != "manifest.json"]
    assert found["bytes"] == sum(path.stat().st_size for path in files)
    assert [one["gate"] for one in found["history"]] == ["hard", "any"]
    assert found["verdict"]["gate"] == "any"
    assert found["configuration"]["sequence"]["width"] == 32
    assert not {"tracking", "registry"} & set(found["configuration"])

    text = qbrec("registry", "show", "--config", config).stdout
    cell = found["metrics"]["ndcg@10"]
    assert f"{cell['mean']:.4f}  ({cell['low']:.4f}–{cell['high']:.4f})" in text
    for part in ("version 2 @champion", "tail/ndcg@10", "perplexity", "passed by any", "refused by hard"):
        assert part in text
    assert run.artifacts["finetune"].fingerprint in text
    assert text.rstrip().endswith(found["card"].rstrip()[-60:])


def test_show_what_is_damaged(registry: Registry, config: Path) -> None:
    with broken(registry.bundle("2") / "quantizer" / "quality.json"):
        done = qbrec("registry", "show", "2", "--config", config)
        assert "quality.json" in done.stderr
        assert "fingerprints" in done.stdout
        assert "quality.json" in show_version(registry.config, "2")["problem"]
    with pytest.raises(RegistryError, match="no version 9"):
        show_version(registry.config, "9")


def test_diff(registry: Registry, config: Path) -> None:
    with pytest.raises(RegistryError, match="no @champion"):
        qbrec("registry", "diff", "--config", config)
    promote(registry.config, version="1", gate=ANY)
    found = document("registry", "diff", "--config", config)
    assert found == document("registry", "diff", "3", "1", "--config", config)
    assert (found["version"]["version"], found["against"]["version"]) == ("3", "1")
    equal = {kind: one["equal"] for kind, one in found["artifacts"].items()}
    assert equal == {
        "catalog": True,
        "coldstart": True,
        "evaluation": False,
        "finetune": False,
        "generations": True,
        "quantizer": False,
    }
    assert found["configuration"] == {}
    assert found["unpaired"] == ""
    gains = []
    for version in ("3", "1"):
        table = pq.read_table(registry.runs[version].artifacts["evaluation"].file(RANKS))
        gains.append(metrics_of_ranks(table["qbrec_removed"].to_numpy().astype(np.int64)).mean(0))
    for column, metric in enumerate(METRICS):
        row = found["metrics"][metric]
        assert (row["version"], row["against"]) == pytest.approx((gains[0][column], gains[1][column]))
        assert row["difference"]["mean"] == pytest.approx(gains[0][column] - gains[1][column])
        assert row["difference"]["low"] < row["difference"]["mean"] < row["difference"]["high"]
    assert found["slices"]["tail"]["ndcg@10"]["difference"]["num_users"] < 168
    # The gate's own figures, so that both tell the same story.
    with pytest.raises(GateError) as caught:
        promote(registry.config, gate=GateConfig(max_loss={"ndcg@10": 0.0}))
    gap = found["metrics"]["ndcg@10"]["difference"]
    assert f"{gap['mean']:+.4f} ({gap['low']:+.4f} … {gap['high']:+.4f})" in str(caught.value)

    text = qbrec("registry", "diff", "--config", config).stdout
    assert f"{gap['mean']:+.4f} ({gap['low']:+.4f} … {gap['high']:+.4f})" in text
    assert "quantizer    differs" in text
    assert "catalog      equal" in text
    with pytest.raises(RegistryError, match="both version 3"):
        qbrec("registry", "diff", "3", "@challenger", "--config", config)


def test_diff_of_another_catalogue_and_configuration(
    registry: Registry, config: Path, tmp_path: Path
) -> None:
    other = registry_run(tmp_path / "other", shop="b")
    wide = other.config.sequence.model_copy(update={"max_items": 20})
    changed = registry.config.model_copy(update={"sequence": wide})
    version = register(changed, other.run_dir, other.artifacts)
    found = document("registry", "diff", version, "2", "--config", config)
    assert found["configuration"]["sequence.max_items"] == {"version": "20", "against": "10"}
    assert set(found["configuration"]) == {"sequence.max_items", "run.storage"}
    assert found["unpaired"] == "they were evaluated on different items or histories"
    row = found["metrics"]["hr@10"]
    assert row["difference"] is None
    assert row["version"] == other.artifacts["evaluation"].meta["hr@10"]
    text = qbrec("registry", "diff", version, "2", "--config", config).stdout
    assert "no intervals: they were evaluated on different items or histories" in text
    assert "sequence.max_items  20" in text


def test_gates_by_name(registry: Registry, config: Path) -> None:
    done = qbrec("promote", "--config", config, "--gate", "default")
    assert "ok  floor ndcg@10" in done.stdout
    assert registry.aliases == {"champion": "3"}
    with pytest.raises(GateError, match="the gate 'strict' refuses version 2") as caught:
        qbrec("promote", "--config", config, "--gate", "strict", "--version", "2")
    for name in ("floor tail/hr@10", "semantic IDs, items on one ID", "latency", "cold start, floor"):
        assert name in str(caught.value)
    with pytest.raises(ConfigError, match="no gate 'lenient'"):
        qbrec("promote", "--config", config, "--gate", "lenient")
    assert registry.aliases == {"champion": "3"}
