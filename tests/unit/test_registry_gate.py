"""The gate's arithmetic and words, and the folder that must never become a package."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qbrec.config.sections import GateConfig, IdGateConfig
from qbrec.errors import ConfigError, DataError, RegistryError
from qbrec.ranking import METRICS, metrics_of_ranks
from qbrec.registry.checks import check_coldstart, check_floors, check_ids
from qbrec.registry.comparison import Comparison, Evaluated, Paired, check_champion, paired_interval
from qbrec.registry.gate import load_gate, named_gate
from qbrec.registry.line import Served
from qbrec.registry.lock import registry_lock
from qbrec.registry.model import requirements, serving_script
from qbrec.storage.artifact import Artifact, ArtifactStore

ROOT = Path(__file__).parents[2]


def catalogue(root: Path, *, histories: bytes = b"walks", features: bytes = b"features") -> Artifact:
    writer = ArtifactStore(root).writer("catalog", "0" * 64)
    writer.prepare()
    writer.write_bytes("hashes.npy", b"items")
    writer.write_bytes("histories-000000.tar", histories)
    writer.write_bytes("items-000000.tar", features)
    return writer.commit(meta={}, inputs={}, config={}, seed=0)


def evaluation(
    root: Path, ranks: np.ndarray, *, users: np.ndarray | None = None, catalog: str = "shop"
) -> Artifact:
    store = ArtifactStore(root)
    writer = store.writer("evaluation", f"{abs(hash(ranks.tobytes())):064x}")
    writer.prepare()
    users = np.arange(len(ranks)) if users is None else users
    table = pa.table(
        {
            "user": users,
            "domain": np.zeros(len(ranks), np.uint8),
            "target_row": users * 3,
            "qbrec_removed": ranks,
            "in_tail": users % 2 == 1,
            "in_cold": users < 0,
        }
    )
    pq.write_table(table, writer.path / "ranks.parquet")
    return writer.commit(meta={}, inputs={"catalog": catalog}, config={}, seed=0)


def of_catalog(root: Path, ranks: np.ndarray, catalog: Artifact) -> Evaluated:
    return Evaluated(evaluation(root, ranks, catalog=catalog.fingerprint), lambda: catalog)


def gone() -> Artifact:
    raise AssertionError("nobody needs the catalogue of versions that share one")


class TestFolder:
    def test_mlflow_is_no_package(self) -> None:
        assert (ROOT / "mlflow" / "MLproject").is_file()
        assert not list((ROOT / "mlflow").rglob("__init__.py")), "it would shadow the real mlflow"

    def test_import_finds_the_real_one_from_the_root(self) -> None:
        code = "import importlib.util as u; print(u.find_spec('mlflow').origin)"
        out = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert "site-packages" in out.stdout

    def test_serving_script_is_found(self) -> None:
        assert serving_script().name == "serving_model.py"

    def test_requirements_are_exact_and_public(self) -> None:
        assert all("==" in line and "+" not in line for line in requirements())

    def test_gates_are_found_by_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        name, gate = named_gate("default")
        assert name == "default"
        assert gate.min_metrics
        assert gate.other_catalog == "refuse"
        assert named_gate("strict")[1] == load_gate(ROOT / "mlflow" / "gates" / "strict.yaml")
        with pytest.raises(ConfigError, match="no gate 'lenient'") as caught:
            named_gate("lenient")
        assert "one of default, strict" in str(caught.value)
        monkeypatch.chdir(tmp_path)
        Path("lenient.yaml").write_text("max_loss: {mrr: 0.5}")
        name, gate = named_gate("lenient.yaml")
        assert (name, gate.max_loss) == ("lenient", {"ndcg@10": 0.002, "mrr": 0.5})

    def test_the_strict_gate_asks_everything(self) -> None:
        _, gate = named_gate("strict")
        asked = [*gate, *gate.ids, *gate.latency]
        assert [key for key, value in asked if value is None or value == {}] == []

    def test_project_calls_commands_that_exist(self) -> None:
        from mlflow.projects._project_spec import load_project

        from qbrec.cli.run import run

        command = load_project(str(ROOT / "mlflow")).get_entry_point("main").command
        known = {option for parameter in run.params for option in parameter.opts}
        assert command.startswith("qbrec run ")
        assert {word for word in command.split() if word.startswith("--")} <= known

    def test_wrong_gate(self, tmp_path: Path) -> None:
        (tmp_path / "gate.yaml").write_text("min_metric: {a: 1}\n")
        with pytest.raises(ConfigError, match="min_metrics"):
            load_gate(tmp_path / "gate.yaml")
        for text in (
            "min_metrics: {ndgc@10: 1}",
            "max_loss: {hr@10: -1}",
            "min_coldstart: {hr@10: 1}",
            "- 1",
        ):
            (tmp_path / "gate.yaml").write_text(text)
            with pytest.raises(ConfigError, match=r"registry\.gate"):
                load_gate(tmp_path / "gate.yaml")
        with pytest.raises(ConfigError, match="cannot read"):
            load_gate(tmp_path / "none.yaml")


class TestInterval:
    @pytest.mark.parametrize("continuous", [False, True])
    def test_agrees_with_drawing_users(self, continuous: bool) -> None:
        rng = np.random.default_rng(1)
        differences = rng.choice([0.0, 0.0, 0.0, 0.3, -0.2, 1.0], size=400)
        if continuous:  # as many values as users, as MRR has
            differences = np.repeat(differences, 3) + rng.normal(0, 1e-6, 1200)
        size = len(differences)
        found = paired_interval(differences, seed=0)
        draws = rng.integers(0, size, size=(4000, size))
        plain = np.quantile(differences[draws].mean(1), [0.025, 0.975])
        assert found.mean == pytest.approx(differences.mean())
        assert (found.low, found.high) == pytest.approx(tuple(plain), abs=0.006)

    def test_no_difference(self) -> None:
        assert paired_interval(np.zeros(50), seed=0) == Paired(0.0, 0.0, 0.0, 50)


class TestChecks:
    def test_floors(self) -> None:
        cells = {"qbrec": {"removed": {"ndcg@10": {"mean": 0.2}}}}
        tail = {"qbrec": {"removed": {"ndcg@10": {"mean": 0.01}}}}
        metrics = {"models": cells, "slices": {"tail": {"models": tail}, "cold": {"models": {}}}}
        floors = {"ndcg@10": 0.1, "hr@10": 0.1, "tail/ndcg@10": 0.1, "gone/hr@1": 0.0, "cold/hr@1": 0.0}
        checks = {check.name: check for check in check_floors(metrics, floors)}
        assert checks.pop("floor ndcg@10").passed
        assert not any(check.passed for check in checks.values())
        assert {name: check.reason for name, check in checks.items()} == {
            "floor hr@10": "the evaluation has no such metric",
            "floor tail/ndcg@10": "0.0100 < 0.1000",
            "floor gone/hr@1": "the evaluation has no slice 'gone', only cold, tail",
            "floor cold/hr@1": "the evaluation has nobody in the slice 'cold'",
        }
        assert not check_floors(metrics, {"ndcg@10": 0.3})[0].passed
        assert check_floors(metrics, {"tail/ndcg@10": 0.01})[0].passed

    @pytest.mark.parametrize(
        ("key", "passes", "refuses", "reason"),
        [
            ("min_no_collision_rate", 0.9, 0.91, "90.0% < 91.0%"),
            ("min_perplexity_share", 0.5, 0.6, "50.0% < 60.0%"),
            ("max_largest_bucket", 7, 6, "7 > 6"),
        ],
    )
    def test_semantic_ids(self, key: str, passes: float, refuses: float, reason: str) -> None:
        levels = [{"perplexity": 8.0, "codes": 16}, {"perplexity": 1.0, "codes": 16}]
        quality = {"levels": levels, "no_collision_rate": 0.9, "largest_bucket": 7}
        (check,) = check_ids(quality, IdGateConfig.model_validate({key: passes}))
        assert check.passed
        (check,) = check_ids(quality, IdGateConfig.model_validate({key: refuses}))
        assert (check.passed, check.reason) == (False, reason)
        assert check_ids(quality, IdGateConfig()) == ()

    def test_coldstart(self) -> None:
        def race(value: float) -> dict[str, object]:
            table = {"models": {"qbrec": {"removed": {"hr@10": {"mean": value}}}}}
            return {**table, "slices": {"non_duplicate": table}}

        document = {"catalogue": race(0.1), "held_out": race(0.4)}
        floors = {"held_out/hr@10": 0.3, "catalogue/hr@10": 0.3, "held_out/non_duplicate/hr@10": 0.4}
        passed = {check.name: check.passed for check in check_coldstart(document, floors)}
        assert passed == {
            "cold start, floor held_out/hr@10": True,
            "cold start, floor catalogue/hr@10": False,
            "cold start, floor held_out/non_duplicate/hr@10": True,
        }
        (check,) = check_coldstart(document, {"held_out/mrr": 0.0})
        assert (check.passed, check.reason) == (False, "the measurement has no such metric")
        (check,) = check_coldstart(None, {"held_out/hr@10": 0.0})
        assert not check.passed
        assert "run `qbrec coldstart`" in check.reason
        assert check_coldstart(None, {}) == ()

    def test_champion(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        base = rng.integers(1, 30, size=500)
        champion = evaluation(tmp_path, base)
        order = rng.permutation(500)  # the order of rows must not matter
        same = evaluation(tmp_path / "same", base[order], users=order)
        better = evaluation(tmp_path / "better", np.maximum(base - 3, 1))
        worse = evaluation(tmp_path / "worse", base + 3)

        def passed(challenger: Artifact, **loss: float) -> list[bool]:
            gate = GateConfig(max_loss={name.replace("_", "/", 1): x for name, x in loss.items()})
            pair = Evaluated(challenger, gone), Evaluated(champion, gone)
            return [check.passed for check in check_champion(*pair, gate=gate, seed=0)]

        small = {"ndcg@10": 0.002}
        assert passed(same, **small) == passed(better, **small) == [True]
        assert passed(worse, **small) == [False]
        assert passed(worse, **{"ndcg@10": 0.9}) == [True]
        # Worse in the tail alone, better by more elsewhere: only who asks for the tail sees it.
        users = np.arange(500)
        mixed = evaluation(tmp_path / "mixed", np.where(users % 2, base + 3, np.maximum(base - 9, 1)))
        assert passed(mixed, **small) == [True]
        assert passed(mixed, **small, **{"tail_ndcg@10": 0.002}) == [True, False]
        assert passed(mixed, **{"tail_mrr": 0.9}) == [True]
        assert passed(mixed, **{"cold_hr@10": 1.0, "gone_hr@10": 1.0, "hr@7": 1.0}) == [False, False, False]
        wrong = ("cold/hr@10", "gone/hr@10", "hr@7")
        reasons = [Comparison(mixed, champion, seed=0).of(name) for name in wrong]
        assert reasons[:2] == [
            "nobody is in the slice 'cold'",
            "the evaluation has no slice 'gone', only cold, tail",
        ]
        assert "no such metric" in str(reasons[2])

    def test_the_difference_is_that_of_the_means(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(2)
        ranks = [rng.integers(1, 40, size=300) for _ in range(2)]
        pair = [evaluation(tmp_path / str(i), one) for i, one in enumerate(ranks)]
        comparison = Comparison(*pair, seed=0)
        gaps = metrics_of_ranks(ranks[0]) - metrics_of_ranks(ranks[1])
        for column, name in enumerate(METRICS):
            found = comparison.of(name)
            assert isinstance(found, Paired)
            assert found.mean == pytest.approx(gaps[:, column].mean())
            assert found.low < found.mean < found.high
            tail = comparison.of(f"tail/{name}")
            assert isinstance(tail, Paired)
            assert tail.mean == pytest.approx(gaps[1::2, column].mean())
            assert tail.num_users == 150

    def test_other_users_or_histories(self, tmp_path: Path) -> None:
        ranks, shop = np.arange(1, 21), catalogue(tmp_path)
        champion = of_catalog(tmp_path, ranks, shop)
        fewer = of_catalog(tmp_path / "a", ranks[:10], shop)
        (check,) = check_champion(fewer, champion, gate=GateConfig(), seed=0)
        assert not check.passed
        assert "same users" in check.reason
        other = of_catalog(tmp_path / "b", ranks, catalogue(tmp_path / "b", histories=b"others"))
        (check,) = check_champion(other, champion, gate=GateConfig(), seed=0)
        assert not check.passed
        assert "`other_catalog: floors` in the gate" in check.reason
        (check,) = check_champion(other, champion, gate=GateConfig(other_catalog="floors"), seed=0)
        assert check.passed

    def test_other_features_of_the_same_items_can_be_compared(self, tmp_path: Path) -> None:
        ranks = np.arange(1, 21)
        plain, encoded = catalogue(tmp_path), catalogue(tmp_path / "a", features=b"of another text encoder")
        assert encoded.fingerprint != plain.fingerprint
        pair = of_catalog(tmp_path / "a", ranks, encoded), of_catalog(tmp_path, ranks, plain)
        (check,) = check_champion(*pair, gate=GateConfig(other_catalog="floors"), seed=0)
        assert check.name == "not worse than @champion in ndcg@10"
        assert check.passed

    def test_missing_column(self, tmp_path: Path) -> None:
        store = ArtifactStore(tmp_path)
        writer = store.writer("evaluation", "0" * 64)
        writer.prepare()
        pq.write_table(pa.table({"user": [1]}), writer.path / "ranks.parquet")
        bad = writer.commit(meta={}, inputs={}, config={}, seed=0)
        with pytest.raises(DataError, match="qbrec_removed"):
            Comparison(bad, bad, seed=0)


def test_lock_excludes(tmp_path: Path) -> None:
    entered = threading.Event()
    leave = threading.Event()

    def hold() -> None:
        with registry_lock(tmp_path):
            entered.set()
            leave.wait(10)

    holder = threading.Thread(target=hold)
    holder.start()
    entered.wait(10)
    with pytest.raises(RegistryError, match="another process"), registry_lock(tmp_path, timeout_s=0.2):
        pass
    leave.set()
    holder.join()
    with registry_lock(tmp_path, timeout_s=0.2):
        pass


class TestLine:
    """What served before, from aliases and line."""

    def test_before_and_after(self) -> None:
        served = Served({"champion": "3", "previous": "2"}, ("1", "2", "3"))
        assert (served.before, served.cut_off) == ("2", False)
        assert served.followed_by("4") == ("1", "2", "3", "4")
        assert served.followed_by("3") == ("1", "2", "3")
        assert served.back_at("2") == ("1", "2")
        assert served.back_at("7") == ("1", "2", "7")
        assert Served({"champion": "1", "previous": "1"}, ("1",)).cut_off
        assert Served({"champion": "2", "previous": "2"}, ("1", "2")).back_at("2") == ("1", "2")

    def test_nobody_serves(self) -> None:
        gone = Served({}, ("1", "2"))
        assert (gone.before, gone.cut_off) == ("2", False)
        assert gone.back_at("2") == ("1", "2")
        assert Served({}, ()).before is None
