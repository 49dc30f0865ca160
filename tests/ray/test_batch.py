"""Recommendations for many users: the same lists as one by one, for any number of workers, after any kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qbrec.catalog.sources import list_files
from qbrec.config import dump_config
from qbrec.config.sections import ComputeConfig
from qbrec.errors import ConfigError, DataError, LaunchError
from qbrec.registry.recommend import Recommender
from qbrec.registry.versions import register
from qbrec.run_record import RunRecord
from qbrec.serving.batch import recommend_users
from qbrec.serving.model import ServedModel
from qbrec.serving.output import IDENTITY, SCHEMA, SUMMARY, BatchFolder, total
from qbrec.serving.users import NO_HISTORY, NO_ITEM, NO_USER, catalogue_units, file_units
from qbrec.serving.versions import fetch_bundle, find_version
from qbrec.serving.worker import BatchJob, RankWorker, Wanted
from qbrec.storage.catalog_view import CatalogView
from qbrec.storage.folder import Folder
from tests.support.cli import ROOT
from tests.support.mlflow_store import copy_store
from tests.support.s3_server import FaultProxy
from tests.support.tiny_run import TinyRun, tiny_run

K = 7
Lists = dict[str, tuple[list[str], list[float], list[str]]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> TinyRun:
    # Blocks of a few users: several units.
    run = tiny_run(tmp_path_factory.mktemp("batch"), catalog={"block_bytes": 2000})
    copy_store(tmp_path_factory.getbasetemp(), Path(run.config.run.storage))
    assert CatalogView(run.artifacts["catalog"]).histories().num_blocks > 5
    record = RunRecord.own(run.config, resume="never")
    record.stages = {name: {"path": str(found.path)} for name, found in run.artifacts.items()}
    record.save()
    record.close()
    return run


@pytest.fixture(scope="module")
def model(tiny: TinyRun) -> ServedModel:
    return ServedModel.of_run(tiny.config, tiny.artifacts)


@pytest.fixture(scope="module")
def recommender(model: ServedModel) -> Recommender:
    return model.open()


@pytest.fixture(scope="module")
def users(tiny: TinyRun) -> dict[str, list[str]]:
    """Whole histories, validation and test items included."""
    catalog = CatalogView(tiny.artifacts["catalog"])
    histories = catalog.load_histories("shop")
    names = catalog.user_ids(histories.user)
    return {name: catalog.item_ids(histories.rows.row(i)) for i, name in enumerate(names)}


@pytest.fixture(scope="module")
def everybody(model: ServedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("everybody")
    batch(model, out)
    return out


def batch(
    model: ServedModel,
    out: Path | str,
    *,
    workers: int = 1,
    device: Any = "cpu",
    users: Any = "all",
    **wanted: Any,
) -> Any:
    told: list[str] = []
    summary = recommend_users(
        model,
        users=str(users),
        out=str(out),
        wanted=Wanted(**{"k": K} | wanted),
        compute=ComputeConfig(num_workers=workers, device=device),
        warn=told.append,
    )
    return summary | {"told": told}


def in_process(
    model: ServedModel, out: Path, units: list[dict[str, Any]], *, own: bool, **wanted: Any
) -> None:
    """What the actors do, without them."""
    worker = RankWorker(BatchJob(model, Wanted(**{"k": K} | wanted), str(out), own_histories=own))
    for unit in units:
        (counts,) = worker(pa.Table.from_pylist([unit])).to_pylist()
        assert (counts["number"], counts["rows"]) == (unit["number"], unit["rows"])


def read(out: Path | str, prefix: str = "part") -> pa.Table:
    folder = Folder(str(out))
    names = sorted(name for name in folder.sizes() if name.startswith(prefix) and name.endswith(".parquet"))
    tables = [pq.read_table(pa.BufferReader(folder.read(name))) for name in names]
    assert all(prefix != "part" or table.schema.equals(SCHEMA) for table in tables)
    return pa.concat_tables(tables)


def lists(out: Path | str) -> Lists:
    rows = read(out).to_pylist()
    found = {row["user_id"]: (row["item_id"], row["score"], row["semantic_id"]) for row in rows}
    assert len(found) == len(rows)
    return found


def assert_lists(found: Lists, expected: list[list[Any]], names: list[str]) -> None:
    assert sorted(found) == sorted(names)
    for name, items in zip(names, expected, strict=True):
        assert found[name][0] == [item["item_id"] for item in items]
        assert found[name][2] == [item["semantic_id"] for item in items]
        # Histories that are ranked together are summed together.
        np.testing.assert_allclose(found[name][1], [item["score"] for item in items], rtol=1e-5)


def whole(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != SUMMARY}


class TestEverybody:
    def test_is_what_each_of_them_gets_alone(
        self, everybody: Path, recommender: Recommender, users: dict[str, list[str]]
    ) -> None:
        assert_lists(lists(everybody), recommender.recommend(list(users.values()), k=K), list(users))
        summary = json.loads((everybody / SUMMARY).read_text())
        assert (summary["users"], summary["rejected"], summary["unknown_items"]) == (len(users), 0, 0)
        assert summary["users_per_second"] > 0
        assert not [path for path in everybody.iterdir() if path.suffix == ".tmp"]

    def test_two_workers_write_the_same_bytes(
        self, model: ServedModel, everybody: Path, tmp_path: Path
    ) -> None:
        batch(model, tmp_path, workers=2)
        assert whole(tmp_path) == whole(everybody)

    def test_parts_that_are_there_are_kept_and_others_made(
        self, model: ServedModel, everybody: Path, tmp_path: Path
    ) -> None:
        for name, data in whole(everybody).items():
            (tmp_path / name).write_bytes(data)
        (tmp_path / "part-00001.parquet").unlink()
        broken = tmp_path / "part-00002.parquet"
        broken.write_bytes(broken.read_bytes()[:-5])
        (tmp_path / "part-00003.parquet.77.tmp").write_bytes(b"half")
        kept = tmp_path / "part-00000.parquet"
        before = kept.stat().st_mtime_ns
        summary = batch(model, tmp_path)
        assert whole(tmp_path) == whole(everybody)
        assert kept.stat().st_mtime_ns == before
        assert summary["units_kept"] == summary["units"] - 2
        assert summary["users"] == json.loads((everybody / SUMMARY).read_text())["users"]
        written = (tmp_path / SUMMARY).stat().st_mtime_ns
        assert batch(model, tmp_path)["seconds"] == summary["seconds"]  # nothing left: nothing is written
        assert (tmp_path / SUMMARY).stat().st_mtime_ns == written

    def test_filters_and_seen_items(
        self, model: ServedModel, recommender: Recommender, users: dict[str, list[str]], tmp_path: Path
    ) -> None:
        stock = tuple(recommender.popular(12))
        units = catalogue_units(CatalogView(model.artifact("catalog")).histories())
        in_process(model, tmp_path, units, own=True, k=12, keep_seen=True, only=stock)
        among = recommender.only(item_ids=stock)
        expected = recommender.recommend(list(users.values()), k=12, keep_seen=True, among=among)
        assert_lists(lists(tmp_path), expected, list(users))
        assert all(set(found[0]) == set(stock) for found in lists(tmp_path).values())

    def test_another_batch_is_refused(self, model: ServedModel, everybody: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="holds another batch: k was 7, is 3") as caught:
            batch(model, everybody, k=3)
        assert IDENTITY in str(caught.value)
        other = ServedModel(
            {**model.fingerprints, "finetune": "0" * 64}, model.ranking, model.paths, model.storage
        )
        with pytest.raises(ConfigError, match=r"another batch: model\.finetune is another"):
            batch(other, everybody)
        (tmp_path / "part-00000.parquet").write_bytes(b"")
        with pytest.raises(ConfigError, match=f"there is no {IDENTITY}"):
            batch(model, tmp_path)

    def test_wrong_options_show_before_anything_is_written(self, model: ServedModel, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="k is 0"):
            batch(model, tmp_path, k=0)
        with pytest.raises(DataError, match="no item on offer is in the category"):
            batch(model, tmp_path, categories=("nowhere",))
        assert not (tmp_path / IDENTITY).exists()


class TestFiles:
    def test_own_histories_and_unknown_users(
        self, model: ServedModel, everybody: Path, tmp_path: Path
    ) -> None:
        expected = lists(everybody)
        names = sorted(expected)[:9]
        table = pa.table({"user_id": [*names[:5], "nobody", *names[5:], "", None], "age": range(12)})
        pq.write_table(table, tmp_path / "users.parquet", row_group_size=4)
        summary = batch(model, tmp_path / "out", users=tmp_path / "users.parquet", workers=2)
        found = lists(tmp_path / "out")
        assert {name: found[name][0] for name in names} == {name: expected[name][0] for name in names}
        assert len(found) == len(names)
        assert read(tmp_path / "out", "rejected").to_pylist() == [
            {"user_id": "nobody", "reason": NO_USER},
            {"user_id": "", "reason": "user_id: is empty"},
            {"user_id": None, "reason": "user_id: is null"},
        ]
        assert (summary["users"], summary["rejected"], summary["units"]) == (9, 3, 3)
        assert "3 users got no list" in summary["told"][0]

    def test_brought_histories(
        self, model: ServedModel, recommender: Recommender, users: dict[str, list[str]], tmp_path: Path
    ) -> None:
        given = {
            "a": users[min(users)],
            "b": ["unknown", *recommender.popular(2), "unknown too", None],
            "c": [],
            "d": None,
            "e": ["unknown"],
        }
        kind = pa.list_(pa.string())
        (tmp_path / "in").mkdir()
        for number, name in enumerate(given):
            table = pa.table({"user_id": [name], "history": pa.array([given[name]], kind)})
            pq.write_table(table, tmp_path / "in" / f"{number}.parquet")
        units, with_history = file_units(list_files(str(tmp_path / "in"), where="--users"))
        assert with_history
        in_process(model, tmp_path / "out", units, own=False)
        expected = recommender.recommend([given["a"], recommender.popular(2)], k=K)
        assert_lists(lists(tmp_path / "out"), expected, ["a", "b"])
        reasons = {row["user_id"]: row["reason"] for row in read(tmp_path / "out", "rejected").to_pylist()}
        assert reasons == {"c": NO_HISTORY, "d": NO_HISTORY, "e": NO_ITEM}
        counts = total(list(BatchFolder(str(tmp_path / "out")).done().values()))
        assert counts == {"users": 2, "rejected": 3, "unknown_items": 4}

    def test_changed_input_is_another_batch(self, model: ServedModel, users: Any, tmp_path: Path) -> None:
        path = tmp_path / "users.parquet"
        pq.write_table(pa.table({"user_id": [min(users)]}), path)
        with pytest.raises(LaunchError, match="has no GPU"):  # claimed, then it goes no further
            batch(model, tmp_path / "out", users=path, device="cuda")
        pq.write_table(pa.table({"user_id": [max(users)]}), path)
        with pytest.raises(ConfigError, match="another batch: users is another"):
            batch(model, tmp_path / "out", users=path)

    def test_a_registered_version_gives_the_same(
        self, tiny: TinyRun, model: ServedModel, everybody: Path, users: dict[str, list[str]], tmp_path: Path
    ) -> None:
        number = register(tiny.config, tiny.run_dir, tiny.artifacts)
        version = find_version(tiny.config, "models:/qbrec@challenger")
        assert (version.number, version.run) == (number, "tiny")
        assert version == find_version(tiny.config, f"models:/qbrec/{number}")
        served = ServedModel.of_bundle(fetch_bundle(tiny.config, version))
        assert served.fingerprints == model.fingerprints
        table = pa.table({"user_id": list(users), "history": list(users.values())})
        pq.write_table(table, tmp_path / "users.parquet")
        units, _ = file_units(list_files(str(tmp_path / "users.parquet"), where="--users"))
        in_process(served, tmp_path / "out", units, own=False)
        expected, found = lists(everybody), lists(tmp_path / "out")
        assert {name: found[name][0] for name in found} == {name: expected[name][0] for name in expected}
        for given in ("all", tmp_path / "ids.parquet"):
            pq.write_table(table.select(["user_id"]), tmp_path / "ids.parquet")
            with pytest.raises(ConfigError, match="carries no"):
                batch(served, tmp_path / "none", users=given)


def test_kill_and_repeat_on_s3(tiny: TinyRun, everybody: Path, s3: FaultProxy, tmp_path: Path) -> None:
    """`kill -9` of the driver while the third part is uploaded; the same command goes on."""
    import ray

    bucket = s3.bucket()
    config = tmp_path / "config.yaml"
    config.write_text(dump_config(tiny.config))
    command = [sys.executable, "-m", "qbrec", "recommend", "--config", str(config), "--users", "all"]
    command += ["--out", f"{bucket}/lists", "--k", str(K), "--workers", "1", "--json"]
    address = ray.get_runtime_context().gcs_address
    started: list[subprocess.Popen[str]] = []

    def kill() -> None:
        started[0].send_signal(signal.SIGKILL)

    fault = s3.fault("meanwhile", r"part-00002\.parquet", method="PUT", action=kill)

    def start() -> subprocess.Popen[str]:
        env = os.environ | {"RAY_ADDRESS": address, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)

    started.append(start())
    assert started[0].wait(300) == -signal.SIGKILL
    assert fault.fired == 1
    left = Folder(f"{bucket}/lists").sizes()
    assert "part-00000.parquet" in left
    assert SUMMARY not in left
    assert IDENTITY in left

    again = start()
    printed, _ = again.communicate(timeout=300)
    assert again.returncode == 0
    summary = json.loads(printed)
    assert 2 <= summary["units_kept"] < summary["units"]
    assert read(f"{bucket}/lists").equals(read(everybody))
