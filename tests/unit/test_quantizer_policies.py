"""Every collision policy through the stage: what lies in the artifact, and that readers understand it."""

from __future__ import annotations

import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from qbrec.config import parse_config
from qbrec.engine.context import StageContext
from qbrec.quantizer import stage
from qbrec.quantizer.duplicates import DUPLICATES, write_duplicates
from qbrec.quantizer.ids import SemanticIds, id_text, parse_prefix
from qbrec.quantizer.packing import pack
from qbrec.quantizer.quantizer import Quantizer
from qbrec.quantizer.resolve import SPARE_DIGITS
from qbrec.storage.artifact import Artifact, ArtifactStore
from tests.support.clusters import clustered
from tests.support.quantizer_inputs import quantizer_inputs

ITEMS = 700
POLICY = {
    "none": {},
    "next_nearest": {},
    "sinkhorn": {},
    "even": {"collisions": "sinkhorn", "sinkhorn_epsilon": 3.0},
    "brief": {"collisions": "sinkhorn", "sinkhorn_iterations": 1},
    "wide": {"collisions": "sinkhorn", "capacity": 3},
    "digit": {},
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    store = ArtifactStore(tmp_path_factory.mktemp("storage"))
    fused = clustered(ITEMS, 16, clusters=60)
    duplicates, retired = np.arange(ITEMS), np.zeros(ITEMS, dtype=bool)
    for copy, first in ((1, 0), (2, 0), (500, 40)):
        fused[copy], duplicates[copy] = fused[first], first
    fused[90:100] = fused[90]  # look alike, but are not the same
    retired[[2, 91, 92, 93]] = True
    made = quantizer_inputs(store, fused, titles=["drum kit", "flute"] * (ITEMS // 2), duplicates=duplicates)
    old = made["catalog"]
    catalog = store.writer("catalog", "d" * 64)
    catalog.prepare()
    for name in old.manifest["files"]:
        shutil.copyfile(old.path / name, catalog.path / name)
    catalog.save_npy("retired.npy", retired)
    return made | {"catalog": catalog.commit(meta=old.meta, inputs={}, config={}, seed=0)}


@pytest.fixture(scope="module")
def made(inputs: dict[str, Artifact]) -> dict[str, Artifact]:
    root = inputs["catalog"].path.parents[2]
    found = {}
    small = {"levels": [12, 8, 16], "iterations": 4, "refine_epochs": 0, "refine_solves": 0}
    off = {"max_collision_rate": 1.0, "min_r2_held_out": 0.0}
    for name, keys in POLICY.items():
        config = parse_config({"quantizer": {"collisions": name, "quality": off} | small | keys})
        ctx = StageContext.local(
            ArtifactStore(root), root / "runs" / name, stage="quantizer", key=name.ljust(64, "0"), seed=7
        )
        found[name] = stage.run(ctx, config, inputs)
    return found


def _contents(codes: np.ndarray, inputs: dict[str, Artifact]) -> dict[tuple[int, ...], set[int]]:
    """Different contents of live items on each ID."""
    group, retired = (inputs["catalog"].load_npy(f"{name}.npy") for name in ("duplicates", "retired"))
    out = defaultdict(set)
    for row in np.flatnonzero(~retired):
        out[tuple(codes[row].tolist())].add(int(group[row]))
    return out


def test_policies_differ_and_have_one_codebook(made: dict[str, Artifact]) -> None:
    raw = made["none"].load_npy("raw_codes.npy")
    ids = {name: artifact.load_npy("semantic_ids.npy") for name, artifact in made.items()}
    assert all(np.array_equal(artifact.load_npy("raw_codes.npy"), raw) for artifact in made.values())
    assert np.array_equal(ids["none"], raw)
    for one, other in (("next_nearest", "none"), ("sinkhorn", "next_nearest"), ("wide", "sinkhorn")):
        assert not np.array_equal(ids[one], ids[other])
    assert not np.array_equal(ids["even"], ids["sinkhorn"]), "sinkhorn_epsilon has an effect"
    assert not np.array_equal(ids["brief"], ids["sinkhorn"]), "sinkhorn_iterations has an effect"
    assert 0 < made["wide"].meta["moved"] < made["sinkhorn"].meta["moved"]


@pytest.mark.parametrize("name", list(POLICY))
def test_collision_figures_leave_out_equal_content_and_retired_items(
    name: str, made: dict[str, Artifact], inputs: dict[str, Artifact]
) -> None:
    artifact = made[name]
    quality, codes = artifact.load_json("quality.json"), artifact.load_npy("semantic_ids.npy")
    contents = _contents(codes, inputs)
    retired = inputs["catalog"].load_npy("retired.npy")
    live = codes[~retired]
    shared = sum(len(contents[tuple(row)]) > 1 for row in live.tolist())
    assert quality["collision_rate"] == pytest.approx(shared / len(live))
    assert quality["unique_ids"] == len(contents)
    assert quality["duplicate_rate"] == pytest.approx(4 / len(live))  # 0 and 1, 40 and 500; 2 is retired
    raw = artifact.load_npy("raw_codes.npy")
    assert np.array_equal(codes[retired, :3], raw[retired])
    most = {"next_nearest": 1, "sinkhorn": 1, "even": 1, "brief": 1, "wide": 3, "digit": 1}.get(name)
    if most is not None and quality["unresolved"] == 0:
        assert max(map(len, contents.values())) <= most
    assert (codes[0] == codes[1]).all()


def test_a_digit_is_one_more_level_for_every_reader(
    made: dict[str, Artifact], inputs: dict[str, Artifact]
) -> None:
    artifact = made["digit"]
    ids, raw = artifact.load_npy("semantic_ids.npy"), artifact.load_npy("raw_codes.npy")
    quality = artifact.load_json("quality.json")
    most = max(map(len, _contents(raw, inputs).values()))
    assert most >= 7, "items that look alike"
    assert artifact.meta["levels"] == [12, 8, 16, most + SPARE_DIGITS]
    assert ids.shape == (ITEMS, 4)
    assert np.array_equal(ids[:, :3], raw)
    assert len({tuple(ids[row]) for row in (90, *range(94, 100))}) == 7
    assert (quality["collision_rate"], quality["unresolved"]) == (0, 0)
    assert quality["raw"]["collision_rate"] > 0
    assert [level["codes"] for level in quality["levels"]] == [12, 8, 16]
    assert Quantizer.load(artifact).sizes == (12, 8, 16)
    counts = np.asarray(inputs["catalog"].load_npy("train_counts.npy"))
    packed = pack(ids, artifact.meta["levels"])
    order = artifact.load_npy("bucket_order.npy")
    assert order.tolist() == sorted(range(ITEMS), key=lambda r: (packed[r], -counts[r], r))
    table = SemanticIds(artifact)
    shown = table.show([95])[0]
    assert shown.codes == tuple(ids[95].tolist())
    assert shown.text.count("<") == 4
    assert parse_prefix(shown.text) == shown.codes
    assert shown.bucket == 1
    assert table.find(shown.text).tolist() == [95]
    same = np.flatnonzero((raw == raw[95]).all(1))
    assert sorted(table.find(raw[95].tolist())) == same.tolist()
    assert shown.label.count("[") == 4
    # The most popular content comes first; popularity falls with the row.
    live = [row for row in same if not 91 <= row <= 93]
    assert ids[live, 3].tolist() == sorted(ids[live, 3].tolist())


@pytest.mark.parametrize("name", ["next_nearest", "digit"])
def test_duplicates_are_listed_apart(name: str, made: dict[str, Artifact]) -> None:
    artifact = made[name]
    ids = artifact.load_npy("semantic_ids.npy")
    listed = pq.read_table(artifact.file(DUPLICATES))
    assert listed.to_pydict() == {
        "semantic_id": [id_text(ids[row]) for row in (0, 1, 2, 40, 500)],
        "item_row": [0, 1, 2, 40, 500],
        "group": [0, 0, 0, 40, 40],
    }


def test_no_duplicates_are_an_empty_list(tmp_path: Path) -> None:
    writer = ArtifactStore(tmp_path).writer("quantizer", "0" * 64)
    writer.prepare()
    write_duplicates(writer, np.zeros((3, 2), np.uint8), group=np.arange(3))
    listed = pq.read_table(writer.path / DUPLICATES)
    assert len(listed) == 0
    assert [str(field.type) for field in listed.schema] == ["string", "int64", "int64"]
