"""The fusion stage from catalogue to fused vectors, on one rank and on two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qbrec.config import parse_config
from qbrec.config.root import RootConfig
from qbrec.engine.context import StageContext
from qbrec.errors import DataError
from qbrec.fusion import catalog_pass, stage
from qbrec.fusion.batches import Collator, item_fields
from qbrec.fusion.embed import FusionEncoder
from qbrec.storage.artifact import Artifact, ArtifactStore
from qbrec.storage.blocks import BlockSet
from qbrec.storage.ragged import Ragged
from tests.support.fusion_catalog import make_catalog
from tests.support.spawn import RankError, run_ranks


def config(**fusion: Any) -> RootConfig:
    train = {"epochs": 10, "evaluate_every": 5, "batch_size": 96, "micro_batch": 32, "learning_rate": 5e-3}
    small = {"width": 32, "depth": 2, "heads": 2, "group": 32, "behaviour_dim": 8, "train": train}
    return parse_config({"fusion": {**small, **fusion}})


def _run(rank: int, world: int, root: str, key: str, fusion: dict[str, Any], chunk: int) -> None:
    ctx = StageContext(
        store=ArtifactStore(root),
        run_dir=Path(root, "run", key),
        stage="fusion",
        key=key * 64,
        seed=5,
        rank=rank,
        world=world,
    )
    usual, catalog_pass.CHUNK = catalog_pass.CHUNK, chunk or catalog_pass.CHUNK
    try:
        stage.run(ctx, config(**fusion), {"catalog": _catalog(Path(root))})
    finally:
        catalog_pass.CHUNK = usual


def _catalog(root: Path) -> Artifact:
    found = ArtifactStore(root).find("catalog", "a" * 64)
    assert found is not None
    return found


def build(root: Path, key: str = "f", *, world: int = 1, chunk: int = 0, **fusion: Any) -> Artifact:
    store = ArtifactStore(root)
    if store.find("catalog", "a" * 64) is None:
        make_catalog(root)
    (root / "run" / key).mkdir(parents=True, exist_ok=True)
    run_ranks(_run, world, str(root), key, fusion, chunk)
    artifact = store.find("fusion", key * 64)
    assert artifact is not None
    return artifact


def fused_of(artifact: Artifact) -> np.ndarray[Any, Any]:
    return BlockSet.open(artifact, "fused").column("fused")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return build(tmp_path_factory.mktemp("fusion"))


def test_artifact(built: Artifact) -> None:
    blocks = BlockSet.open(built, "fused")
    np.testing.assert_array_equal(blocks.column("row"), np.arange(300))
    fused, depth = blocks.column("fused"), blocks.column("depth")
    assert fused.shape == (300, 32)
    assert fused.dtype == np.float16
    np.testing.assert_allclose(np.mean(fused.astype(np.float32) ** 2, axis=1), 1, atol=1e-2)
    assert built.meta["mean_depth"] == pytest.approx(depth.mean())
    assert {m["name"] for m in built.meta["modalities"]} == {"text", "image", "structure", "behaviour"}
    assert built.meta["id_embedding"] == "table"
    assert built.inputs.keys() == {"catalog"}
    built.verify()


def test_fused_vectors_find_their_own_content(built: Artifact) -> None:
    found = built.meta["alignment"]
    assert found.keys() == {
        "retrieval/text",
        "retrieval/image",
        "retrieval/structure",
        "retrieval/behaviour",
        "retrieval",
        "depth",
    }
    assert found["retrieval/structure"] > 0.8  # 18 of them; the fused vector has to tell them apart
    assert found["retrieval/text"] > 5 / 300  # five times chance: items of a cluster differ by noise only


def test_weights_reproduce_the_stored_vectors(built: Artifact) -> None:
    encoder = FusionEncoder.load(built, own_rows=True)
    modalities = encoder.model.modalities
    items, rows = BlockSet.open(_catalog(built.path.parents[2]), "items"), np.arange(50, 120)
    collate = Collator(modalities, behaviour=built.load_npy("behaviour.npy"), own_rows=True, dropout=None)
    fused, depth = encoder.embed_batch(collate(items.take(rows, item_fields(modalities)), rows, 0))
    stored = BlockSet.open(built, "fused")
    np.testing.assert_allclose(fused, stored.column("fused", 50, 120), atol=5e-3)
    np.testing.assert_array_equal(depth, stored.column("depth", 50, 120))


def test_new_items_land_near_items_of_their_kind(built: Artifact) -> None:
    items = BlockSet.open(_catalog(built.path.parents[2]), "items")
    encoder = FusionEncoder.load(built)
    fields = items.take(np.arange(300), item_fields(encoder.model.modalities))
    structure = fields.pop("structure")
    features = {k.removeprefix("feature."): v for k, v in fields.items() if isinstance(v, Ragged)}
    cold, depth = encoder.embed(features, size=300, structure=structure)
    warm = BlockSet.open(built, "fused").column("fused").astype(np.float32)
    assert cold.shape == warm.shape
    assert depth.min() >= 1
    likeness = (cold.astype(np.float32) @ warm.T) / 32
    np.fill_diagonal(likeness, -9)
    cluster = structure[:, 0]
    near = cluster[np.argsort(-likeness, axis=1)[:, :5]]
    known = cluster >= 0
    assert (near[known] == cluster[known, None]).mean() > 0.7
    part, _ = encoder.embed({k: v.slice(7, 9) for k, v in features.items()}, size=2, structure=structure[7:9])
    np.testing.assert_allclose(part, cold[7:9], atol=5e-3)


def test_embedding_refuses_what_the_network_does_not_know(built: Artifact) -> None:
    encoder = FusionEncoder.load(built)
    tokens = Ragged.from_lengths(np.zeros((1, 7), np.float16), np.array([1]))
    with pytest.raises(DataError, match="no modality 'sound'"):
        encoder.embed({"sound": tokens}, size=1)
    with pytest.raises(DataError, match="text features have shape"):
        encoder.embed({"text": tokens}, size=1)
    alone, _ = encoder.embed({}, size=2)
    assert np.isfinite(alone).all()
    assert len(encoder.embed({}, size=0)[0]) == 0


@pytest.mark.parametrize(
    "change",
    [
        {"depth": 1},
        {"gate": False},
        {"modalities": ["structure", "behaviour"]},
        {"id_embedding": "shared"},
        {"id_dropout": 0.9},
        {"modality_dropout": 0.6},
        {"alignment_temperature": 1.0},
        {"loss_temperature": 0.5},
        {"behaviour_dim": 0},
        {"behaviour_window": 1},
        {"behaviour_weight": 0.0},
        {"behaviour_interactions": 300},
        {"cross_weight": 4.0},
        {"heads": 4},
    ],
    ids=lambda c: next(iter(c)),
)
def test_every_key_changes_the_vectors(change: dict[str, Any], tmp_path: Path) -> None:
    train = {"epochs": 1, "batch_size": 96, "micro_batch": 32, "learning_rate": 3e-3}
    make_catalog(tmp_path, num_items=64, num_users=80)
    one, other = build(tmp_path, "f", train=train), build(tmp_path, "e", train=train, **change)
    assert not np.array_equal(fused_of(one), fused_of(other))


def test_views_are_chosen_by_name(tmp_path: Path) -> None:
    make_catalog(tmp_path, num_items=64, num_users=80)
    train = {"epochs": 1, "batch_size": 96, "micro_batch": 32}
    chosen = build(tmp_path, "f", train=train, modalities=["structure"])
    assert [view["name"] for view in chosen.meta["modalities"]] == ["structure"]
    assert not chosen.has("behaviour.npy")
    with pytest.raises(RankError, match=r"(?s)no view 'smell' to fuse.*structure"):
        build(tmp_path, "e", train=train, modalities=["smell"])


def test_width_without_table_or_behaviour(tmp_path: Path) -> None:
    artifact = build(tmp_path, width=16, id_embedding="shared", behaviour_dim=0)
    assert not any(name.startswith("rows-") for name in artifact.manifest["files"])
    assert not artifact.has("behaviour.npy")
    assert artifact.meta["id_embedding"] == "shared"
    assert BlockSet.open(artifact, "fused").column("fused").shape == (300, 16)


def test_two_ranks_learn_and_write_the_same(built: Artifact, tmp_path: Path) -> None:
    one, two = (build(tmp_path / str(world), world=world, chunk=7) for world in (1, 2))
    names = sorted(path.name for path in one.path.iterdir())
    assert sum(name.startswith("fused-") for name in names) == 15  # 43 blocks of 7 rows, 3 to a tar
    assert sorted(path.name for path in two.path.iterdir()) == names
    np.testing.assert_array_equal(BlockSet.open(two, "fused").column("row"), np.arange(300))
    for other in (one, two):
        np.testing.assert_allclose(fused_of(other), fused_of(built), atol=5e-3)
    assert two.meta["steps"] == one.meta["steps"] == 40
    assert two.meta["mean_depth"] == one.meta["mean_depth"]


def test_a_stage_cut_off_while_embedding_does_not_train_again(tmp_path: Path) -> None:
    first = build(tmp_path)
    before, log = fused_of(first).copy(), tmp_path / "run" / "f" / "metrics.jsonl"
    trained = log.read_text().count("time/forward")
    (first.path / "manifest.json").unlink()
    (first.path / "fused-000000.tar").write_bytes(b"half a tar")
    again = build(tmp_path)
    np.testing.assert_array_equal(fused_of(again), before)
    assert again.meta == first.meta
    assert log.read_text().count("time/forward") == trained > 0
    assert json.loads(log.read_text().splitlines()[-1])["stage"] == "fusion"


@pytest.mark.dist
def test_a_group_shared_by_ranks_trains_as_on_one(tmp_path: Path) -> None:
    """Groups of 64 in micro-batches of 16: whole on one rank, halves on two, quarters on four."""
    train = {"epochs": 3, "evaluate_every": 3, "batch_size": 128, "micro_batch": 16, "learning_rate": 5e-3}
    make_catalog(tmp_path, num_items=150, num_users=100)
    one, two, four, apart = (
        build(tmp_path, key, world=world, group=group, train=train)
        for key, world, group in (("b", 1, 64), ("c", 2, 64), ("d", 4, 64), ("e", 1, 16))
    )
    for other in (two, four):
        np.testing.assert_allclose(fused_of(other), fused_of(one), atol=5e-3)
        assert other.meta["steps"] == one.meta["steps"] == 6
    assert np.abs(fused_of(apart).astype(np.float32) - fused_of(one)).max() > 0.05, "group changes nothing"
