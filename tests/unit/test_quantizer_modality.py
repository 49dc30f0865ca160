"""Codes of single modalities beside the joint semantic ID, and the table that stage 3 reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qbrec.config import RootConfig, parse_config
from qbrec.engine.context import StageContext, sub_seed
from qbrec.errors import ConfigError, DataError
from qbrec.quantizer import stage
from qbrec.quantizer.kmeans.chunks import stratified
from qbrec.quantizer.modality import ModalityQuantizer, mean_tokens
from qbrec.storage.artifact import Artifact, ArtifactStore
from qbrec.storage.ragged import Ragged
from qbrec.storage.token_table import token_table
from tests.support.clusters import clustered
from tests.support.dying import Killed, die_at_report
from tests.support.modality_inputs import some_features, with_features
from tests.support.quantizer_inputs import quantizer_inputs

SEED = 7
ITEMS = 2300  # a grain of the row grid and a bit
FEATURES = {
    "text": some_features(ITEMS, 6, missing=0.0, seed=1),
    "image": some_features(ITEMS, 9, missing=0.4, seed=2),
}
BOTH = {"modalities": ["joint", "text", "image"], "modality_levels": [12, 7]}


def _config(**keys: object) -> RootConfig:
    small = {"levels": [16, 16], "iterations": 5, "refine_epochs": 0, "refine_solves": 0}
    gate = {"collisions": "none", "quality": {"max_collision_rate": 1.0}}
    return parse_config({"quantizer": small | gate | keys})


def _run(folder: Path, inputs: dict[str, Artifact], name: str, **keys: object) -> Artifact:
    ctx = StageContext.local(
        ArtifactStore(folder), folder / "runs" / name, stage="quantizer", key=name.ljust(64, "0"), seed=SEED
    )
    return stage.run(ctx, _config(**keys), inputs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def plain(folder: Path) -> dict[str, Artifact]:
    return quantizer_inputs(ArtifactStore(folder), clustered(ITEMS, 8, clusters=200))


@pytest.fixture(scope="module")
def inputs(folder: Path, plain: dict[str, Artifact]) -> dict[str, Artifact]:
    return with_features(ArtifactStore(folder), plain, FEATURES)


@pytest.fixture(scope="module")
def artifact(folder: Path, inputs: dict[str, Artifact]) -> Artifact:
    return _run(folder, inputs, "both", **BOTH)


def _held_out() -> np.ndarray:
    held = np.zeros(ITEMS, bool)
    held[stratified(ITEMS, int(ITEMS * 0.05), seed=sub_seed(SEED, "quantizer.held_out"))] = True
    return held


def test_the_joint_id_stays_what_it_is(folder: Path, inputs: dict[str, Artifact], artifact: Artifact) -> None:
    joint = _run(folder, inputs, "joint")
    for name in ("semantic_ids.npy", "raw_codes.npy", "codebooks.safetensors", "bucket_order.npy"):
        assert joint.file(name).read_bytes() == artifact.file(name).read_bytes()
    assert not joint.has("modality_codes.npy")
    assert joint.meta["levels"] == artifact.meta["levels"] == [16, 16]
    assert joint.meta["modalities"] == []
    assert joint.load_json("quality.json")["modalities"] == {}
    assert token_table(joint).codes.shape == (ITEMS, 2)


def test_codes_are_the_nearest_of_the_standardised_mean_tokens(artifact: Artifact) -> None:
    codes = artifact.load_npy("modality_codes.npy")
    assert codes.shape == (ITEMS, 4)
    assert codes.dtype == np.uint8
    assert artifact.meta["modalities"] == [
        {"name": "text", "levels": [13, 8]},
        {"name": "image", "levels": [13, 8]},
    ]
    for place, (name, ragged) in enumerate(FEATURES.items()):
        books = {
            k: t.double().numpy()
            for k, t in artifact.load_safetensors(f"codebooks.{name}.safetensors").items()
        }
        have = np.flatnonzero(ragged.lengths)
        means = np.stack([ragged.row(i).astype(np.float64).mean(0) for i in have])
        np.testing.assert_allclose(books["mean"], means.mean(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(books["std"], means.std(0), rtol=1e-5)
        residual = (means - books["mean"]) / books["std"]
        for level, size in enumerate((12, 7)):
            book = books[f"level.{level}"]
            assert book.shape == (size, means.shape[1])
            gap = ((residual[:, None] - book) ** 2).sum(2)
            mine = codes[have, 2 * place + level]
            chosen = gap[np.arange(len(have)), mine]
            assert (chosen <= gap.min(1) + 1e-4).all()
            residual -= book[mine]
        missing = ragged.lengths == 0
        assert (codes[missing, 2 * place : 2 * place + 2] == [12, 7]).all()
        assert missing.any() == (name == "image")


def test_quality_counts_only_the_items_that_have_it(artifact: Artifact) -> None:
    figures = artifact.load_json("quality.json")["modalities"]
    assert list(figures) == ["image", "text"]  # JSON is sorted
    codes = artifact.load_npy("modality_codes.npy")
    for place, (name, ragged) in enumerate(FEATURES.items()):
        have = ragged.lengths > 0
        assert figures[name]["present"] == have.sum()
        first, second = figures[name]["levels"]
        assert (first["codes"], second["codes"]) == (12, 7)
        assert first["used"] == len(np.unique(codes[have, 2 * place]))
        assert first["largest_share"] == pytest.approx(np.bincount(codes[have, 2 * place]).max() / have.sum())
        stored = artifact.load_safetensors(f"codebooks.{name}.safetensors")
        rows = np.flatnonzero(have & _held_out())
        left = torch.from_numpy(mean_tokens(ragged.take(rows)) - stored["mean"].numpy()) / stored["std"]
        whole = float((left.double() ** 2).sum())
        assert 0.5 < first["r2_held_out"] < second["r2_held_out"] < 1
        for level, entry in enumerate((first, second)):
            left = left - stored[f"level.{level}"][codes[rows, 2 * place + level].astype(int)]
            assert entry["r2_held_out"] == pytest.approx(1 - float((left**2).sum()) / whole, rel=1e-5)


def test_held_out_and_missing_items_are_not_fitted(folder: Path, plain: dict[str, Artifact]) -> None:
    held = _held_out()
    rng = np.random.default_rng(0)
    lengths = (rng.random(ITEMS) < 0.8).astype(np.int64)
    values = rng.standard_normal((ITEMS, 4)) + 50  # whoever takes missing items for zeros finds them far out
    values[held] += 1000 * rng.choice([-1, 1], (held.sum(), 4))
    features = {"sound": Ragged.from_lengths(values[lengths > 0].astype(np.float16), lengths)}
    made = with_features(ArtifactStore(folder), plain, features, key="a")
    settings = {"modalities": ["joint", "sound"], "modality_levels": [16]}
    fitted = _run(folder, made, "held", **settings).load_safetensors("codebooks.sound.safetensors")
    mean = values[lengths > 0].mean(0)
    np.testing.assert_allclose(fitted["mean"].numpy(), mean, rtol=0.01)
    centroids = fitted["level.0"] * fitted["std"] + fitted["mean"]
    assert float((centroids - 50).abs().max()) < 6, "a centroid lies with held-out or missing items"
    seen = _run(folder, made, "seen", **settings, held_out=0.0).load_safetensors(
        "codebooks.sound.safetensors"
    )
    assert float((seen["level.0"] * seen["std"] + seen["mean"] - 50).abs().max()) > 500


def test_frozen_codebooks_give_the_stored_codes(artifact: Artifact) -> None:
    found = [ModalityQuantizer.load(artifact, name).encode(FEATURES[name]) for name in ("text", "image")]
    assert np.array_equal(torch.cat(found, 1).numpy(), artifact.load_npy("modality_codes.npy"))
    assert ModalityQuantizer.load(artifact, "image").sizes == (13, 8)


def test_auto_levels_follow_the_joint_id_and_the_items_that_have_it(
    folder: Path, plain: dict[str, Artifact], inputs: dict[str, Artifact]
) -> None:
    auto = _run(folder, inputs, "auto", modalities=["joint", "image"])
    assert auto.meta["modalities"] == [{"name": "image", "levels": [17, 17]}]
    few = some_features(ITEMS, 3, missing=0.97, seed=3)
    assert 32 <= (few.lengths > 0).sum() < 128
    made = with_features(ArtifactStore(folder), plain, {"rare": few}, key="9")
    rare = _run(folder, made, "rare", modalities=["joint", "rare"])
    assert rare.meta["modalities"][0]["levels"] in ([5, 5], [9, 9])


def test_what_cannot_be_is_refused_before_anything_is_fitted(
    folder: Path, plain: dict[str, Artifact], inputs: dict[str, Artifact]
) -> None:
    with pytest.raises(ConfigError, match=r"(?s)no modality 'sound'.*knows image, text"):
        _run(folder, inputs, "unknown", modalities=["joint", "sound"])
    with pytest.raises(ConfigError, match=r"no modality 'text'"):
        _run(folder, plain, "none", modalities=["joint", "text"])
    with pytest.raises(ConfigError, match=r"2000 codes, but only 13\d\d items with image"):
        _run(folder, inputs, "large", modalities=["joint", "image"], modality_levels=[2000])
    for name in ("unknown", "none", "large"):
        assert not list((folder / "runs" / name).glob("checkpoints/quantizer/*"))
    for wrong in (["text"], ["text", "joint"], ["joint", "text", "text"], []):
        with pytest.raises(ConfigError, match="begin with joint"):
            _config(modalities=wrong)
    with pytest.raises(ConfigError, match="modality_levels"):
        _config(modality_levels=[])


def test_a_killed_run_goes_on_with_the_same_bits(
    folder: Path, inputs: dict[str, Artifact], artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = die_at_report(monkeypatch, 5)
    with pytest.raises(Killed):
        _run(folder, inputs, "killed", **BOTH)
    again = _run(folder, inputs, "killed", **BOTH)
    parts = [f"{name}-level-{level}" for name in ("text", "image") for level in (0, 1)]
    assert seen == ["level-0", "level-1", "revive", *parts], "no level was fitted twice"
    for name in artifact.manifest["files"]:
        assert again.file(name).read_bytes() == artifact.file(name).read_bytes(), name


def test_the_token_table_joins_ids_and_modality_codes(artifact: Artifact, tmp_path: Path) -> None:
    table = token_table(artifact)
    assert table.sizes == (16, 16, 13, 8, 13, 8)
    assert table.num_joint == 2
    assert table.modalities == (("text", 2), ("image", 2))
    assert np.array_equal(table.codes[:, :2], artifact.load_npy("semantic_ids.npy"))
    assert np.array_equal(table.codes[:, 2:], artifact.load_npy("modality_codes.npy"))
    assert table.codes.dtype == np.uint8
    assert (table.codes.max(0) < table.sizes).all()
    writer = ArtifactStore(tmp_path).writer("quantizer", "1" * 64)
    writer.prepare()
    writer.save_npy("semantic_ids.npy", np.zeros((5, 2), np.uint8))
    writer.save_npy("modality_codes.npy", np.zeros((4, 1), np.uint8))
    meta = {"levels": [3, 3], "modalities": [{"name": "text", "levels": [3]}]}
    with pytest.raises(DataError, match=r"shape \(4, 1\), not \(5, 1\)"):
        token_table(writer.commit(meta=meta, inputs={}, config={}, seed=0))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_mean_tokens_against_a_loop(lengths: list[int], width: int) -> None:
    values = np.random.default_rng(sum(lengths)).standard_normal((sum(lengths), width)).astype(np.float16)
    ragged = Ragged.from_lengths(values, np.array(lengths))
    want = [
        row.astype(np.float64).mean(0) if len(row) else np.zeros(width)
        for row in map(ragged.row, range(len(lengths)))
    ]
    np.testing.assert_allclose(mean_tokens(ragged), np.stack(want), atol=1e-5)
