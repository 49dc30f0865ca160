"""The stage from fused vectors to the table of semantic IDs, and reading that table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from qbrec.config import RootConfig, parse_config
from qbrec.engine.context import StageContext
from qbrec.errors import ConfigError, DataError, GateError
from qbrec.quantizer import stage
from qbrec.quantizer.ids import SemanticIds
from qbrec.quantizer.packing import pack
from qbrec.quantizer.rvq import Codebooks, encode
from qbrec.storage.artifact import Artifact, ArtifactStore
from tests.support.clusters import clustered
from tests.support.dying import Killed, die_at_report
from tests.support.quantizer_inputs import quantizer_inputs

ITEMS = 2500


def _config(**keys: object) -> RootConfig:
    small = {"levels": [32, 16, 16], "iterations": 5, "refine_epochs": 1, "sample": 1000}
    return parse_config({"quantizer": small | keys})


def _run(folder: Path, inputs: dict[str, Artifact], name: str, **keys: object) -> Artifact:
    store = ArtifactStore(folder)
    ctx = StageContext.local(
        store, folder / "runs" / name, stage="quantizer", key=name.ljust(64, "0"), seed=7
    )
    return stage.run(ctx, _config(**keys), inputs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def inputs(folder: Path) -> dict[str, Artifact]:
    fused = clustered(ITEMS, 16, clusters=300)
    fused[1] = fused[0]
    fused[3] = fused[2]
    duplicates = np.arange(ITEMS)
    duplicates[1] = 0  # 0 and 1 are the same product; 2 and 3 only look alike
    kinds = ["drum", "guitar", "piano", "flute"]
    titles = [f"{kinds[int(code) % 4]} number {row}" for row, code in enumerate(fused[:, 0] > 0)]
    return quantizer_inputs(ArtifactStore(folder), fused, titles=titles, duplicates=duplicates)


@pytest.fixture(scope="module")
def artifact(folder: Path, inputs: dict[str, Artifact]) -> Artifact:
    return _run(folder, inputs, "first")


def test_files_say_what_the_contract_says(artifact: Artifact, inputs: dict[str, Artifact]) -> None:
    ids, raw = artifact.load_npy("semantic_ids.npy"), artifact.load_npy("raw_codes.npy")
    assert ids.shape == raw.shape == (ITEMS, 3)
    assert ids.dtype == raw.dtype == np.uint8
    assert artifact.meta["levels"] == [32, 16, 16]
    assert artifact.meta["method"] == "rvq"
    books = artifact.load_safetensors("codebooks.safetensors")
    assert {k: tuple(v.shape) for k, v in books.items()} == {
        "level.0": (32, 16),
        "level.1": (16, 16),
        "level.2": (16, 16),
        "mean": (16,),
        "std": (16,),
    }
    x = (
        torch.from_numpy(clustered(ITEMS, 16, clusters=300).numpy().astype(np.float16)).float()
        - books["mean"]
    )
    again = encode((x / books["std"])[4:], Codebooks(tuple(books[f"level.{i}"] for i in range(3))))
    assert np.array_equal(again.numpy(), raw[4:]), "frozen codebooks give the stored codes"
    packed = pack(ids, (32, 16, 16))
    order = artifact.load_npy("bucket_order.npy")
    counts = np.asarray(inputs["catalog"].load_npy("train_counts.npy"))
    assert order.tolist() == sorted(range(ITEMS), key=lambda r: (packed[r], -counts[r], r))
    assert not list((artifact.path.parent.parent.parent / "runs").glob("*/checkpoints/quantizer/*"))


def test_collisions_are_resolved_but_duplicates_stay_together(artifact: Artifact) -> None:
    ids, raw = artifact.load_npy("semantic_ids.npy"), artifact.load_npy("raw_codes.npy")
    assert (ids[0] == ids[1]).all()
    assert (raw[2] == raw[3]).all()
    assert (ids[2] != ids[3]).any()
    quality = artifact.load_json("quality.json")
    assert 0 < quality["collision_rate"] < quality["raw"]["collision_rate"] / 3
    assert quality["unresolved"] > 0
    apart = np.delete(ids, 1, axis=0)  # without the duplicate
    distinct, size = np.unique(apart, axis=0, return_counts=True)
    for crowded in distinct[size > 1]:
        rest = distinct[(distinct[:, :2] == crowded[:2]).all(1)]
        assert len(rest) == 16, "a collision is left only where the prefix has no free code"
    assert quality["moved"] == int((ids != raw).any(1).sum()) > 0
    assert [level["dead"] for level in quality["levels"]] == [0, 0, 0]
    r2 = [level["r2_held_out"] for level in quality["levels"]]
    assert 0.2 < r2[0] < r2[1] < r2[2] < 1
    assert all(c["cohesion"] > c["shuffled"] + 0.2 for c in quality["cohesion"])
    assert artifact.meta["perplexity"][0] == quality["levels"][0]["perplexity"]


def test_method_collisions_beam_and_capacity_have_an_effect(
    folder: Path, inputs: dict[str, Artifact], artifact: Artifact
) -> None:
    raw = artifact.load_npy("raw_codes.npy")
    kept = _run(folder, inputs, "none", collisions="none", quality={"max_collision_rate": 1.0})
    assert np.array_equal(kept.load_npy("semantic_ids.npy"), raw)
    wide = _run(folder, inputs, "wide", capacity=2, quality={"max_collision_rate": 1.0})
    assert 0 < wide.meta["moved"] < artifact.meta["moved"]
    plain = _run(folder, inputs, "plain", method="rq_kmeans")
    assert plain.meta["r2_held_out"][-1] < artifact.meta["r2_held_out"][-1]
    beam = _run(folder, inputs, "beam", beam=4)
    assert beam.meta["r2_held_out"][-1] > artifact.meta["r2_held_out"][-1]
    shuffled = _run(folder, inputs, "shuffled", shuffled=True, quality={"min_cohesion_gain": 0.0})
    ids, dealt = (found.load_npy("semantic_ids.npy") for found in (artifact, shuffled))
    assert not np.array_equal(dealt, ids)
    sizes = artifact.meta["levels"]
    np.testing.assert_array_equal(np.sort(pack(dealt, sizes)), np.sort(pack(ids, sizes)))
    for name, keys in {
        "sample": {"sample": 600},
        "passes": {"full_passes": 0},
        "out": {"held_out": 0.2},
        "in": {"held_out": 0.0},
    }.items():
        other = _run(folder, inputs, name, **keys)
        assert not np.array_equal(other.load_npy("raw_codes.npy"), raw), f"{name} has no effect"


def test_a_collapsed_codebook_stops_the_run_and_leaves_the_figures(folder: Path) -> None:
    fused = torch.zeros(600, 8)
    fused[:12] = clustered(12, 8)
    small = quantizer_inputs(ArtifactStore(folder / "collapsed"), fused)
    artifact = _run(folder / "collapsed", small, "gate")
    with pytest.raises(GateError, match="collapsed: perplexity 1"):
        stage.gate(artifact, RootConfig())
    off = {"min_perplexity_fraction": 0, "max_dead_fraction": 1, "min_cohesion_gain": 0, "min_r2_held_out": 0}
    stage.gate(artifact, parse_config({"quantizer": {"quality": {**off, "max_collision_rate": 1}}}))
    figures = json.loads((folder / "collapsed/runs/gate/quantizer-quality.json").read_text())
    assert figures["levels"][0]["perplexity"] < 3.2


def test_bad_input_is_named(folder: Path) -> None:
    fused = clustered(400, 8)
    fused[321, 5] = torch.nan
    bad = quantizer_inputs(ArtifactStore(folder / "bad"), fused)
    with pytest.raises(DataError, match="item row 321 is not finite"):
        _run(folder / "bad", bad, "nan", levels="auto")
    fine = quantizer_inputs(ArtifactStore(folder / "fine"), clustered(400, 8))
    with pytest.raises(ConfigError, match="512 codes, but only 380 items"):
        _run(folder / "fine", fine, "large", levels=[512])
    auto = _run(folder / "fine", fine, "auto", levels="auto")
    assert auto.meta["levels"] == [32, 32, 32, 32]
    with pytest.raises(DataError, match="400 fused vectors for"):
        _run(
            folder / "fine",
            {**fine, "catalog": quantizer_inputs(ArtifactStore(folder / "x"), fused[:5])["catalog"]},
            "no",
        )


def test_a_killed_run_resumes_with_the_same_bits(
    folder: Path, inputs: dict[str, Artifact], artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = die_at_report(monkeypatch, 2)
    with pytest.raises(Killed):
        _run(folder, inputs, "killed")
    again = _run(folder, inputs, "killed")
    assert seen == ["level-0", "level-1", "level-2", "averages", "solve-0", "revive"], (
        "no level was fitted twice"
    )
    for name in ("semantic_ids.npy", "codebooks.safetensors", "quality.json", "labels.json"):
        assert again.file(name).read_bytes() == artifact.file(name).read_bytes()


def test_show_and_find(artifact: Artifact) -> None:
    table = SemanticIds(artifact)
    ids = artifact.load_npy("semantic_ids.npy")
    (shown,) = table.show([0])
    assert shown.codes == tuple(ids[0])
    assert shown.bucket == 2
    assert shown.text == f"<a_{ids[0, 0]}><b_{ids[0, 1]}><c_{ids[0, 2]}>"
    assert shown.label.split("]")[0] in ("[Drum", "[Guitar"), shown.label
    for depth in (1, 2, 3):
        prefix = ids[77, :depth]
        want = np.flatnonzero((ids[:, :depth] == prefix).all(1))
        got = table.find(prefix.tolist())
        assert sorted(got) == want.tolist()
        assert np.array_equal(got, [r for r in table.order if r in set(want)]), "in bucket order"
    assert len(table.find([])) == ITEMS
    with pytest.raises(DataError, match="no item row 9999"):
        table.show([9999])
    with pytest.raises(ConfigError, match="codes 0 to 31, not 32"):
        table.find("32")
    with pytest.raises(ConfigError, match="4 codes"):
        table.find("1.2.3.4")


def test_real_items_do_not_collapse(folder: Path, bench_data: Path) -> None:
    table = pq.read_table(bench_data / "instruments" / "items.parquet")
    parts = [np.stack(table[c].to_numpy(zero_copy_only=False)) for c in ("text_embedding", "image_embedding")]
    fused = torch.from_numpy(np.concatenate(parts, 1).astype(np.float32))
    real = quantizer_inputs(ArtifactStore(folder / "real"), fused)
    artifact = _run(folder / "real", real, "real", levels="auto", iterations=10)
    quality = artifact.load_json("quality.json")
    assert [level["dead"] for level in quality["levels"]] == [0, 0, 0, 0]
    assert quality["levels"][0]["perplexity"] >= 128
    assert quality["collision_rate"] == 0
    assert artifact.load_json("labels.json") == {}
    assert SemanticIds(artifact).show([5])[0].label.startswith("[code ")
