"""The catalogue stage on a real Ray: what it stores, what changes nothing, what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import webdataset as wds

from qbrec.catalog.encoders.text import HashedNgramEncoder
from qbrec.catalog.stage import run
from qbrec.catalog.synth import SyntheticSummary, generate
from qbrec.config import RootConfig, parse_config
from qbrec.engine.context import StageContext
from qbrec.errors import DataError
from qbrec.storage.artifact import Artifact, ArtifactStore
from qbrec.storage.blocks import RaggedField
from qbrec.storage.catalog_view import CatalogView
from qbrec.storage.hashing import hash64

pytestmark = pytest.mark.usefixtures("ray_session")


def configure(folders: dict[str, Path], **catalog: Any) -> RootConfig:
    domains = {
        name: {"items": str(folder / "items.parquet"), "interactions": str(folder / "interactions.parquet")}
        for name, folder in folders.items()
    }
    return parse_config({"data": {"domains": domains}, "catalog": {"text": {"dim": 32}} | catalog})


def build(config: RootConfig, storage: Path) -> Artifact:
    return run(StageContext.local(ArtifactStore(storage), storage / "run", stage="catalog"), config, {})


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> SyntheticSummary:
    return generate(tmp_path_factory.mktemp("shop"), num_items=600, num_users=400, seed=3, chunk=250)


@pytest.fixture(scope="module")
def whole(shop: SyntheticSummary, ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return build(configure({"shop": shop.items.parent}), tmp_path_factory.mktemp("whole"))


def test_what_is_stored(shop: SyntheticSummary, whole: Artifact) -> None:
    view = CatalogView(whole)
    assert view.num_items == shop.num_items == view.items().num_samples
    assert whole.meta["num_users"] == 400 == view.histories().num_samples
    assert whole.meta["num_interactions"] == shop.num_interactions
    assert whole.meta["num_duplicates"] == shop.num_duplicates
    assert whole.meta["rejected"] == {}
    assert whole.meta["modalities"]["image"]["present"] == 600 - shop.num_without_image
    assert whole.meta["modalities"]["text"] == {"dim": 32, "present": 600, "max_tokens": 3}
    assert not list(whole.path.rglob("*.tmp"))
    whole.verify()


def test_rows_are_in_the_order_of_the_hash(shop: SyntheticSummary, whole: Artifact) -> None:
    view, items = CatalogView(whole), pq.read_table(shop.items)
    ids = view.item_ids(np.arange(600))
    hashes = hash64("shop", ids)
    assert (np.diff(hashes.astype(object)) > 0).all()
    assert sorted(ids) == sorted(items["item_id"].to_pylist())
    assert view.lookup([*ids[5:8], "nowhere"], "shop").tolist() == [5, 6, 7, -1]
    by_id = {row["item_id"]: row for row in items.drop_columns(["image"]).to_pylist()}
    assert view.titles([3, 1]) == [by_id[ids[3]]["title"], by_id[ids[1]]["title"]]
    assert view.categories([9])[0] == by_id[ids[9]]["categories"]
    assert view.items().column("row").tolist() == list(range(600))
    with pytest.raises(DataError, match="no domain 'games'"):
        view.lookup(ids[:1], "games")


def test_features_are_those_of_the_frozen_encoder(shop: SyntheticSummary, whole: Artifact) -> None:
    from qbrec.catalog.encoders.ngrams import normalise

    view = CatalogView(whole)
    encoder = HashedNgramEncoder.from_state(whole.load_safetensors("encoder.safetensors"))
    stored = view.items().ragged(RaggedField("feature.text", counts="tokens.text"))
    titles = normalise(pa.array(view.titles(np.arange(600))))
    expected = encoder.encode(titles, field="title").astype(np.float16)
    np.testing.assert_array_equal(stored.values[stored.offsets[:-1]], expected)
    statistics = whole.load_safetensors("statistics.safetensors")
    wide = stored.values.astype(np.float64)
    np.testing.assert_allclose(statistics["mean.text"], wide.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(statistics["std.text"], wide.std(axis=0), atol=1e-6)


def test_duplicates_are_those_of_the_truth(shop: SyntheticSummary, whole: Artifact) -> None:
    view, truth = CatalogView(whole), pq.read_table(shop.truth)
    copies = truth.filter(truth["duplicate_of"].is_valid())
    first = view.lookup(copies["item_id"].to_pylist(), "shop")
    second = view.lookup(copies["duplicate_of"].to_pylist(), "shop")
    group = view.duplicate_group
    assert (group[first] == group[second]).all()
    assert len(np.unique(group)) == 600 - len(first)


def test_histories_are_those_of_the_input(shop: SyntheticSummary, whole: Artifact) -> None:
    view = CatalogView(whole)
    histories = view.load_histories("shop")
    assert (histories.cut == histories.rows.lengths[:, None] - [2, 1]).all()
    table = pq.read_table(shop.interactions)
    for user in (0, 17, 399):
        (name,) = view.user_ids([user])
        mine = table.filter(pc.equal(table["user_id"], name)).sort_by("timestamp")
        assert histories.times.row(user).tolist() == mine["timestamp"].to_pylist()
        assert sorted(view.item_ids(histories.rows.row(user))) == sorted(mine["item_id"].to_pylist())
    trained = histories.rows.prefix(histories.cut[:, 0])
    assert view.train_counts.tolist() == np.bincount(trained.values, minlength=600).tolist()


def test_stock_webdataset_reads_the_blocks(whole: Artifact) -> None:
    samples = list(wds.WebDataset(str(whole.path / "items-000000.tar"), shardshuffle=False).decode())
    rows = np.concatenate([sample["row.npy"] for sample in samples])
    assert rows.tolist() == list(range(600))


def test_workers_change_no_byte_and_shards_no_value(
    shop: SyntheticSummary, whole: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several shards and three partitions, encoded on two cores and on one."""
    import ray.data

    monkeypatch.setattr(
        "qbrec.catalog.build_histories.MAX_INTERACTIONS_PER_PARTITION", shop.num_interactions // 3 + 1
    )
    monkeypatch.setattr("qbrec.catalog.build_items.ITEM_UNIT_ROWS", 100)
    config = configure({"shop": shop.items.parent}, shard_bytes=100_000, block_bytes=20_000)
    wide = build(config, tmp_path / "two")
    limits = ray.data.DataContext.get_current().execution_options.resource_limits
    monkeypatch.setattr(
        ray.data.DataContext.get_current().execution_options, "resource_limits", limits.copy(cpu=1)
    )
    narrow = build(config, tmp_path / "one")
    assert narrow.fingerprint == wide.fingerprint
    shards = len(list(wide.path.glob("items-*.tar")))
    assert 3 < shards < 20
    assert len(list(wide.path.glob("histories-*.tar"))) == 3

    one, many = CatalogView(whole), CatalogView(wide)
    assert many.items().block_sizes.max() < 600 / shards
    for field in ("row", "domain", "structure", "content", "tokens.text", "tokens.image"):
        np.testing.assert_array_equal(one.items().column(field), many.items().column(field))
    for modality in ("text", "image"):
        field = RaggedField(f"feature.{modality}", counts=f"tokens.{modality}")
        np.testing.assert_array_equal(one.items().ragged(field).values, many.items().ragged(field).values)
    a, b = one.load_histories(), many.load_histories()
    assert a.rows.values.tolist() == b.rows.values.tolist()
    assert a.cut.tolist() == b.cut.tolist()
    assert one.user_ids(a.user) == many.user_ids(b.user)
    assert one.item_ids(np.arange(600)) == many.item_ids(np.arange(600))


def test_a_small_catalogue_has_blocks_for_several_ranks(shop: SyntheticSummary, tmp_path: Path) -> None:
    """Blocks of the default 4 MB would leave a second rank without any."""
    artifact = build(configure({"shop": shop.items.parent}, text={"dim": 1024}), tmp_path)
    items = CatalogView(artifact).items()
    tars = sum(path.stat().st_size for path in artifact.path.glob("items-*.tar"))
    assert tars < 4 << 20
    assert items.num_blocks >= tars >> 20 > 1


def test_two_domains_and_bad_rows(tmp_path: Path) -> None:
    """The same ids in two domains are different items; bad rows are set aside."""
    rng = np.random.default_rng(0)
    for name, extra in (("pets", "tag"), ("games", "price")):
        (tmp_path / name).mkdir()
        vectors = [v.tolist() for v in rng.normal(size=(40, 6))]
        vectors[7] = [float("nan")] * 6 if name == "pets" else None
        items = {"item_id": [f"i{n}" for n in range(40)], "text_embedding": vectors, extra: list(range(40))}
        pq.write_table(pa.table(items), tmp_path / name / "items.parquet")
        users, picked = np.repeat(np.arange(30), 5), rng.integers(0, 40, 150)
        picked[picked == 7] = 8
        picked[3] = 7
        ids = [f"i{n}" for n in picked]
        ids[4] = "nowhere"
        rows = {"user_id": [f"u{u}" for u in users], "item_id": ids, "timestamp": np.arange(150)}
        pq.write_table(pa.table(rows), tmp_path / name / "interactions.parquet")
    folders = {name: tmp_path / name for name in ("pets", "games")}
    with pytest.raises(DataError, match="1 of 40 rows of items in domain 'pets'") as caught:
        build(configure(folders), tmp_path / "strict")
    assert "row 7" in str(caught.value)
    assert "Traceback" not in str(caught.value)

    artifact = build(configure(folders, max_rejected_fraction=0.05), tmp_path / "lax")
    view = CatalogView(artifact)
    assert artifact.meta["rejected"] == {
        "items: text_embedding: holds NaN or a number beyond float16": 1,
        "interactions: item_id: is not among the items": 2,
        "interactions: item_id: belongs to a rejected item": 1,
    }
    assert view.num_items == 79
    assert view.domain_mask("pets").sum() == 39
    assert artifact.meta["modalities"] == {"text": {"dim": 6, "present": 78, "max_tokens": 1}}
    assert view.lookup(["i7"], "pets").tolist() == [-1]
    missing = view.lookup(["i7"], "games")
    assert view.items().column("tokens.text")[missing].tolist() == [0]
    both = [view.lookup(["i3"], name)[0] for name in ("pets", "games")]
    assert [row["domain"] for row in view.display(both).to_pylist()] == ["pets", "games"]
    assert [(row["tag"], row["price"]) for row in view.display(both).to_pylist()] == [(3, None), (None, 3)]
    games = view.load_histories("games")
    assert len(games) == 30
    assert view.item_domain[games.rows.values].tolist() == [1] * games.rows.lengths.sum()
    rejected = pq.read_table(artifact.path / "rejected" / "interactions.parquet").to_pylist()
    assert [row["item_id"] for row in rejected] == ["i7", "nowhere", "nowhere"]


def test_errors_inside_tasks_come_out_as_they_were(shop: SyntheticSummary, tmp_path: Path) -> None:
    """A data page that is damaged is found by a Ray task, and told without a traceback of the worker."""
    (tmp_path / "in").mkdir()
    for path in (shop.items, shop.interactions):
        data = bytearray(path.read_bytes())
        if path == shop.items:
            data[200:4000] = bytes(3800)
        (tmp_path / "in" / path.name).write_bytes(data)
    with pytest.raises(DataError) as caught:
        build(configure({"shop": tmp_path / "in"}), tmp_path / "out")
    assert "items.parquet" in str(caught.value)
    assert "ray::" not in str(caught.value)


def test_nobody_to_test_on(tmp_path: Path) -> None:
    pq.write_table(pa.table({"item_id": ["a", "b"], "title": ["x", "y"]}), tmp_path / "items.parquet")
    rows = {"user_id": ["u", "u"], "item_id": ["a", "b"], "timestamp": [1, 2]}
    pq.write_table(pa.table(rows), tmp_path / "interactions.parquet")
    with pytest.raises(DataError, match="no user of the target domain 'tiny'"):
        build(configure({"tiny": tmp_path}), tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "users", "items", "interactions"),
    [
        ("scientific", 8317, 4344, 58492),
        ("beauty", 22363, 12101, 198502),
        ("instruments", 17112, 6250, 136226),
    ],
)
def test_real_data(
    bench_data: Path, tmp_path: Path, name: str, users: int, items: int, interactions: int
) -> None:
    artifact = build(configure({name: bench_data / name}), tmp_path)
    meta = artifact.meta
    assert (meta["num_users"], meta["num_items"], meta["num_interactions"]) == (users, items, interactions)
    assert meta["eval_users"] == users
    assert meta["rejected"] == {}
    histories = CatalogView(artifact).load_histories()
    assert (histories.cut[:, 1] == histories.rows.lengths - 1).all()
    # Timestamps there are positions: the order must be theirs exactly.
    assert (
        histories.times.values
        == np.arange(interactions) - np.repeat(histories.times.offsets[:-1], histories.times.lengths)
    ).all()
