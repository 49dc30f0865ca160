"""What a user gets wrong: a message that names place and remedy, an exit code, and nothing destroyed.

Commands run inside this process, so that one local Ray serves them all; `main` is what the script calls.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qbrec.cli.main import main
from tests.support.cli import Road, small_config


@dataclass
class Told:
    """Exit code and what was said."""

    code: int
    text: str


@pytest.fixture
def qbrec(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """Call `qbrec ARGS` and hear what it says."""

    def call(*args: str | Path) -> Told:
        monkeypatch.setattr(sys, "argv", ["qbrec", *map(str, args)])
        capfd.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capfd.readouterr()
        return Told(code, out + err)

    return call


@pytest.fixture(scope="module", autouse=True)
def ray_ends() -> Iterator[None]:
    """Stop the Ray that the commands may have started."""
    yield
    import ray

    ray.shutdown()


class Input:
    """A small valid input whose tables a test may damage before writing."""

    def __init__(self, folder: Path) -> None:
        rng = np.random.default_rng(0)
        ids = [f"i{n:03d}" for n in range(60)]
        vectors = pa.array(rng.normal(size=(60, 8)).astype(np.float32).tolist(), pa.list_(pa.float32()))
        self.folder = folder
        self.items = pa.table(
            {"item_id": ids, "title": [f"thing number {n}" for n in range(60)], "sound_embedding": vectors}
        )
        pairs = [(f"u{u:02d}", ids[i]) for u in range(40) for i in rng.choice(60, 6, replace=False)]
        self.interactions = pa.table(
            {
                "user_id": [user for user, _ in pairs],
                "item_id": [item for _, item in pairs],
                "timestamp": np.arange(len(pairs)),
            }
        )

    def write(self) -> Road:
        """Write both tables and a configuration that reads them."""
        data = self.folder / "data"
        data.mkdir(parents=True, exist_ok=True)
        pq.write_table(self.items, data / "items.parquet")
        pq.write_table(self.interactions, data / "interactions.parquet")
        tree = small_config(data, self.folder / "storage", name="bad")
        tree["compute"] = {"launcher": "inprocess", "device": "cpu", "threads_per_worker": 1}
        tree["tracking"] = {"enabled": False}  # making MLflow's tables takes longer than everything else here
        return Road.write(self.folder, tree)


@pytest.fixture
def given(tmp_path: Path) -> Input:
    """Valid input, not yet written."""
    return Input(tmp_path)


def replace(table: pa.Table, column: str, rows: dict[int, Any]) -> pa.Table:
    values = table[column].to_pylist()
    for row, value in rows.items():
        values[row] = value
    return table.set_column(table.column_names.index(column), column, pa.array(values, table[column].type))


def refused(told: Told, code: int, *words: str) -> None:
    assert told.code == code, told.text
    assert "Traceback" not in told.text
    assert "fix:" in told.text
    missing = [word for word in words if word not in told.text]
    assert not missing, f"{missing} not in:\n{told.text}"


def test_the_valid_input_is_accepted(given: Input, qbrec: Any) -> None:
    told = qbrec("catalog", "--config", given.write().config)
    assert told.code == 0, told.text


@pytest.mark.parametrize("column", ["user_id", "item_id", "timestamp"])
def test_a_missing_column_of_the_interactions(given: Input, qbrec: Any, column: str) -> None:
    given.interactions = given.interactions.drop_columns([column])
    refused(qbrec("catalog", "--config", given.write().config), 3, "interactions.parquet", column)


def test_a_missing_column_of_the_items(given: Input, qbrec: Any) -> None:
    given.items = given.items.rename_columns(["id", "title", "sound_embedding"])
    refused(qbrec("catalog", "--config", given.write().config), 3, "items.parquet", "item_id")


def test_a_column_of_the_wrong_type(given: Input, qbrec: Any) -> None:
    given.interactions = given.interactions.set_column(2, "timestamp", pa.array(["yesterday"] * 240))
    refused(qbrec("catalog", "--config", given.write().config), 3, "interactions.parquet", "timestamp")


def test_a_missing_file(given: Input, qbrec: Any) -> None:
    road = given.write()
    (given.folder / "data" / "items.parquet").unlink()
    refused(qbrec("catalog", "--config", road.config), 3, "items.parquet")


def test_a_duplicate_item_id(given: Input, qbrec: Any) -> None:
    given.items = replace(given.items, "item_id", {17: "i003"})
    refused(qbrec("catalog", "--config", given.write().config), 3, "items.parquet", "item_id", "i003")


def test_unknown_items_in_the_interactions(given: Input, qbrec: Any) -> None:
    given.interactions = replace(given.interactions, "item_id", {row: "nowhere" for row in range(5, 35)})
    refused(
        qbrec("catalog", "--config", given.write().config), 3, "interactions.parquet", "item_id", "nowhere"
    )


def test_nan_in_an_embedding(given: Input, qbrec: Any) -> None:
    given.items = replace(given.items, "sound_embedding", {row: [float("nan")] * 8 for row in (7, 8, 9)})
    refused(qbrec("catalog", "--config", given.write().config), 3, "items.parquet", "sound_embedding", "7")


def test_unreadable_images(given: Input, qbrec: Any) -> None:
    images = pa.array([b"no picture" if n < 5 else None for n in range(60)], pa.binary())
    given.items = given.items.append_column("image", images)
    refused(qbrec("catalog", "--config", given.write().config), 3, "items.parquet", "image")


def test_few_bad_rows_are_set_aside_with_their_reason(given: Input, qbrec: Any) -> None:
    given.interactions = replace(given.interactions, "item_id", {11: "nowhere"})
    road = given.write()
    told = qbrec("catalog", "--config", road.config)
    assert told.code == 0, told.text
    (rejected,) = road.storage.glob("artifacts/catalog/*/rejected/interactions.parquet")
    assert [row["item_id"] for row in pq.read_table(rejected).to_pylist()] == ["nowhere"]
    assert pq.read_table(rejected)["reason"].to_pylist()[0]


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("fusion.widht", "fusion.width"),
        ("sequence.pretrain.epoch", "sequence.pretrain.epochs"),
        ("fussion", "fusion"),
    ],
)
def test_a_misspelt_key(given: Input, qbrec: Any, key: str, near: str) -> None:
    told = qbrec("catalog", "--config", given.write().config, "--set", f"{key}=3")
    refused(told, 2, key, f"did you mean '{near}'?")


def test_a_value_of_the_wrong_type(given: Input, qbrec: Any) -> None:
    told = qbrec("catalog", "--config", given.write().config, "--set", "fusion.width=wide")
    refused(told, 2, "fusion.width", "wide")


def test_a_configuration_that_is_not_there(tmp_path: Path, qbrec: Any) -> None:
    told = qbrec("run", "--config", tmp_path / "absent.yaml")
    assert told.code == 2
    assert "absent.yaml" in told.text


def test_the_name_of_another_run(given: Input, qbrec: Any) -> None:
    road = given.write()
    assert qbrec("catalog", "--config", road.config).code == 0
    before = digests(road)
    refused(qbrec("catalog", "--config", road.config, "--set", "run.seed=1"), 2, "bad", "run.name")
    assert digests(road) == before


def test_bad_input_leaves_finished_artifacts_alone(given: Input, qbrec: Any) -> None:
    good = given.write()
    assert qbrec("catalog", "--config", good.config).code == 0
    before = digests(good)
    given.items = replace(given.items, "item_id", {17: "i003"})
    refused(qbrec("catalog", "--config", given.write().config), 3, "i003")
    assert {name: digest for name, digest in digests(good).items() if name in before} == before


def test_an_empty_history(road: Road, qbrec: Any) -> None:
    refused(qbrec("recommend", "--config", road.config), 3, "history")
    refused(qbrec("recommend", "--config", road.config, "--history", "no-such-item"), 3, "no-such-item")


@pytest.mark.parametrize("k", [0, 401])
def test_more_items_than_there_are(road: Road, qbrec: Any, k: int) -> None:
    refused(
        qbrec("recommend", "--config", road.config, "--history", some_item(road), "--k", str(k)),
        2,
        "k is",
        "400",
    )


@pytest.mark.parametrize("command", ["run", "evaluate", "report", "recommend"])
def test_a_flipped_bit_in_an_artifact(road: Road, tmp_path: Path, qbrec: Any, command: str) -> None:
    damaged = copy_of(road, tmp_path)
    victim = damaged.artifact("quantizer") / "semantic_ids.npy"
    bad = bytearray(victim.read_bytes())
    bad[-5] ^= 1
    victim.write_bytes(bytes(bad))
    before = digests(damaged)
    more = ["--history", some_item(road)] if command == "recommend" else []
    refused(qbrec(command, "--config", damaged.config, *more), 3, str(victim))
    assert digests(damaged) == before


def copy_of(road: Road, folder: Path) -> Road:
    """The same run in another storage."""
    tree = deepcopy(road.tree)
    tree["run"]["storage"] = str(folder / "storage")
    copy = Road.write(folder, tree)
    shutil.copytree(road.storage, copy.storage)
    record = copy.run_dir / "run.json"
    record.write_text(record.read_text().replace(str(road.storage), str(copy.storage)))
    return copy


def test_a_run_that_is_not_there(road: Road, tmp_path: Path, qbrec: Any) -> None:
    tree = deepcopy(road.tree)
    tree["run"]["name"] = "never-begun"
    refused(qbrec("report", "--config", Road.write(tmp_path, tree).config), 3, "never-begun")


def some_item(road: Road) -> str:
    return str(
        pq.read_table(road.tree["data"]["domains"]["shop"]["items"], columns=["item_id"])["item_id"][0]
    )


def digests(road: Road) -> dict[str, str]:
    files = [path for path in (road.storage / "artifacts").rglob("*") if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
