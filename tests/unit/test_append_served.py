"""Generations in what serves: recommendations, bundle, model card."""

from __future__ import annotations

from pathlib import Path

import pytest

from qbrec.errors import DataError
from qbrec.registry.bundle import open_served, write_bundle
from qbrec.registry.card import model_card
from qbrec.registry.recommend import Recommender
from qbrec.storage.artifact import Artifact
from tests.support.grown_run import GENERATION_PARTS, OLD, evaluation, view_of
from tests.support.grown_shop import append, configuration, draw


def test_new_items_are_recommended_and_retired_ones_never(
    shop_root: Path, grown_run: dict[str, Artifact], tmp_path: Path
) -> None:
    config, view = configuration(shop_root), view_of(grown_run)
    recommender = Recommender.from_artifacts(grown_run, ranking=config.ranking)
    shop = {item.name for item in OLD if item.domain == "shop"}
    shop |= (
        {f"n{n}" for n in range(60)} | {f"m{n}" for n in range(30)} | {"twin10", "twin20", "bare1", "bare2"}
    )
    expected = shop - {"i1", "i9", "n5", "i100"}
    history = ["n7", "i5", "m3", "i1"]  # also what was retired may have been bought
    assert recommender.num_candidates == len(expected)
    (items,) = recommender.recommend([history], k=len(expected), keep_seen=True)
    assert {item["item_id"] for item in items} == expected
    (items,) = recommender.recommend([history], k=len(expected))
    assert {item["item_id"] for item in items} == expected - set(history)
    # Equal scores: nobody was trained on new items, so those of the catalogue come first.
    (old, new) = (next(i for i in items if i["item_id"] == name) for name in ("i10", "twin10"))
    assert (old["score"], old["semantic_id"]) == (new["score"], new["semantic_id"])
    assert items.index(old) < items.index(new)
    # An item that has no ID yet is known in a history, not ranked, and an unknown one still is an error.
    later = append(shop_root, view, draw(3, "late", seed=90))
    artifacts = {**grown_run, "generation-4": later.generations[-1].artifact}
    waiting = Recommender.from_artifacts(artifacts, ranking=config.ranking)
    (items,) = waiting.recommend([["late1", "i5"]], k=len(expected))
    assert {item["item_id"] for item in items} == expected - {"i5"}
    assert (recommender.num_waiting, waiting.num_waiting) == (0, 3)
    waiting.num_candidates = 0  # as if everything else were retired
    with pytest.raises(DataError, match="nothing to recommend: 3 items wait"):
        waiting.recommend([["i5"]])
    with pytest.raises(DataError, match="unknown item id 'late9'"):
        waiting.recommend([["late9"]])
    with pytest.raises(DataError, match="not trained on the domain 'garden'"):
        Recommender.from_artifacts(grown_run, ranking=config.ranking, domain="garden")


def test_a_bundle_knows_the_generations(
    shop_root: Path, grown_run: dict[str, Artifact], tmp_path: Path
) -> None:
    config = configuration(shop_root)
    artifacts = {**grown_run, "evaluation": evaluation(shop_root)}
    histories = [["n7", "i5"], ["m3"]]
    expected = Recommender.from_artifacts(grown_run, ranking=config.ranking).recommend(histories, k=50)
    for name, limit in (("inside", 1 << 30), ("outside", 0)):
        registry = config.registry.model_copy(update={"max_part_bytes": limit})
        shaped = config.model_copy(update={"registry": registry})
        bundle = write_bundle(tmp_path / name, config=shaped, artifacts=artifacts, card="")
        assert set(open_served(bundle)) == {"catalog", "quantizer", "finetune", *GENERATION_PARTS}
        assert Recommender.load(bundle).recommend(histories, k=50) == expected
    assert not list((tmp_path / "inside").rglob("*.tar"))
    assert not (tmp_path / "outside" / "ids-1").exists()


def test_the_card_says_what_was_appended(shop_root: Path, grown_run: dict[str, Artifact]) -> None:
    artifacts = {**grown_run, "evaluation": evaluation(shop_root)}
    card = model_card(configuration(shop_root), artifacts)
    assert "in 3 generations: 124 items, 124 of them with semantic IDs; 3 items retired" in card
    assert ", –\n" in card  # the last generation has no new items, so there is no drift
    assert f"- ids-2: `{grown_run['ids-2'].fingerprint}`" in card
    before = {name: artifact for name, artifact in artifacts.items() if "-" not in name}
    assert "appended since" not in model_card(configuration(shop_root), before)
