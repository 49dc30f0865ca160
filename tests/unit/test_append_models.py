"""What the frozen models make of generations: fused vectors, semantic IDs, drift."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qbrec.errors import ConfigError, DataError
from qbrec.fusion.embed import FusionEncoder
from qbrec.quantizer.append.drift import drift_figures
from qbrec.quantizer.append.grown_ids import GrownIds
from qbrec.quantizer.modality import ModalityQuantizer
from qbrec.quantizer.quantizer import Quantizer
from qbrec.registry.recommend import Recommender
from qbrec.storage.artifact import Artifact
from qbrec.storage.blocks import BlockSet
from qbrec.storage.generations import GenerationsView
from qbrec.storage.id_table import IdTable, current_ids, numbered
from qbrec.storage.ragged import Ragged
from tests.support import grown_shop
from tests.support.grown_run import OLD, digests, view_of
from tests.support.grown_shop import Item, append, configuration, draw, id_table, learn, train


def embedded(fusion: Artifact, items: list[Item]) -> np.ndarray[Any, Any]:
    tokens = [[item.vector] if item.vector is not None else [] for item in items]
    flat = np.array([t for part in tokens for t in part], np.float16).reshape(-1, grown_shop.DIM)
    features = {"text": Ragged.from_lengths(flat, np.array([len(part) for part in tokens]))}
    structure = np.array([[item.bucket, -1] for item in items], np.int32)
    fused, _ = FusionEncoder.load(fusion).embed(features, size=len(items), structure=structure)
    return fused


def encoded(artifacts: Mapping[str, Artifact], items: list[Item]) -> np.ndarray[Any, Any]:
    fused = torch.from_numpy(embedded(artifacts["fusion"], items)).float()
    return Quantizer.load(artifacts["quantizer"]).encode(fused).numpy()


def test_new_items_have_the_codes_of_the_frozen_models(grown_run: dict[str, Artifact]) -> None:
    view, table = view_of(grown_run), id_table(grown_run)
    assert table.num_items == view.num_items == 500 + 64 + 60
    for items, domain in (
        (draw(60, "n", seed=7), "shop"),
        (draw(30, "g", seed=8, domain="garden"), "garden"),
        (draw(30, "m", seed=9), "shop"),
    ):
        rows = view.lookup([item.name for item in items], domain)
        np.testing.assert_array_equal(table.codes[rows], encoded(grown_run, items))
        assert (rows >= 500).all()
    assert table.codes.dtype == np.uint8
    for number, ids in enumerate(numbered(grown_run, "ids"), 1):
        first = ids.meta["first_row"]
        mine = slice(first, first + ids.meta["num_added"])
        np.testing.assert_array_equal(ids.load_npy("semantic_ids.npy"), table.codes[mine])
        assert ids.load_npy("raw_codes.npy").shape == (ids.meta["num_added"], 3)
        assert ids.load_json("drift.json") == ids.meta["drift"]
        assert ids.inputs[f"generation-{number}"] == grown_run[f"generation-{number}"].fingerprint


def test_equal_content_takes_the_published_id(grown_run: dict[str, Artifact]) -> None:
    view, table = view_of(grown_run), id_table(grown_run)
    for n in (10, 20):
        old, new = view.lookup([OLD[n].name, f"twin{n}"], "shop")
        np.testing.assert_array_equal(table.codes[new], table.codes[old])
    assert grown_run["ids-1"].meta["shared"] == 2
    first, second = view.lookup(["bare1", "bare2"], "shop")
    np.testing.assert_array_equal(table.codes[first], table.codes[second])


def test_a_changed_item_is_fused_anew_and_keeps_its_id(
    shop_root: Path, trained_run: dict[str, Artifact], grown_run: dict[str, Artifact]
) -> None:
    view, table = view_of(grown_run), id_table(grown_run)
    (row,) = view.lookup(["i7"], "shop")
    fused = BlockSet.open(grown_run["fused-1"], "fused")
    rows = fused.column("row")
    assert rows.tolist() == [*range(500, 564), row]
    now = replace(draw(1, "x", seed=40)[0], name="i7")
    np.testing.assert_array_equal(fused.column("fused")[-1], embedded(trained_run["fusion"], [now])[0])
    np.testing.assert_array_equal(
        table.codes[row], trained_run["quantizer"].load_npy("semantic_ids.npy")[row]
    )
    # Who looks like what i7 was takes its ID; who looks like what it is now does not.
    was = next(item for item in OLD if item.name == "i7")
    further = append(shop_root, view, [replace(was, name="like-then"), replace(now, name="like-now")])
    learnt = learn(shop_root, further, grown_run, configuration(shop_root))
    then, here = further.lookup(["like-then", "like-now"], "shop")
    codes = id_table(learnt).codes
    np.testing.assert_array_equal(codes[then], codes[row])
    np.testing.assert_array_equal(codes[here], encoded(learnt, [now])[0])
    assert learnt["ids-4"].meta["shared"] == 1


def test_nothing_that_was_published_moves(shop_root: Path, trained_run: dict[str, Artifact]) -> None:
    config = configuration(shop_root)
    view = append(shop_root, GenerationsView(trained_run["catalog"]), draw(50, "p", seed=21))
    one = learn(shop_root, view, trained_run, config)
    before = {name: digests(artifact.path) for name, artifact in one.items()}
    codes = id_table(one).codes.copy()
    two = learn(shop_root, append(shop_root, view, draw(50, "q", seed=22), retire=["p1"]), one, config)
    assert {name: digests(artifact.path) for name, artifact in one.items()} == before
    after = id_table(two).codes
    assert after[: len(codes)].tobytes() == codes.tobytes()
    assert (
        codes[:500].tobytes() == np.asarray(trained_run["quantizer"].load_npy("semantic_ids.npy")).tobytes()
    )
    assert len(after) == len(codes) + 50


def test_ids_have_to_follow_one_another(
    grown_run: dict[str, Artifact], trained_run: dict[str, Artifact]
) -> None:
    one, two, three = numbered(grown_run, "ids")
    for wrong in ([two], [two, one], [one, three]):
        with pytest.raises(DataError, match="do not go on from those before them"):
            IdTable(trained_run["quantizer"], wrong)
    with pytest.raises(DataError, match="not the IDs of a generation"):
        IdTable(trained_run["quantizer"], [grown_run["fused-1"]])
    generations = numbered(grown_run, "generation")
    assert current_ids(trained_run["quantizer"], generations, [one, two, three]) == [one, two, three]
    assert current_ids(trained_run["quantizer"], generations, [one, None, three]) == [one]
    assert current_ids(trained_run["quantizer"], generations[1:], [one, two]) == []
    other = Artifact(one.path, trained_run["quantizer"].manifest | {"fingerprint": "0" * 64})
    assert current_ids(other, generations, [one, two, three]) == []


def test_drift_rises_with_the_distance(shop_root: Path, trained_run: dict[str, Artifact]) -> None:
    found = []
    for number, far in enumerate((0.0, 1.5, 4.0)):
        items = draw(200, f"d{number}-", seed=50 + number, far=far)
        view = append(shop_root, GenerationsView(trained_run["catalog"]), items)
        found.append(learn(shop_root, view, trained_run, configuration(shop_root))["ids-1"].meta["drift"])
    near, middle, distant = found
    assert 0.7 < near["drift"] < 1.4
    assert not near["refit"]
    assert near["share_beyond"] < 0.12
    assert near["drift"] < middle["drift"] < distant["drift"]
    assert distant["refit"]
    assert distant["share_beyond"] > 0.5
    assert distant["perplexity_items"] == 200
    lenient = configuration(shop_root, quality={"max_drift": 1000.0})
    view = append(shop_root, GenerationsView(trained_run["catalog"]), draw(20, "e", seed=60, far=4.0))
    assert not learn(shop_root, view, trained_run, lenient)["ids-1"].meta["drift"]["refit"]


def test_drift_figures_against_their_definition() -> None:
    new = (np.array([[0], [1], [1]], np.uint8), np.array([1, 2, 30], np.float32))
    old = (np.array([[5], [5], [6], [7]], np.uint8), np.array([1, 2, 3, 4], np.float32))
    figures = drift_figures(new, old, max_drift=5.0)
    assert figures["drift"] == pytest.approx(11 / 2.5)
    assert not figures["refit"]
    assert figures["share_beyond"] == pytest.approx(1 / 3)
    entropy = -(1 / 3 * np.log(1 / 3) + 2 / 3 * np.log(2 / 3))
    assert figures["perplexity_new"] == pytest.approx(np.exp(entropy))
    assert figures["perplexity_reference"] == pytest.approx(np.exp(entropy))  # of the first three
    assert "drift" not in drift_figures((new[0][:0], new[1][:0]), old, max_drift=1.0)


def test_a_digit_of_a_real_table(
    shop_root: Path, trained_run: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qbrec.quantizer.resolve.SPARE_DIGITS", 0)
    config = configuration(shop_root, collisions="digit")
    found = train(shop_root, trained_run["catalog"], config, name="digit")
    old = found["quantizer"].load_npy("semantic_ids.npy")
    most = found["quantizer"].meta["levels"][3]
    full = {tuple(codes) for codes in old[old[:, 3] == most - 1, :3].tolist()}
    drawn = draw(200, "digit", seed=71)
    raw = [tuple(codes) for codes in encoded(found, drawn).tolist()]
    crowded = [item for item, codes in zip(drawn, raw, strict=True) if codes in full]
    items = [item for item, codes in zip(drawn, raw, strict=True) if codes not in full][:12]
    view = append(shop_root, GenerationsView(found["catalog"]), items)
    learnt = learn(shop_root, view, found, config)
    table = id_table(learnt)
    rows = view.lookup([item.name for item in items], "shop")
    np.testing.assert_array_equal(table.codes[rows, :3], encoded(found, items))
    # No two contents have the same digit on one ID.
    live = ~np.asarray(view.retired)
    assert len(np.unique(table.codes[live], axis=0)) == live.sum()
    assert GrownIds(found["quantizer"], [learnt["ids-1"]]).show([int(rows[0])])[0].bucket == 1
    # One more on the fullest ID: its digits are all given.
    view = append(shop_root, GenerationsView(found["catalog"]), crowded[:1])
    with pytest.raises(ConfigError, match=f"other items have all {most}"):
        learn(shop_root, view, found, config)


def test_codes_of_single_modalities(shop_root: Path, trained_run: dict[str, Artifact]) -> None:
    config = configuration(shop_root, modalities=["joint", "text"], modality_levels=[4, 4])
    found = train(shop_root, trained_run["catalog"], config, name="modal")
    items = [*draw(45, "k", seed=70), Item("bare", None)]
    view = append(shop_root, GenerationsView(found["catalog"]), items)
    learnt = learn(shop_root, view, found, config)
    table = id_table(learnt)
    assert table.codes.shape == (546, 3)
    assert table.tokens.shape == (546, 5)
    np.testing.assert_array_equal(table.tokens[:, :3], table.codes)
    np.testing.assert_array_equal(table.tokens[:500, 3:], found["quantizer"].load_npy("modality_codes.npy"))
    one = ModalityQuantizer.load(found["quantizer"], "text")
    vectors = np.array([item.vector for item in items[:-1]])
    expected = one.encode(Ragged.from_lengths(vectors, np.ones(45, np.int64))).numpy()
    rows = view.lookup([item.name for item in items], "shop")
    np.testing.assert_array_equal(table.tokens[rows[:-1], 3:], expected)
    assert table.tokens[rows[-1], 3:].tolist() == [4, 4]
    recommender = Recommender.from_artifacts(learnt, ranking=config.ranking)
    assert recommender.num_candidates == 400 - 1 + 46


def test_showing_and_finding_ids(grown_run: dict[str, Artifact]) -> None:
    table = id_table(grown_run)
    shown = GrownIds(grown_run["quantizer"], numbered(grown_run, "ids"))
    counts = grown_run["catalog"].load_npy("train_counts.npy")
    popularity = np.concatenate([counts, np.zeros(124, np.int64)])
    order = np.lexsort((np.arange(624), -popularity, *table.codes.T[::-1]))
    for prefix in [(c,) for c in range(8)] + [
        tuple(int(c) for c in table.codes[r]) for r in (0, 5, 510, 600)
    ]:
        expected = [r for r in order if tuple(table.codes[r, : len(prefix)]) == prefix]
        assert shown.find(prefix).tolist() == expected
        assert shown.find(".".join(map(str, prefix))).tolist() == expected
    for one in shown.show([0, 7, 499, 500, 623]):
        assert one.codes == tuple(table.codes[one.row].tolist())
        assert one.bucket == int((table.codes == table.codes[one.row]).all(1).sum())
        assert one.text == "".join(f"<{'abc'[level]}_{code}>" for level, code in enumerate(one.codes))
        assert one.label
    with pytest.raises(DataError, match="no semantic ID of item row 624"):
        shown.show([624])
    with pytest.raises(ConfigError, match="level 0 has codes 0 to 7"):
        shown.find("8")
