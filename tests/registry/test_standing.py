"""How a run stands in the registry: whom it is compared with, and what is said where nobody can be asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from qbrec.errors import GateError
from qbrec.pipeline import report_of
from qbrec.registry.comparison import Comparison
from qbrec.registry.describe import standing_of
from qbrec.registry.promote import promote, rollback
from qbrec.registry.standing import Rival, Standing
from qbrec.storage.artifact import Artifact
from qbrec.tracking.client import connect
from tests.registry.conftest import Registry
from tests.registry.test_promotion import NEVER, broken, promoted
from tests.support.registry_run import registry_run
from tests.support.tiny_run import TinyRun


def standing(registry: Registry, version: str) -> Standing:
    found = standing_of(registry.config, **parts(registry.runs[version]))
    assert found is not None
    return found


def parts(run: TinyRun) -> dict[str, Artifact]:
    return {name: run.artifacts[name] for name in ("evaluation", "catalog")}


def rival(registry: Registry, version: str) -> Rival:
    found = standing(registry, version).rival
    assert found is not None
    return found


def test_nobody_serves(registry: Registry) -> None:
    assert standing(registry, "2") == Standing("qbrec", version="2")


def test_a_challenger_is_compared_with_the_champion(registry: Registry) -> None:
    promoted(registry, "1")
    found = standing(registry, "2")
    assert (found.version, found.serves, found.verdict) == ("2", False, None)
    other = rival(registry, "2")
    assert (other.version, other.run, other.serves, other.problem) == ("1", "tiny", True, "")
    ours, theirs = (registry.runs[v].artifacts["evaluation"] for v in ("2", "1"))
    assert other.metrics == theirs.load_json("metrics.json")
    comparison = Comparison(ours, theirs, seed=registry.config.run.seed)
    for name in ("ndcg@10", "mrr", "tail/ndcg@10"):
        assert other.paired[name] == comparison.of(name)
    assert other.paired["ndcg@10"].mean == pytest.approx(registry.ndcg("2") - registry.ndcg("1"))
    assert other.paired["ndcg@10"].num_users > 100


def test_a_champion_is_compared_with_the_one_before(registry: Registry) -> None:
    promoted(registry, "1")
    first = standing(registry, "1")
    assert (first.serves, first.rival) == (True, None)
    promoted(registry, "2")
    found = standing(registry, "2")
    assert found.serves
    assert found.verdict is not None
    assert found.verdict["champion"] == "1"
    assert found.rival is not None
    assert (found.rival.version, found.rival.serves) == ("1", False)
    rollback(registry.config)
    assert (rival(registry, "2").version, rival(registry, "2").serves) == ("1", True)


def test_a_refusal_is_told(registry: Registry) -> None:
    promoted(registry, "1")
    with pytest.raises(GateError):
        promote(registry.config, version="2", gate=NEVER, gate_name="never")
    verdict = standing(registry, "2").verdict
    assert verdict is not None
    assert (verdict["gate"], verdict["passed"]) == ("never", False)


def test_a_run_that_is_not_registered_and_has_other_data(registry: Registry, tmp_path: Path) -> None:
    promoted(registry, "1")
    other = registry_run(tmp_path / "other", seed=7, shop="b")
    found = standing_of(registry.config, **parts(other))
    assert found is not None
    assert found.version is None
    assert found.rival is not None
    assert "other items or histories" in found.rival.problem
    assert not found.rival.paired


def test_a_catalogue_newer_than_the_evaluation(registry: Registry, tmp_path: Path) -> None:
    """`qbrec run` was stopped behind the new catalogue: what the page shows is of the old one."""
    promoted(registry, "1")
    newer = registry_run(tmp_path / "other", seed=7, shop="b").artifacts["catalog"]
    ours = parts(registry.runs["2"])
    found = standing_of(registry.config, **(ours | {"catalog": newer}))
    assert found is not None
    assert found.rival is not None
    assert found.rival.paired == rival(registry, "2").paired  # of one catalogue, whatever the run has by now
    other = registry_run(tmp_path / "third", seed=7, shop="c")
    found = standing_of(registry.config, **(parts(other) | {"catalog": newer}))
    assert found is not None
    assert found.rival is not None
    assert "newer than its evaluation" in found.rival.problem


def test_a_damaged_champion_is_named(registry: Registry) -> None:
    promoted(registry, "1")
    with broken(registry.bundle("1") / "evaluation" / "ranks.parquet"):
        problem = rival(registry, "2").problem
    assert "cannot be compared" in problem


def test_no_registry_is_no_error(registry: Registry) -> None:
    ours = parts(registry.run)
    for section in ("registry", "tracking"):
        off = getattr(registry.config, section).model_copy(update={"enabled": False})
        assert standing_of(registry.config.model_copy(update={section: off}), **ours) is None
    away = registry.config.tracking.model_copy(update={"uri": "http://127.0.0.1:9"})
    found = standing_of(registry.config.model_copy(update={"tracking": away}), **ours)
    assert found is not None
    assert "cannot be reached" in found.problem
    assert found.version is None


def test_the_report_of_a_gated_run_shows_the_champion(registry: Registry) -> None:
    promoted(registry, "1")
    connect(registry.config)[0].set_model_version_tag("qbrec", "1", "qbrec.run", "<script>x")
    with pytest.raises(GateError):
        promote(registry.config, version="2", gate=NEVER, gate_name="never")
    run = registry.runs["2"]
    (Path(registry.config.run.storage) / "runs" / "tiny").mkdir(parents=True)
    html = report_of(registry.config, run.artifacts).read_text()
    assert "The gate never said no" in html
    assert html.count("<td>champion, version 1</td>") == 3  # metrics, differences, coverage
    champion = registry.runs["1"].artifacts["evaluation"].meta["ndcg@10"]
    assert f">{champion:.4f}<" in html
    assert "(run &lt;script&gt;x)" in html
