"""Near-duplicates through the catalogue stage on a real Ray: copied reviews found, listed and collapsed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qbrec.catalog.duplicates import near_duplicates
from qbrec.catalog.stage import run
from qbrec.config import parse_config
from qbrec.engine.context import StageContext
from qbrec.errors import DataError
from qbrec.storage.artifact import Artifact, ArtifactStore
from qbrec.storage.catalog_view import CatalogView

pytestmark = pytest.mark.usefixtures("ray_session")

ITEMS = 60


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whoever buys i0 buys its variant i1 next; i2 and i3 show the same; nobody buys i59."""
    folder = tmp_path_factory.mktemp("shop")
    titles = [f"title {row}" for row in range(ITEMS)]
    titles[3] = titles[2]
    items = {"item_id": [f"i{row}" for row in range(ITEMS)], "title": titles}
    pq.write_table(pa.table(items), folder / "items.parquet")
    rng = np.random.default_rng(0)
    columns: dict[str, list[Any]] = {"user_id": [], "item_id": [], "timestamp": []}
    for user in range(200):
        rows = rng.choice(np.arange(2, ITEMS - 1), rng.integers(4, 9), replace=False).tolist()
        if user % 4 == 0:
            rows = [*rows[:1], 0, 1, *rows[1:]]
        if user % 20 == 1:
            rows += [0, 1]  # the variant is this user's test target
        columns["user_id"] += [f"u{user}"] * len(rows)
        columns["item_id"] += [f"i{row}" for row in rows]
        columns["timestamp"] += list(range(len(rows)))
    pq.write_table(pa.table(columns), folder / "interactions.parquet")
    return folder


def build(shop: Path, storage: Path, **duplicates: Any) -> Artifact:
    domains = {
        "shop": {"items": str(shop / "items.parquet"), "interactions": str(shop / "interactions.parquet")}
    }
    config = parse_config({"data": {"domains": domains}, "catalog": {"duplicates": duplicates}})
    return run(StageContext.local(ArtifactStore(storage), storage / "run", stage="catalog"), config, {})


def groups_of(view: CatalogView, groups: np.ndarray) -> list[set[str]]:
    return [set(view.item_ids(np.flatnonzero(groups == row))) for row in np.unique(groups)]


def test_found_and_listed(shop: Path, tmp_path: Path) -> None:
    found = build(shop, tmp_path)
    view = CatalogView(found)
    groups = groups_of(view, np.asarray(view.near_duplicate_group))
    assert sorted(map(sorted, (g for g in groups if len(g) > 1))) == [["i0", "i1"], ["i2", "i3"]]
    pairs = found.load_npy("overlap_pairs.npy")
    assert [set(view.item_ids(pair)) for pair in pairs] == [{"i0", "i1"}]
    assert found.load_npy("overlap_jaccard.npy").tolist() == [1.0]
    listed = pq.read_table(found.file("near_duplicates.parquet"))
    assert listed["reason"].to_pylist() == ["overlap", "content"]
    assert listed["users_in_common"].to_pylist() == [50, None]
    assert listed.schema.metadata == {b"listed": b"2 of 2 pairs, the most users in common first"}
    assert found.meta["duplicates"] == {
        "overlap_pairs": 1, "groups": 2, "items": 4, "largest_group": 2, "pairs": 2, "listed_pairs": 2,
    }  # fmt: skip
    assert not view.retired.any()
    assert not found.has("retired.npy")


def test_many_partitions_find_the_same(shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = build(shop, tmp_path / "whole", min_overlap=0.1, min_users=1)
    monkeypatch.setattr(near_duplicates, "INTERACTIONS_PER_PARTITION", 300)
    cut = build(shop, tmp_path / "cut", min_overlap=0.1, min_users=1)
    pairs = whole.load_npy("overlap_pairs.npy")
    assert len(pairs) > 10
    assert np.array_equal(pairs, cut.load_npy("overlap_pairs.npy"))
    assert len(build(shop, tmp_path / "few", min_overlap=0.1, min_users=9).load_npy("overlap_pairs.npy")) < 10


@pytest.mark.parametrize(("collapse", "gone"), [("content", 1), ("overlap", 1), ("both", 2)])
def test_collapsed(shop: Path, tmp_path: Path, collapse: str, gone: int) -> None:
    whole, found = build(shop, tmp_path / "whole"), build(shop, tmp_path / "collapsed", collapse=collapse)
    before, view = CatalogView(whole), CatalogView(found)
    retired = np.flatnonzero(view.retired)
    assert len(retired) == gone == found.meta["duplicates"]["retired"]
    assert view.num_items == ITEMS
    assert view.candidates("shop").sum() == ITEMS - gone
    assert (view.representatives(retired) != retired).all()
    histories, old = view.load_histories("shop"), before.load_histories("shop")
    assert not np.isin(histories.rows.values, retired).any()
    assert (histories.user == old.user).all()
    assert (histories.rows.lengths > 0).all()
    removed = len(old.rows.values) - len(histories.rows.values)
    assert removed == found.meta["duplicates"]["removed_interactions"]
    assert found.meta["num_interactions"] == len(histories.rows.values)
    if collapse != "content":
        assert removed >= 60  # i0 and i1 of 50 users in training, of 10 at the end
    lengths = histories.rows.lengths
    assert histories.cut.tolist() == np.stack([lengths - 2, lengths - 1], axis=1).tolist()
    trained = histories.rows.prefix(histories.cut[:, 0])
    assert view.train_counts.tolist() == np.bincount(trained.values, minlength=ITEMS).tolist()
    listed = pq.read_table(found.file("near_duplicates.parquet"))
    assert listed["collapsed_into"].null_count == 2 - gone
    assert {path.name for path in found.path.iterdir()} - set(found.manifest["files"]) == {
        "manifest.json",
        "rejected",
    }


def test_nobody_left_to_test_on(tmp_path: Path) -> None:
    items = {"item_id": ["a", "b", "c"], "title": ["same", "same", "same"]}
    pq.write_table(pa.table(items), tmp_path / "items.parquet")
    rows = [(f"u{user}", item, time) for user in range(9) for time, item in enumerate("abc")]
    names = ("user_id", "item_id", "timestamp")
    pq.write_table(
        pa.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))),
        tmp_path / "interactions.parquet",
    )
    with pytest.raises(DataError, match="with duplicates collapsed no user"):
        build(tmp_path, tmp_path / "storage", collapse="both")
