"""`qbrec append` on a real Ray: generations of a small shop, and what they leave alone."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner

from qbrec.catalog.encoders.text import HashedNgramEncoder, normalise
from qbrec.catalog.synth import generate
from qbrec.cli.append import append
from qbrec.cli.ids import ids as ids_command
from qbrec.cli.recommend import recommend
from qbrec.config import load_config, parse_config
from qbrec.errors import ConfigError, DataError
from qbrec.pipeline import Pipeline
from qbrec.registry.versions import GENERATIONS_TAG, _generations_print, _same
from qbrec.storage.artifact import Artifact, ArtifactStore
from qbrec.storage.block_reader import RaggedField
from qbrec.storage.generations import GenerationsView
from qbrec.storage.id_table import IdTable
from qbrec.storage.ragged import Ragged
from qbrec.tracking.client import connect
from tests.support.cli import ROOT
from tests.support.mlflow_store import copy_store

pytestmark = pytest.mark.usefixtures("ray_session")
N = 200
_TRAIN = {"epochs": 2, "batch_size": 64, "micro_batch": 32}
TINY = {
    "compute": {"launcher": "inprocess", "threads_per_worker": 1, "device": "cpu"},
    "fusion": {"width": 16, "depth": 1, "heads": 2, "group": 32, "behaviour_dim": 0, "train": _TRAIN},
    "quantizer": {"levels": [8, 8, 8], "iterations": 5, "quality": {"max_collision_rate": 1.0}},
    "sequence": {"width": 16, "layers": 1, "heads": 2, "pretrain": _TRAIN, "finetune": _TRAIN},
}


class Shop:
    """A run with a finished catalogue of 200 items, and a place for input."""

    def __init__(
        self,
        folder: Path,
        items: pa.Table,
        interactions: Path,
        *,
        name: str,
        more: dict[str, Any] | None = None,
    ) -> None:
        self.folder, self.items = folder / name, items
        self.folder.mkdir()
        tree = {
            "run": {"name": name, "storage": str(folder / "storage")},
            "data": {
                "domains": {
                    "shop": {"items": str(folder / "items.parquet"), "interactions": str(interactions)}
                }
            },
            "catalog": {"text": {"dim": 16}, "shard_bytes": 20_000, "block_bytes": 4_000},
            "tracking": {"enabled": False},
            **(more or {}),
        }
        self.config = self.folder / "shop.yaml"
        self.config.write_text(yaml.safe_dump(tree))
        self.storage, self.record = folder / "storage", folder / "storage" / "runs" / name / "run.json"
        with Pipeline(load_config(self.config)) as pipeline:
            self.catalog = pipeline.up_to("catalog")

    def command(self, *args: str | Path) -> list[str]:
        return ["--config", str(self.config), *map(str, args)]

    def append(self, *args: str | Path) -> str:
        """What the command prints; its error, if it has one, is raised."""
        done = CliRunner().invoke(append, self.command(*args))
        if done.exception is not None:
            raise done.exception
        return done.output

    def write(self, name: str, table: pa.Table) -> Path:
        path = self.folder / name
        pq.write_table(table, path)
        return path

    def noted(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.record.read_text())["extra"].get("generations", [])
        return found

    def generations(self) -> list[Artifact]:
        return [ArtifactStore(self.storage).open(place["path"]) for place in self.noted()]

    def semantic_ids(self) -> list[Artifact]:
        return [ArtifactStore(self.storage).open(place["ids"]["path"]) for place in self.noted()]

    def view(self) -> GenerationsView:
        return GenerationsView(self.catalog, self.generations())

    def ids(self) -> list[str]:
        found: list[str] = self.items["item_id"].to_pylist()
        return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pa.Table, Path, pa.Table]:
    """Folder, items and interactions of the catalogue, and items that it does not know."""
    folder = tmp_path_factory.mktemp("append")
    made = generate(folder / "synth", num_items=N, num_users=120, seed=3)
    other = generate(folder / "other", num_items=N, num_users=1, seed=8)
    items = pq.read_table(made.items).append_column("price", pa.array(np.arange(N) / 4))
    pq.write_table(items, folder / "items.parquet")
    later = pq.read_table(other.items).append_column("price", pa.array(np.arange(N) / 4))
    later = later.set_column(0, "item_id", pa.array([f"new{n}" for n in range(N)]))
    return folder, items, made.interactions, later


def shop(place: tuple[Path, pa.Table, Path, pa.Table], name: str) -> Shop:
    return Shop(*place[:3], name=name)


def changed(table: pa.Table, column: str, values: list[Any]) -> pa.Table:
    index = table.column_names.index(column)
    return table.set_column(index, column, pa.array(values, table.schema.field(column).type))


def digests(path: Path) -> dict[str, str]:
    files = [p for p in path.rglob("*") if p.is_file()]
    return {str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def texts(view: GenerationsView, rows: Any) -> Ragged:
    found = view.take(rows, [RaggedField("feature.text", counts="tokens.text")])["feature.text"]
    assert isinstance(found, Ragged)
    return found


def test_all_kinds_at_once_twice(place: tuple[Path, pa.Table, Path, pa.Table]) -> None:
    run, later = shop(place, "kinds"), place[3]
    ids, before = run.ids(), digests(run.catalog.path)
    renamed = changed(run.items.slice(0, 5), "title", [f"Title {n}" for n in range(5)])
    repriced = changed(run.items.slice(5, 3), "price", [99.0, None, 97.0])
    bad = changed(later.slice(190, 1), "item_id", [None])
    batch = [later.slice(0, 40), renamed, repriced, run.items.slice(8, 20), bad]
    path = run.write("one.parquet", pa.concat_tables(batch))
    gone = run.folder / "gone.txt"
    gone.write_text("\n".join([*ids[30:34], "nowhere", "", ids[30]]) + "\n")
    with pytest.raises(DataError, match="1 of 69 rows of items in domain 'shop' are bad"):
        run.append("--items", path, "--retire", gone)
    assert run.generations() == []
    command = ("--items", path, "--retire", gone, "--set", "catalog.max_rejected_fraction=0.1")
    printed = run.append(*command)
    (one,) = run.generations()
    counts = {"added": 40, "changed": 8, "unchanged": 20, "restored": 0, "retired": 4}
    assert one.meta["counts"] == counts | {"already_retired": 0, "unknown": 1}
    assert one.meta["rejected"] == {"item_id: is null": 1}
    lines = {line.rsplit(maxsplit=1)[0].strip(): line.rsplit(maxsplit=1)[-1] for line in printed.splitlines()}
    assert {name: int(lines[name]) for name in counts} == counts
    assert lines["item_id: is null"] == "1"
    assert lines["items in all"] == "240"
    assert "1 ids to be retired are not in the domain" in printed
    assert pq.read_table(one.path / "unknown.parquet")["item_id"].to_pylist() == ["nowhere"]

    view = run.view()
    added = view.lookup([f"new{n}" for n in range(40)], "shop")
    assert sorted(added.tolist()) == list(range(N, N + 40))
    assert (np.diff(view.generations[0].hashes.astype(object)) > 0).all()
    assert view.lookup(ids, "shop").tolist() == GenerationsView(run.catalog).lookup(ids, "shop").tolist()
    rows = view.lookup(ids[:9], "shop")
    assert view.titles(rows) == [*(f"Title {n}" for n in range(5)), *run.items["title"].to_pylist()[5:9]]
    assert view.display(rows)["price"].to_pylist()[4:] == [1.0, 99.0, None, 97.0, 2.0]
    assert sorted(np.flatnonzero(view.retired)) == sorted(view.lookup(ids[30:34], "shop"))
    assert view.candidates("shop").sum() == 236
    # Features: those of the catalogue's own encoder, for new and changed items alike.
    encoder = HashedNgramEncoder.from_state(run.catalog.load_safetensors("encoder.safetensors"))
    mixed = np.concatenate([added, rows])
    stored = texts(view, mixed)
    expected = encoder.encode(normalise(pa.array(view.titles(mixed))), field="title").astype(np.float16)
    np.testing.assert_array_equal(stored.values[stored.offsets[:-1]], expected)
    blocks = list(view.new_features(1, ["row", "tokens.image"]))
    assert sorted(np.concatenate([b["row"] for b in blocks])) == sorted([*added, *rows[:8]])
    assert len(blocks) > 4
    assert len(list(one.path.glob("items-*.tar"))) > 1

    # The same command once more: nothing is done, nothing changes.
    state, noted = digests(run.storage / "artifacts"), run.record.read_bytes()
    assert "already appended" in run.append(*command)
    assert (digests(run.storage / "artifacts"), run.record.read_bytes()) == (state, noted)

    # A second generation: changes the first one's item, brings two back, one of them changed.
    back = changed(run.items.slice(30, 2), "title", [run.items["title"][30].as_py(), "Back again"])
    again = changed(later.slice(0, 2), "title", ["Better", later["title"][1].as_py()])
    path = run.write("two.parquet", pa.concat_tables([back, again, later.slice(50, 1), renamed.slice(0, 1)]))
    gone = run.write("gone.parquet", pa.table({"item_id": [ids[32], "new5", ids[60]]}))
    # What makes features is the catalogue's, whatever the configuration says now.
    run.append("--items", path, "--retire", gone, "--set", "catalog.text.dim=8")
    one, two = run.generations()
    assert two.manifest["config"]["catalog"]["text"]["dim"] == 16
    counts = {"added": 1, "changed": 1, "unchanged": 2, "restored": 2, "retired": 2}
    assert two.meta["counts"] == counts | {"already_retired": 1, "unknown": 0}
    view = run.view()
    rows = view.lookup(["new0", ids[31], ids[0], "new50"], "shop")
    assert rows[0] == added[0]
    assert rows[3] == 240
    assert view.titles(rows[:3]) == ["Better", "Back again", "Title 0"]
    new = np.concatenate([block["row"] for block in view.new_features(2)])
    assert sorted(new) == sorted(view.lookup(["new0", ids[31], "new50"], "shop"))
    assert view.superseded(view.lookup(["new0", "new1"], "shop"), 1).tolist() == [True, False]
    out = view.lookup([ids[32], ids[33], ids[60], "new5"], "shop")
    assert sorted(np.flatnonzero(view.retired)) == sorted(out)
    assert digests(run.catalog.path) == before
    one.verify()


def test_the_models_of_the_run_learn_of_it(place: tuple[Path, pa.Table, Path, pa.Table]) -> None:
    run, later = Shop(*place[:3], name="models", more=TINY), place[3]
    ids, new = run.ids(), [f"new{n}" for n in range(30)]
    first = run.write("first.parquet", later.slice(0, 30))
    gone = run.folder / "gone.txt"
    gone.write_text(f"{ids[0]}\n{ids[1]}\n")
    command = ("--items", first, "--retire", gone)
    # Nothing is trained yet: the items wait for their IDs, and the same command gives them later.
    assert "no semantic IDs yet: the run has no finished fusion yet" in run.append(*command)
    assert "ids" not in run.noted()[0]
    with Pipeline(load_config(run.config)) as pipeline:
        trained = {name: pipeline.up_to(name) for name in ("fusion", "quantizer", "finetune")}
    before = {name: digests(artifact.path) for name, artifact in trained.items()}
    printed = run.append(*command)
    assert "already appended" in printed
    assert "new semantic IDs" in printed
    table = IdTable(trained["quantizer"], run.semantic_ids())
    assert table.num_items == N + 30

    def asked(command: click.Command, *args: str) -> str:
        done = CliRunner().invoke(command, [*args[:1], *run.command(*args[1:])])
        assert done.exception is None, done.output
        return done.stdout

    def ranked(*history: str, k: int) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(
            asked(recommend, "--json", "--k", str(k), "--keep-seen", *history)
        )
        return found

    found = ranked("new3", ids[5], ids[0], k=228)
    assert {item["item_id"] for item in found} == {*ids[2:], *new}
    shown = {item["item_id"]: item["semantic_id"] for item in found}
    assert shown["new7"] in asked(ids_command, "show", "new7")
    codes = ".".join(str(code) for code in table.codes[run.view().lookup(["new7"], "shop")[0]])
    assert "new7" in asked(ids_command, "find", "--limit", "99", codes)
    # One of them comes back, another one leaves; a new domain; what lies far away is warned of.
    odd = pa.table({"item_id": [f"z{n}" for n in range(40)], "title": ["qqq zzz xxx www"] * 40})
    second = run.write("second.parquet", pa.concat_tables([run.items.slice(0, 1), later.slice(30, 5)]))
    gone.write_text("new4\n")
    run.append("--items", second, "--retire", gone)
    out = run.append(
        "--items",
        run.write("odd.parquet", odd),
        "--domain",
        "odd",
        "--set",
        "quantizer.quality.max_drift=0.5",
    )
    assert "refit: the new items of generation 3" in out
    again = ranked("new3", "new31", k=233)
    assert {item["item_id"] for item in again} == {
        ids[0],
        *ids[2:],
        *new,
        *(f"new{n}" for n in range(30, 35)),
    } - {"new4"}
    assert {item["item_id"]: item["semantic_id"] for item in again}.items() >= {
        (name, text) for name, text in shown.items() if name != "new4"
    }
    assert IdTable(trained["quantizer"], run.semantic_ids()).num_items == N + 30 + 5 + 40
    # Once more: nothing is done, and nothing of what was trained was ever touched.
    state, noted = digests(run.storage / "artifacts"), run.record.read_bytes()
    run.append(
        "--items", run.folder / "odd.parquet", "--domain", "odd", "--set", "quantizer.quality.max_drift=0.5"
    )
    assert (digests(run.storage / "artifacts"), run.record.read_bytes()) == (state, noted)
    assert {name: digests(artifact.path) for name, artifact in trained.items()} == before


def test_a_snapshot_and_a_new_domain(place: tuple[Path, pa.Table, Path, pa.Table]) -> None:
    run, later = shop(place, "snapshot"), place[3]
    ids = run.ids()
    # An item whose row is bad is still sold.
    bad = changed(run.items.slice(189, 1), "image", [b"no picture"])
    new = changed(later.slice(1, 1), "image", [b"nor this"])
    path = run.write("all.parquet", pa.concat_tables([run.items.slice(0, 189), bad, later.slice(0, 1), new]))
    run.append("--items", path, "--snapshot", "--set", "catalog.max_rejected_fraction=0.1")
    counts = {"added": 1, "changed": 0, "unchanged": 189, "restored": 0, "retired": 10}
    assert run.generations()[0].meta["counts"] == counts | {"already_retired": 0, "unknown": 0}
    assert run.generations()[0].meta["rejected"] == {"image: cannot be decoded": 2}
    gone = np.flatnonzero(run.view().retired)
    assert sorted(run.view().item_ids(gone)) == sorted(ids[190:])
    assert not (run.generations()[0].path / "changed.npy").exists()

    # The same ids in another domain are other items; what they lack is missing.
    columns = {
        "item_id": ids[:30],
        "title": run.items["title"].slice(0, 30),
        "seeds": list(range(30)),
    }
    garden = run.write("garden.parquet", pa.table(columns))
    assert "domain garden (new)" in run.append("--items", garden, "--domain", "garden")
    view = run.view()
    assert view.domains == ["shop", "garden"]
    rows = view.lookup(ids[:30], "garden")
    assert sorted(rows.tolist()) == list(range(201, 231))
    assert view.item_domain[rows].tolist() == [1] * 30
    assert view.candidates("garden").sum() == 30
    assert view.candidates("shop").sum() == 191
    assert view.take(rows, ["tokens.image"])["tokens.image"].tolist() == [0] * 30
    shop_rows = view.lookup(ids[:30], "shop")
    np.testing.assert_array_equal(texts(view, rows).row(3), texts(view, shop_rows).row(3)[:1])
    assert view.display([rows[4], shop_rows[4]])["seeds"].to_pylist() == [4, None]
    assert view.display([rows[4], shop_rows[4]])["price"].to_pylist() == [None, 1.0]
    # Only that domain's items leave.
    listed = run.folder / "gone.csv"
    listed.write_text(f'title,item_id\nx,"{ids[0]}"\ny,new0\n')
    run.append("--domain", "garden", "--retire", listed)
    assert run.generations()[-1].meta["counts"]["retired"] == 1
    assert run.generations()[-1].meta["counts"]["unknown"] == 1
    assert run.view().retired[rows[0]]
    assert not run.view().retired[shop_rows[0]]


def test_what_does_not_fit_is_refused(place: tuple[Path, pa.Table, Path, pa.Table]) -> None:
    run, later = shop(place, "refused"), place[3].slice(0, 20)
    vectors = pa.array([[1.0, 2.0]] * 20)

    def refused(table: pa.Table, message: str, *args: str) -> str:
        with pytest.raises(DataError, match=message) as caught:
            run.append("--items", run.write("bad.parquet", table), *args)
        assert run.generations() == []
        return str(caught.value)

    said = refused(later.append_column("audio_embedding", vectors), "no modality 'audio'")
    assert "build a new catalogue" in said
    refused(
        later.drop_columns(["image"]).append_column("image_embedding", vectors),
        "its modality 'image' of pictures or text",
    )
    refused(later.drop_columns(["price"]).append_column("price", pa.array(["1"] * 20)), "'price' is string")
    said = refused(pa.concat_tables([later, later.slice(3, 1)]), "the item_id 'new3' occurs twice")
    assert "row 3" in said
    assert "row 20" in said
    listed = run.folder / "both.txt"
    listed.write_text(f"{run.ids()[0]}\n")
    refused(run.items.slice(0, 2), "1 items are both given and to be retired", "--retire", str(listed))
    refused(later.slice(0, 0), "not a single row of items")
    with pytest.raises(DataError, match="no domain 'shp'"):
        run.append("--retire", listed, "--domain", "shp")
    with pytest.raises(DataError, match="no column 'item_id'"):
        run.append("--retire", run.write("ids.parquet", pa.table({"id": ["a"]})))
    with pytest.raises(ConfigError, match="cannot be the name of a domain"):
        run.append("--retire", listed, "--domain", "a/b")
    with pytest.raises(DataError, match="no finished catalogue"):
        run.append("--retire", listed, "--set", "run.name=nobody")
    for args in ((), ("--snapshot", "--retire", str(listed))):
        assert CliRunner().invoke(append, run.command(*args)).exit_code == click.UsageError.exit_code


def test_pictures_from_a_place_that_is_allowed_now(place: tuple[Path, pa.Table, Path, pa.Table]) -> None:
    run, later = shop(place, "pictures"), place[3].slice(0, 20)
    paths = []
    for number, picture in enumerate(later["image"].to_pylist()):
        file = run.folder / f"{number}.png"
        file.write_bytes(picture or b"")
        paths.append(str(file) if picture else None)
    path = run.write("paths.parquet", later.drop_columns(["image"]).append_column("image_path", [paths]))
    with pytest.raises(ConfigError, match="no place is allowed"):
        run.append("--items", path)
    run.append("--items", path, "--set", f"catalog.image.roots=[{run.folder}]")
    view = run.view()
    found = view.take(view.lookup(later["item_id"].to_pylist(), "shop"), ["tokens.image"])["tokens.image"]
    assert found.tolist() == [int(place is not None) for place in paths]


def test_killed_in_the_middle_the_same_command_completes(
    place: tuple[Path, pa.Table, Path, pa.Table],
) -> None:
    import ray

    run, later = shop(place, "killed"), place[3]
    # A bad row is noted while the others are still being encoded: then it is killed.
    bad = changed(later.slice(100, 1), "item_id", [""])
    path = run.write("more.parquet", pa.concat_tables([bad, later.slice(101, 60)]))
    args = ("--items", path, "--set", "catalog.max_rejected_fraction=0.1")
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-m", "qbrec", "append", *run.command(*args)]
    kind = run.storage / "artifacts" / "generation"
    before = set(kind.glob("*"))
    with subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"RAY_ADDRESS": address}, stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 60
        while not (begun := {p.parent for p in kind.glob("*/rejected")} - before):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
    (folder,) = begun
    assert process.returncode == -signal.SIGKILL
    assert not (folder / "manifest.json").exists()
    assert run.generations() == []
    run.append(*args)
    (artifact,) = run.generations()
    assert artifact.path == folder
    artifact.verify()
    assert run.view().num_items == N + 60
    # Killed after the manifest, before it was noted: it is found again.
    document = json.loads(run.record.read_text())
    document["extra"] = {}
    run.record.write_text(json.dumps(document))
    created = (folder / "manifest.json").stat().st_mtime_ns
    run.append(*args)
    assert [g.path for g in run.generations()] == [folder]
    assert (folder / "manifest.json").stat().st_mtime_ns == created


def test_a_catalogue_built_anew_has_no_generations(
    place: tuple[Path, pa.Table, Path, pa.Table], capsys: pytest.CaptureFixture[str]
) -> None:
    run = shop(place, "anew")
    listed = run.folder / "gone.txt"
    listed.write_text(f"{run.ids()[0]}\n")
    run.append("--retire", listed)
    # Written again with the same content it is the same catalogue; with other items it is not.
    pq.write_table(run.items, place[0] / "items.parquet")
    again = Shop(*place[:3], name="anew-2").catalog
    assert again.path != run.catalog.path
    assert again.fingerprint == run.catalog.fingerprint
    renamed = changed(run.items, "title", ["Other", *run.items["title"].to_pylist()[1:]])
    pq.write_table(renamed, place[0] / "items.parquet")
    with Pipeline(load_config(run.config)) as pipeline:
        pipeline.up_to("catalog")
    assert "1 generations of the old one are off" in run.append("--retire", listed)
    assert run.generations()[0].meta["counts"]["retired"] == 1
    assert len(run.generations()) == 1


def test_a_version_is_that_of_its_generations(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    config = parse_config({"run": {"storage": str(copy_store(tmp_path_factory.getbasetemp(), tmp_path))}})
    client, _ = connect(config)
    client.create_registered_model("qbrec")
    names = ("catalog", "generation-1", "ids-1", "generation-2", "ids-2")
    grown = {name: Artifact(tmp_path, {"fingerprint": name}) for name in names}
    before = {"catalog": grown["catalog"]}
    waiting = {name: grown[name] for name in names[:4]}
    made = {}
    for name, tags in (
        ("old", {"qbrec.catalog": "x"}),  # of a release that knew no generations
        ("grown", {"qbrec.catalog": "x", GENERATIONS_TAG: _generations_print(grown)}),
    ):
        made[name] = str(client.create_model_version("qbrec", str(tmp_path), tags=tags).version)
    for artifacts, expected in ((before, made["old"]), (grown, made["grown"]), (waiting, None)):
        prints = {"qbrec.catalog": "x", GENERATIONS_TAG: _generations_print(artifacts)}
        assert _same(client, "qbrec", prints) == expected
