"""Figures of quality.json against brute force, the gates on them, and codes against a known taxonomy."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qbrec.catalog.encoders.fields import category_paths, item_texts
from qbrec.catalog.encoders.ngrams import normalise
from qbrec.catalog.encoders.text import FIELDS, HashedNgramEncoder, document_frequencies
from qbrec.catalog.synth_items import build_taxonomy, item_table, item_truth
from qbrec.config import parse_config
from qbrec.config.stages import QualityConfig
from qbrec.engine.context import StageContext
from qbrec.errors import GateError
from qbrec.quantizer import stage
from qbrec.quantizer.labels import make_labels
from qbrec.quantizer.quality import add_residual_energy, bucket_figures, check_gate, cohesion, level_usage
from qbrec.quantizer.quantizer import Quantizer
from qbrec.storage.artifact import Artifact, ArtifactStore
from tests.support.clusters import clustered
from tests.support.quantizer_inputs import quantizer_inputs
from tests.support.taxonomy import recovered

HEALTHY: dict[str, Any] = {
    "levels": [
        {"codes": 256, "used": 256, "dead": 0, "perplexity": 212.0, "r2_held_out": 0.57},
        {"codes": 256, "used": 250, "dead": 6, "perplexity": 149.0, "r2_held_out": 0.75},
    ],
    "cohesion": [{"prefix": 1, "cohesion": 0.55, "shuffled": 0.001, "pairs": 9000}],
    "collision_rate": 0.1,
    "largest_bucket_contents": 18,
}


def broken(**changes: Any) -> dict[str, Any]:
    first = HEALTHY["levels"][0] | changes.pop("first", {})
    last = HEALTHY["levels"][1] | changes.pop("last", {})
    near = HEALTHY["cohesion"][0] | changes.pop("near", {})
    return HEALTHY | {"levels": [first, last], "cohesion": [near]} | changes


@settings(max_examples=150)
@given(
    rows=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(0, 8)), min_size=1, max_size=60)
)
def test_bucket_figures_equal_brute_force(rows: list[tuple[int, int, int]]) -> None:
    codes, group = np.array([row[:2] for row in rows], np.uint8), np.array([row[2] for row in rows])
    got = bucket_figures(codes, (3, 4), group=group)
    buckets: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for a, b, content in rows:
        buckets[a, b].append(content)
    size = [len(held) for held in buckets.values()]
    contents = [len(set(held)) for held in buckets.values()]
    of_group = Counter(group.tolist())
    assert got["unique_ids"] == len(buckets)
    assert got["prefixes"] == [len({a for a, _ in buckets}), len(buckets)]
    assert got["largest_bucket"] == max(size)
    assert got["largest_bucket_contents"] == max(contents)
    assert got["num_contents"] == len(of_group)
    assert got["split_contents"] == sum(contents) - len(of_group)
    assert got["contents_alone_rate"] == pytest.approx(contents.count(1) / sum(contents))
    assert got["no_collision_rate"] == pytest.approx(size.count(1) / len(rows))
    shared = sum(s for s, c in zip(size, contents, strict=True) if c > 1)
    assert got["collision_rate"] == pytest.approx(shared / len(rows))
    twins = sum(n for n in of_group.values() if n > 1)
    assert got["duplicate_rate"] == pytest.approx(twins / len(rows))
    for key, counts in (("bucket_sizes", size), ("bucket_contents", contents)):
        below = 0
        for entry in got[key]:
            inside = [i for i, count in enumerate(counts) if below < count <= entry["up_to"]]
            assert entry["ids"] == len(inside)
            assert entry["items"] == sum(size[i] for i in inside)
            below = entry["up_to"]
        assert below // 2 < max(counts) <= below, "the last bin holds the fullest ID"


def test_residual_energy_counts_from_the_whole() -> None:
    levels: list[dict[str, float]] = [{}, {}]
    add_residual_energy(levels, held_out=[8.0, 4.0, 2.0], everywhere=[100.0, 40.0, 10.0])
    assert [level["residual_energy"] for level in levels] == [0.4, 0.1]
    assert [level["residual_energy_held_out"] for level in levels] == [0.5, 0.25]
    assert [level["r2_held_out"] for level in levels] == [0.5, 0.75]


def test_cohesion_of_wide_vectors_is_exact() -> None:
    """Sums in float64: ten thousand equal vectors have a mean cosine of one."""
    vectors = np.full((10_000, 3), 0.1, dtype=np.float32)
    (only,) = cohesion(vectors, np.zeros((10_000, 1), np.uint8), (1,), seed=0)
    assert only["cohesion"] == pytest.approx(1.0, abs=1e-6)


GATES = {
    "min_perplexity_fraction": (
        broken(first={"perplexity": 12.5}),
        r"perplexity 12\.5 at level 0, not 25\.6",
    ),
    "min_perplexity": (broken(first={"perplexity": 99.0}), r"perplexity 99\.0 at level 0, not 100\.0"),
    "max_dead_fraction": (
        broken(last={"dead": 200}),
        r"200 of 256 codes of level 1 are dead.*78\.1%, not.*50",
    ),
    "min_r2_held_out": (broken(last={"r2_held_out": 0.02}), r"R² 0\.020 after all levels, not 0\.100"),
    "min_cohesion_gain": (broken(near={"cohesion": 0.04}), r"0\.039 above chance, not more than 0\.050"),
    "max_collision_rate": (broken(collision_rate=0.7), r"collision rate 70\.0%, not at most 50\.0%"),
    "max_largest_bucket": (broken(largest_bucket_contents=12_000), r"12,000 items.*not at most 10,000"),
}
OFF = {
    "min_perplexity_fraction": 0.0,
    "min_perplexity": 0.0,
    "max_dead_fraction": 1.0,
    "min_r2_held_out": 0.0,
    "min_cohesion_gain": 0.0,
    "max_collision_rate": 1.0,
    "max_largest_bucket": 0,
}


@pytest.mark.parametrize("key", GATES)
def test_every_gate_names_figure_threshold_key_and_fix(key: str) -> None:
    gate = QualityConfig(min_perplexity=100.0 if key == "min_perplexity" else 0.0)
    check_gate(HEALTHY, gate)
    quality, told = GATES[key]
    with pytest.raises(GateError, match=told) as caught:
        check_gate(quality, gate)
    assert caught.value.exit_code == 6
    assert f"where: quantizer.quality.{key} = {getattr(gate, key):g}" in str(caught.value)
    assert "fix: " in str(caught.value)
    assert str(caught.value).count("where:") == 1, "nothing else fails"
    check_gate(quality, gate.model_copy(update={key: OFF[key]}))


def test_all_failed_gates_are_in_one_error() -> None:
    worst = broken(
        first={"perplexity": 2.0, "dead": 250},
        last={"dead": 255, "r2_held_out": -0.1},
        near={"cohesion": 0.0},
        collision_rate=0.9,
        largest_bucket_contents=50_000,
    )
    gate = QualityConfig(min_perplexity=100.0)
    with pytest.raises(GateError, match="8 quality gates") as caught:
        check_gate(worst, gate)
    text = str(caught.value)
    for key in GATES:
        assert f"quantizer.quality.{key} = " in text
    assert "level 0 are dead" in text
    assert "level 1 are dead" in text
    assert text.count("fix: ") == 8
    assert "quantizer-quality.json" in text
    check_gate(worst, QualityConfig(**OFF))


@pytest.mark.parametrize(("column", "stopped"), [("text_tokens", True), ("image_tokens", False)])
def test_published_codes_of_the_lineage_at_the_gate(bench_data: Path, column: str, stopped: bool) -> None:
    """Text codes of MQL4GRec: 130 of 256 dead at level 0, one holds 31.5 % of the items."""
    table = pq.read_table(bench_data / "instruments" / "items.parquet", columns=[column])
    codes = np.stack(table[column].to_numpy(zero_copy_only=False))
    quality = broken(first=level_usage(codes, (256,) * 4)[0])
    if not stopped:
        check_gate(quality, QualityConfig())
        return
    with pytest.raises(GateError, match=r"perplexity 15\.8 at level 0, not 25\.6") as caught:
        check_gate(quality, QualityConfig())
    assert "130 of 256 codes of level 0 are dead" in str(caught.value)


def test_without_pairs_there_is_no_cohesion_to_judge() -> None:
    check_gate(broken(near={"cohesion": 0.0, "shuffled": 0.0, "pairs": 0}), QualityConfig())


def _quantize(folder: Path, inputs: dict[str, Artifact], **keys: object) -> Artifact:
    store = ArtifactStore(folder)
    ctx = StageContext.local(store, folder / "runs" / "x", stage="quantizer", key="1" * 64, seed=3)
    fixed = {"iterations": 8, "collisions": "none", "quality": {"max_collision_rate": 1.0}}
    return stage.run(ctx, parse_config({"quantizer": fixed | keys}), inputs)


def test_the_stage_measures_what_its_codes_leave(tmp_path: Path) -> None:
    fused = clustered(3000, 12, clusters=40)
    inputs = quantizer_inputs(ArtifactStore(tmp_path), fused)
    artifact = _quantize(tmp_path, inputs, levels=[16, 16, 16])
    levels = artifact.load_json("quality.json")["levels"]
    quantizer = Quantizer.load(artifact)
    x = quantizer.latents(torch.from_numpy(fused.numpy().astype(np.float16)))
    raw = torch.from_numpy(artifact.load_npy("raw_codes.npy").astype(np.int64))
    for depth, level in enumerate(levels, start=1):
        left = x - quantizer.latents(quantizer.decode(raw[:, :depth]))
        share = float(left.square().sum() / x.square().sum())
        assert level["residual_energy"] == pytest.approx(share, rel=1e-3)
        assert level["r2_held_out"] == pytest.approx(1 - level["residual_energy_held_out"])
        assert level["residual_energy_held_out"] > level["residual_energy"], "a fit flatters what it has seen"


def _text_vectors(table: pa.Table, *, dim: int) -> torch.Tensor:
    """Title, description and labels through the built-in text encoder, float32 [n, 3 dim]."""
    texts = {name: normalise(text) for name, text in item_texts(table, category_paths(table)).items()}
    counts = np.stack([document_frequencies(texts[name]) for name in FIELDS])
    present = np.array([pc.sum(pc.not_equal(texts[name], "")).as_py() for name in FIELDS])
    sample = pc.unique(texts["title"])
    encoder = HashedNgramEncoder.fit(counts, present, sample, field="title", dim=dim, seed=0)
    fields = ("title", "description", "labels")
    return torch.from_numpy(np.concatenate([encoder.encode(texts[name], field=name) for name in fields], 1))


def test_level_0_recovers_the_taxonomy(tmp_path: Path) -> None:
    """Synthetic catalogue, built-in text encoder, quantizer; no fusion, so the floor is one for raw texts."""
    count = 2000
    tree = build_taxonomy(count, seed=0, cold=0.05)
    truth = item_truth(tree, np.arange(count), duplicates=0.02, missing_images=0.1, missing_descriptions=0.1)
    table = item_table(tree, truth)
    inputs = quantizer_inputs(ArtifactStore(tmp_path), _text_vectors(table, dim=64))
    artifact = _quantize(tmp_path, inputs, levels=[32, 32])
    codes, categories = artifact.load_npy("semantic_ids.npy"), table["categories"].to_pylist()
    labels = make_labels(codes, (32, 32), table["title"].to_pylist(), categories)
    found = recovered(codes, labels, categories)
    print(found)
    assert found.top > 0.45
    assert found.top > found.chance + 0.4
    assert found.words > 0.7
    assert found.named > 0.7
    chance = make_labels(
        np.random.default_rng(0).permutation(codes), (32, 32), table["title"].to_pylist(), categories
    )
    assert recovered(codes, chance, categories).named < found.named - 0.3, "the figure can fall"


def test_usage_of_codes_is_that_of_the_raw_table() -> None:
    usage = level_usage(np.array([[0, 1], [0, 1], [2, 1]]), (4, 2))
    assert [level["dead"] for level in usage] == [2, 1]
