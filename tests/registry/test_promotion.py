"""Promoting and rolling back: what moves, what is written down, and what happens where something is gone."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from qbrec.config.sections import GateConfig
from qbrec.errors import DataError, GateError, RegistryError
from qbrec.registry.gate import Check, Verdict
from qbrec.registry.line import LINE_TAG
from qbrec.registry.promote import promote, rollback
from qbrec.registry.verdicts import MOST_CHARACTERS, MOST_ENTRIES, history, last, note
from qbrec.registry.versions import register
from qbrec.tracking.client import connect
from tests.registry.conftest import Registry
from tests.support.registry_run import registry_run

ANY = GateConfig(max_loss={})
NEVER = GateConfig(min_metrics={"ndcg@10": 0.99}, max_loss={})
FLOORS_DECIDE = GateConfig(min_metrics={"ndcg@10": 0.99}, damaged_champion="floors")
Harm = Callable[[Path], AbstractContextManager[None]]


def promoted(registry: Registry, *versions: str) -> None:
    for version in versions:
        promote(registry.config, version=version, gate=ANY)


@contextmanager
def broken(path: Path) -> Iterator[None]:
    """A file with a bit flipped, for a while."""
    data = path.read_bytes()
    path.write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
    try:
        yield
    finally:
        path.write_bytes(data)


@contextmanager
def moved(path: Path) -> Iterator[None]:
    """A file or folder that is gone for a while."""
    path.rename(path.with_name(path.name + ".gone"))
    try:
        yield
    finally:
        path.with_name(path.name + ".gone").rename(path)


class TestPromote:
    def test_the_champion_becomes_previous(self, registry: Registry) -> None:
        assert promote(registry.config, version="1").passed
        assert registry.aliases == {"champion": "1"}
        promoted(registry, "2")
        assert registry.aliases == {"champion": "2", "previous": "1"}
        promote(registry.config, gate=ANY)  # by default the challenger
        assert registry.aliases == {"champion": "3", "previous": "2"}

    def test_a_no_moves_nothing_and_is_written_down(self, registry: Registry) -> None:
        promoted(registry, "1")
        with pytest.raises(GateError, match="floor ndcg@10") as caught:
            promote(registry.config, version="2", gate=NEVER, gate_name="never")
        assert "'never' refuses version 2" in str(caught.value)
        assert "@champion is version 1" in str(caught.value)
        assert registry.aliases == {"champion": "1"}
        tags = registry.tags("2")
        assert tags["qbrec.gate"] == "refused"
        report = last(tags)
        assert report is not None
        assert (report["gate"], report["champion"], report["passed"]) == ("never", "1", False)
        assert [check["passed"] for check in report["checks"]] == [False]
        assert "< 0.9900" in report["checks"][0]["reason"]

    def test_the_champion_is_compared_user_by_user(self, registry: Registry) -> None:
        promoted(registry, "2")
        with pytest.raises(GateError, match=r"not worse than @champion in ndcg@10: difference -0\."):
            promote(registry.config, version="1", gate=GateConfig(max_loss={"ndcg@10": 0.0}))
        tail = GateConfig(max_loss={"ndcg@10": 1.0, "tail/hr@10": 0.0})
        with pytest.raises(GateError, match="NO  not worse than @champion in tail/hr@10"):
            promote(registry.config, version="1", gate=tail)
        assert promote(registry.config, version="1", gate=GateConfig(max_loss={"ndcg@10": 1.0})).passed

    def test_the_champion_again(self, registry: Registry) -> None:
        promoted(registry, "1", "2")
        assert promote(registry.config, version="2").passed
        assert registry.aliases == {"champion": "2", "previous": "1"}
        with pytest.raises(GateError):  # the gate is asked again, also about the champion itself
            promote(registry.config, version="2", gate=NEVER)
        assert registry.aliases == {"champion": "2", "previous": "1"}

    def test_no_such_version(self, registry: Registry) -> None:
        with pytest.raises(RegistryError, match="no version 99"):
            promote(registry.config, version="99")
        client, _ = connect(registry.config)
        client.delete_registered_model_alias("qbrec", "challenger")
        with pytest.raises(RegistryError, match="no @challenger"):
            promote(registry.config)
        other = registry.config.registry.model_copy(update={"model_name": "unknown"})
        with pytest.raises(RegistryError, match="no @challenger"):
            promote(registry.config.model_copy(update={"registry": other}))

    def test_verdicts_are_remembered_but_not_without_end(self, registry: Registry) -> None:
        promoted(registry, "1")
        with pytest.raises(GateError):
            promote(registry.config, version="2", gate=NEVER, gate_name="never")
        promote(registry.config, version="2", gate=ANY, gate_name="any")
        found = history(registry.tags("2"))
        assert [(one["gate"], one["passed"], one["champion"]) for one in found] == [
            ("never", False, "1"),
            ("any", True, "1"),
        ]
        assert found[0]["refused"] == ["floor ndcg@10"]
        client, _ = connect(registry.config)
        for number in range(MOST_ENTRIES + 2):
            note(client, "qbrec", Verdict("2", "1", f"g{number}", "now", ()), tags=registry.tags("2"))
        kept = [one["gate"] for one in history(registry.tags("2"))]
        assert kept == [f"g{number}" for number in range(2, MOST_ENTRIES + 2)]
        checks = tuple(Check(f"floor a_long_name_{number}/hr@10", False, "") for number in range(30))
        for _ in range(8):
            note(client, "qbrec", Verdict("2", "1", "long", "now", checks), tags=registry.tags("2"))
        text = registry.tags("2")["qbrec.gate.history"]
        assert len(text) <= MOST_CHARACTERS
        assert [one["gate"] for one in json.loads(text)] == ["long"] * len(json.loads(text))
        assert 1 < len(json.loads(text)) < 8


class TestRollback:
    def test_step_by_step_to_the_beginning(self, registry: Registry) -> None:
        with pytest.raises(RegistryError, match="no @champion"):
            rollback(registry.config)
        promoted(registry, "1")
        with pytest.raises(RegistryError, match="no @previous"):
            rollback(registry.config)
        promoted(registry, "2", "3")
        assert rollback(registry.config) == "2"
        assert registry.aliases == {"champion": "2", "previous": "1"}
        assert "qbrec.rolled_back" in registry.tags("3")
        assert rollback(registry.config) == "1"
        assert registry.aliases == {"champion": "1"}
        with pytest.raises(RegistryError, match="no @previous"):
            rollback(registry.config)
        promoted(registry, "3")  # and forward again
        assert registry.aliases == {"champion": "3", "previous": "1"}

    def test_a_champion_that_came_back(self, registry: Registry) -> None:
        promoted(registry, "1", "2", "3", "1")
        served = []
        while "previous" in registry.aliases:
            served.append(rollback(registry.config))
        assert served == ["3", "2", "1"]

    def test_an_alias_set_by_hand_is_believed(self, registry: Registry) -> None:
        promoted(registry, "1", "3")
        client, _ = connect(registry.config)
        client.set_registered_model_alias("qbrec", "previous", "2")
        assert rollback(registry.config) == "2"
        assert registry.aliases == {"champion": "2", "previous": "1"}
        client.set_registered_model_alias("qbrec", "champion", "3")
        promoted(registry, "1")
        assert registry.aliases == {"champion": "1", "previous": "3"}
        client.delete_registered_model_tag("qbrec", LINE_TAG)
        assert rollback(registry.config) == "3"
        client.set_registered_model_tag("qbrec", LINE_TAG, "no JSON")
        promoted(registry, "2")
        assert rollback(registry.config) == "3"


class TestMissing:
    def test_the_champion_was_deleted(self, registry: Registry) -> None:
        client, _ = connect(registry.config)
        promoted(registry, "1", "2")
        client.delete_model_version("qbrec", "2")
        assert registry.aliases == {"previous": "1"}
        verdict = promote(registry.config, version="3")
        assert [check.reason for check in verdict.checks] == ["there is no @champion"]
        assert registry.aliases == {"champion": "3", "previous": "1"}

    def test_back_from_a_deleted_champion(self, registry: Registry) -> None:
        client, _ = connect(registry.config)
        promoted(registry, "1", "2")
        client.delete_model_version("qbrec", "2")
        assert rollback(registry.config) == "1"
        assert registry.aliases == {"champion": "1"}

    def test_the_last_one_that_served_is_promoted_again(self, registry: Registry) -> None:
        client, _ = connect(registry.config)
        promoted(registry, "1", "2")
        client.delete_model_version("qbrec", "2")
        promoted(registry, "1")
        assert registry.aliases == {"champion": "1"}

    def test_a_deleted_version_is_stepped_over(self, registry: Registry) -> None:
        client, _ = connect(registry.config)
        promoted(registry, "1", "2", "3")
        client.delete_model_version("qbrec", "2")
        assert registry.aliases == {"champion": "3"}
        assert rollback(registry.config) == "1"
        assert registry.aliases == {"champion": "1"}

    def test_an_alias_that_leads_nowhere(self, registry: Registry) -> None:
        """Some stores keep the alias of a version that they deleted."""
        promoted(registry, "1", "2")
        with sqlite3.connect(Path(registry.config.run.storage) / "mlflow.db") as database:
            stage = "UPDATE model_versions SET current_stage = 'Deleted_Internal'"
            assert database.execute(f"{stage} WHERE name = 'qbrec' AND version = 2").rowcount == 1
        database.close()
        client, _ = connect(registry.config)
        assert str(client.get_registered_model("qbrec").aliases["champion"]) == "2"
        assert promote(registry.config, version="3").checks[0].reason == "there is no @champion"
        assert registry.aliases == {"champion": "3", "previous": "1"}

    def test_what_the_challenger_lacks(self, registry: Registry) -> None:
        promoted(registry, "1")
        with broken(registry.bundle("2") / "evaluation" / "metrics.json"):
            with pytest.raises(DataError, match="damaged") as caught:
                promote(registry.config, version="2", gate=ANY)
            assert "metrics.json" in str(caught.value)
        with moved(registry.bundle("2") / "evaluation"), pytest.raises(DataError, match="lacks its file"):
            promote(registry.config, version="2", gate=ANY)
        with moved(registry.bundle("2")), pytest.raises(DataError, match="holds no bundle of qbrec"):
            promote(registry.config, version="2", gate=ANY)
        assert registry.aliases == {"champion": "1"}
        assert "qbrec.gate" not in registry.tags("2")

    @pytest.mark.parametrize("harm", [broken, moved])
    def test_the_champions_evaluation_is_lost(self, registry: Registry, harm: Harm) -> None:
        promoted(registry, "1")
        with harm(registry.bundle("1") / "evaluation" / "ranks.parquet"):
            with pytest.raises(GateError, match="the evaluation of @champion, version 1, cannot be read"):
                promote(registry.config, version="2", gate=GateConfig())
            assert registry.aliases == {"champion": "1"}
            with pytest.raises(GateError, match=r"floor ndcg@10(.|\n)*floors decide"):
                promote(registry.config, version="2", gate=FLOORS_DECIDE)
            assert promote(registry.config, version="2", gate=GateConfig(damaged_champion="floors")).passed
        assert registry.aliases == {"champion": "2", "previous": "1"}

    def test_the_champions_files_cannot_be_reached(self, registry: Registry) -> None:
        """No verdict on the challenger: repeating the command may well promote it."""
        promoted(registry, "1")
        path = registry.bundle("1") / "bundle.json"
        with moved(path):
            path.symlink_to(path.name)  # listed, but reading it fails
            try:
                with pytest.raises(RegistryError, match="files of version 1 cannot be fetched"):
                    promote(registry.config, version="2", gate=GateConfig(damaged_champion="floors"))
            finally:
                path.unlink()
        assert registry.aliases == {"champion": "1"}
        assert "qbrec.gate" not in registry.tags("2")

    def test_the_champion_has_other_features_of_the_same_items(
        self, registry: Registry, tmp_path: Path
    ) -> None:
        other = registry_run(tmp_path / "other", features=1)
        assert other.artifacts["catalog"].fingerprint != registry.runs["1"].artifacts["catalog"].fingerprint
        version = register(registry.config, other.run_dir, other.artifacts)
        promoted(registry, "1")
        verdict = promote(registry.config, version=version, gate=GateConfig(max_loss={"ndcg@10": 1.0}))
        assert "not worse than @champion in ndcg@10" in str(verdict)

    def test_the_champion_is_of_another_catalogue(self, registry: Registry, tmp_path: Path) -> None:
        other = registry_run(tmp_path / "other", shop="b")
        version = register(registry.config, other.run_dir, other.artifacts)
        promoted(registry, "1")
        with pytest.raises(GateError, match="other items or histories"):
            promote(registry.config, version=version)
        assert registry.aliases == {"champion": "1"}
        assert promote(registry.config, version=version, gate=GateConfig(other_catalog="floors")).passed
        assert registry.aliases == {"champion": version, "previous": "1"}
