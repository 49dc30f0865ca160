"""The synthetic catalogue keeps its promises: proportions, structure, independence of chunks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from qbrec.catalog.encoders.image import decode
from qbrec.catalog.synth import SyntheticSummary, generate
from qbrec.errors import ConfigError


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> SyntheticSummary:
    return generate(tmp_path_factory.mktemp("shop"), num_items=2000, num_users=3000, seed=1)


@pytest.fixture(scope="module")
def walks(shop: SyntheticSummary) -> list[list[int]]:
    """Items of every user as numbers, oldest first."""
    table = pq.read_table(shop.interactions).sort_by([("user_id", "ascending"), ("timestamp", "ascending")])
    ids = pq.read_table(shop.items)["item_id"].to_pylist()
    number = {name: i for i, name in enumerate(ids)}
    users: dict[str, list[int]] = {}
    for user, item in zip(table["user_id"].to_pylist(), table["item_id"].to_pylist(), strict=True):
        users.setdefault(user, []).append(number[item])
    return list(users.values())


def test_the_input_contract(shop: SyntheticSummary) -> None:
    items = pq.read_table(shop.items)
    assert items.schema.field("categories").type == pa.list_(pa.string())
    assert items.num_rows == len(set(items["item_id"].to_pylist())) == shop.num_items == 2000
    interactions = pq.read_table(shop.interactions)
    assert interactions.num_rows == shop.num_interactions
    assert pc.count_distinct(interactions["user_id"]).as_py() == 3000
    assert set(interactions["item_id"].unique().to_pylist()) <= set(items["item_id"].to_pylist())


def test_known_proportions(shop: SyntheticSummary) -> None:
    truth = pq.read_table(shop.truth)
    items = pq.read_table(shop.items)
    cold = truth.filter(truth["cold"])["item_id"].to_pylist()
    assert len(cold) == shop.num_cold == 100
    assert not set(cold) & set(pq.read_table(shop.interactions)["item_id"].unique().to_pylist())
    assert shop.num_duplicates == 2000 - truth["duplicate_of"].null_count == pytest.approx(40, abs=20)
    assert items["image"].null_count == shop.num_without_image == pytest.approx(200, abs=50)


def test_only_duplicates_share_content(shop: SyntheticSummary) -> None:
    rows = {row["item_id"]: row for row in pq.read_table(shop.items).to_pylist()}
    seen: dict[str, str] = {}
    for row in pq.read_table(shop.truth).to_pylist():
        mine = {k: v for k, v in rows[row["item_id"]].items() if k != "item_id"}
        if row["duplicate_of"]:
            assert mine == {k: v for k, v in rows[row["duplicate_of"]].items() if k != "item_id"}
        else:
            assert seen.setdefault(str(mine), row["item_id"]) == row["item_id"]


def test_pictures_follow_the_category(shop: SyntheticSummary) -> None:
    items, truth = pq.read_table(shop.items), pq.read_table(shop.truth)
    has = np.flatnonzero(items["image"].is_valid().to_numpy())[:400]
    department = truth["department"].to_numpy()[has]
    pictures = np.stack([decode(items["image"][int(i)].as_py(), max_pixels=1024) for i in has])
    corner = pictures[:, 0, 0].astype(float)
    inside = np.mean([corner[department == d].std(axis=0).max() for d in np.unique(department)])
    assert inside < 5 < corner.std(axis=0).max()


def test_users_walk_the_taxonomy(walks: list[list[int]], shop: SyntheticSummary) -> None:
    """Popularity, item-to-item and second-order predictors of the last item are clearly apart."""
    counts = np.zeros(2000)
    pairs: dict[int, dict[int, int]] = {}
    triples: dict[tuple[bool, int], dict[int, int]] = {}
    leaf = pq.read_table(shop.truth)["leaf"].to_numpy()
    for walk in walks:
        np.add.at(counts, walk[:-1], 1)
        for t in range(1, len(walk) - 1):
            near = pairs.setdefault(walk[t - 1], {})
            near[walk[t]] = near.get(walk[t], 0) + 1
            if t > 1:
                stayed = bool(leaf[walk[t - 1]] == leaf[walk[t - 2]])
                after = triples.setdefault((stayed, walk[t - 1]), {})
                after[walk[t]] = after.get(walk[t], 0) + 1
    popular = set(np.argsort(-counts)[:1].tolist())
    hits = np.zeros(3)
    long = [walk for walk in walks if len(walk) > 4]
    for walk in long:
        stayed = bool(leaf[walk[-2]] == leaf[walk[-3]])
        first, second = pairs.get(walk[-2], {}), triples.get((stayed, walk[-2]), {})
        hits += [
            walk[-1] in popular,
            bool(first) and max(first, key=lambda k: first[k]) == walk[-1],
            bool(second) and max(second, key=lambda k: second[k]) == walk[-1],
        ]
    popularity, item, context = hits / len(long)
    assert popularity < 0.02
    assert item > 0.15
    assert context > item + 0.05


def test_nobody_repeats_an_item(walks: list[list[int]]) -> None:
    assert all(len(set(walk)) == len(walk) >= 2 for walk in walks)
    assert np.mean([len(walk) for walk in walks]) == pytest.approx(10, rel=0.1)


def test_items_do_not_depend_on_the_chunk(tmp_path: Path) -> None:
    tables = [
        pq.read_table(generate(tmp_path / str(c), num_items=500, num_users=20, images=False, chunk=c).items)
        for c in (500, 77)
    ]
    assert tables[0].equals(tables[1])
    other = generate(tmp_path / "other", num_items=500, num_users=20, images=False, seed=9).items
    assert not tables[0].equals(pq.read_table(other))


def test_senseless_sizes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="20 items"):
        generate(tmp_path, num_items=3, num_users=5)
    with pytest.raises(ConfigError, match="cold"):
        generate(tmp_path, num_items=30, num_users=5, cold=1.5)
