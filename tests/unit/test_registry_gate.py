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

from qbrec.config.sections import GateConfig
from qbrec.errors import ConfigError, DataError, RegistryError
from qbrec.registry.gate import check_champion, check_floors, load_gate, paired_interval
from qbrec.registry.lock import registry_lock
from qbrec.registry.model import requirements, serving_script
from qbrec.storage.artifact import Artifact, ArtifactStore

ROOT = Path(__file__).parents[2]


def evaluation(
    root: Path, ranks: np.ndarray, *, catalog: str = "c", users: np.ndarray | None = None
) -> Artifact:
    store = ArtifactStore(root)
    writer = store.writer("evaluation", f"{abs(hash((ranks.tobytes(), catalog))):064x}")
    writer.prepare()
    users = np.arange(len(ranks)) if users is None else users
    table = pa.table(
        {
            "user": users,
            "domain": np.zeros(len(ranks), np.uint8),
            "target_row": users * 3,
            "qbrec_removed": ranks,
        }
    )
    pq.write_table(table, writer.path / "ranks.parquet")
    return writer.commit(meta={}, inputs={"catalog": catalog}, config={}, seed=0)


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

    def test_default_gate_is_valid(self) -> None:
        gate = load_gate(ROOT / "mlflow" / "gates" / "default.yaml")
        assert gate.min_metrics
        assert gate.other_catalog == "refuse"

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
        with pytest.raises(ConfigError, match="cannot read"):
            load_gate(tmp_path / "none.yaml")


class TestInterval:
    def test_agrees_with_drawing_users(self) -> None:
        rng = np.random.default_rng(1)
        differences = rng.choice([0.0, 0.0, 0.0, 0.3, -0.2, 1.0], size=400)
        mean, low, high = paired_interval(differences, seed=0)
        draws = rng.integers(0, 400, size=(4000, 400))
        plain = np.quantile(differences[draws].mean(1), [0.025, 0.975])
        assert mean == pytest.approx(differences.mean())
        assert (low, high) == pytest.approx(tuple(plain), abs=0.006)

    def test_no_difference(self) -> None:
        assert paired_interval(np.zeros(50), seed=0) == (0.0, 0.0, 0.0)


class TestChecks:
    def test_floors(self) -> None:
        cells = {"qbrec": {"removed": {"ndcg@10": {"mean": 0.2}}}}
        cold = {"qbrec": {"removed": {"ndcg@10": {"mean": 0.01}}}}
        metrics = {"models": cells, "slices": {"cold": {"models": cold}}}
        gate = GateConfig(min_metrics={"ndcg@10": 0.1, "hr@10": 0.1, "cold/ndcg@10": 0.1, "gone/hr@1": 0.0})
        passed = {check.name: check.passed for check in check_floors(metrics, gate=gate)}
        assert passed.pop("floor ndcg@10")
        assert len(passed) == 3
        assert not any(passed.values())
        assert not check_floors(metrics, gate=GateConfig(min_metrics={"ndcg@10": 0.3}))[0].passed

    def test_champion(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        base = rng.integers(1, 30, size=500)
        champion = evaluation(tmp_path, base)
        gate = GateConfig(max_ndcg_loss=0.002)
        order = rng.permutation(500)  # the order of rows must not matter
        same = evaluation(tmp_path / "same", base[order], users=order)
        better = evaluation(tmp_path / "better", np.maximum(base - 3, 1))
        worse = evaluation(tmp_path / "worse", base + 3)
        assert check_champion(same, champion, gate=gate, seed=0).passed
        assert check_champion(better, champion, gate=gate, seed=0).passed
        assert not check_champion(worse, champion, gate=gate, seed=0).passed
        lenient = GateConfig(max_ndcg_loss=0.9)
        assert check_champion(worse, champion, gate=lenient, seed=0).passed

    def test_other_users_or_catalogue(self, tmp_path: Path) -> None:
        ranks = np.arange(1, 21)
        champion = evaluation(tmp_path, ranks)
        fewer = evaluation(tmp_path / "a", ranks[:10])
        assert "same users" in check_champion(fewer, champion, gate=GateConfig(), seed=0).reason
        other = evaluation(tmp_path / "b", ranks, catalog="d")
        assert not check_champion(other, champion, gate=GateConfig(), seed=0).passed
        assert check_champion(other, champion, gate=GateConfig(other_catalog="floors"), seed=0).passed

    def test_missing_column(self, tmp_path: Path) -> None:
        store = ArtifactStore(tmp_path)
        writer = store.writer("evaluation", "0" * 64)
        writer.prepare()
        pq.write_table(pa.table({"user": [1]}), writer.path / "ranks.parquet")
        bad = writer.commit(meta={}, inputs={"catalog": "c"}, config={}, seed=0)
        with pytest.raises(DataError, match="qbrec_removed"):
            check_champion(bad, bad, gate=GateConfig(), seed=0)


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
