"""What the frozen models make of generations: fused vectors, semantic IDs, drift, recommendations."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qbrec.append_run import append_generation, bring_to_models
from qbrec.catalog.append.run import Request
from qbrec.config import RootConfig
from qbrec.errors import ConfigError, DataError
from qbrec.fusion.embed import FusionEncoder
from qbrec.neighbours import stage as neighbours_stage
from qbrec.neighbours.content import content_of_catalog, content_with_new, views_of_catalog
from qbrec.quantizer.append.beside import Taken, place_beside
from qbrec.quantizer.append.drift import drift_figures
from qbrec.quantizer.append.grown_ids import GrownIds
from qbrec.quantizer.modality import ModalityQuantizer
from qbrec.quantizer.quantizer import Quantizer
from qbrec.quantizer.rvq import Codebooks
from qbrec.ranking.bonus import Bonus, BonusScorer
from qbrec.ranking.graphs import GRAPHS, ItemGraphs, _appended_rows, graphs_of, without_prefix
from qbrec.ranking.scorer import FactorisedScorer
from qbrec.registry.bundle import PARTS, open_served, parts_of, write_bundle
from qbrec.registry.card import model_card
from qbrec.registry.recommend import Recommender
from qbrec.run_generations import with_generations
from qbrec.run_record import RunRecord, run_directory
from qbrec.sequence.bonus import load_scorer
from qbrec.stages import STAGES
from qbrec.storage.artifact import Artifact, ArtifactStore
from qbrec.storage.blocks import BlockSet, RaggedField
from qbrec.storage.generations import GenerationsView
from qbrec.storage.id_table import IdTable, current_alike, current_ids, numbered
from qbrec.storage.ragged import Ragged
from tests.support import grown_shop
from tests.support.grown_shop import (
    Item,
    append,
    configuration,
    draw,
    id_table,
    learn,
    train,
    with_bonus,
    write_catalog,
)

OLD = draw(400, "i", seed=0) + draw(100, "b", seed=1, domain="books")

GENERATION_PARTS = {f"{kind}-{n}" for kind in ("generation", "ids") for n in (1, 2, 3)}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("grown")


@pytest.fixture(scope="module")
def trained(root: Path) -> dict[str, Artifact]:
    torch.set_num_threads(1)
    return train(root, write_catalog(root, OLD, collapsed=["i100"]), configuration(root))


@pytest.fixture(scope="module")
def grown(root: Path, trained: dict[str, Artifact]) -> dict[str, Artifact]:
    """Three generations: all kinds of changes; a new domain; one that only retires."""
    view = GenerationsView(trained["catalog"])
    twins = [replace(OLD[n], name=f"twin{n}") for n in (10, 20)]
    bare = [Item("bare1", None, bucket=9), Item("bare2", None, bucket=9)]
    moved = [replace(draw(1, "x", seed=40)[0], name="i7")]
    view = append(root, view, draw(60, "n", seed=7) + twins + bare + moved, retire=["i1", "i2"])
    again = [replace(draw(1, "x", seed=41)[0], name="n3")]
    later = draw(30, "g", seed=8, domain="garden") + draw(30, "m", seed=9) + again
    view = append(root, view, later, retire=["n5"], restore=["i2"])
    view = append(root, view, retire=["i9"])
    return learn(root, view, trained, configuration(root))


def view_of(artifacts: Mapping[str, Artifact]) -> GenerationsView:
    return GenerationsView(artifacts["catalog"], numbered(artifacts, "generation"))


def digests(path: Path) -> dict[str, str]:
    files = [p for p in path.rglob("*") if p.is_file()]
    return {str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


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


def evaluation(root: Path) -> Artifact:
    store, key = ArtifactStore(root), "e" * 64
    found = store.find("evaluation", key)
    if found is not None:
        return found
    writer = store.writer("evaluation", key)
    writer.prepare()
    cells = {"ndcg@10": {"mean": 0.1, "low": 0.0, "high": 0.2}}
    writer.save_json("metrics.json", {"models": {"qbrec": {"removed": cells}}})
    return writer.commit(meta={}, inputs={}, config={}, seed=0)


def test_new_items_have_the_codes_of_the_frozen_models(grown: dict[str, Artifact]) -> None:
    view, table = view_of(grown), id_table(grown)
    assert table.num_items == view.num_items == 500 + 64 + 60
    for items, domain in (
        (draw(60, "n", seed=7), "shop"),
        (draw(30, "g", seed=8, domain="garden"), "garden"),
        (draw(30, "m", seed=9), "shop"),
    ):
        rows = view.lookup([item.name for item in items], domain)
        np.testing.assert_array_equal(table.codes[rows], encoded(grown, items))
        assert (rows >= 500).all()
    assert table.codes.dtype == np.uint8
    for number, ids in enumerate(numbered(grown, "ids"), 1):
        first = ids.meta["first_row"]
        mine = slice(first, first + ids.meta["num_added"])
        np.testing.assert_array_equal(ids.load_npy("semantic_ids.npy"), table.codes[mine])
        assert ids.load_npy("raw_codes.npy").shape == (ids.meta["num_added"], 3)
        assert ids.load_json("drift.json") == ids.meta["drift"]
        assert ids.inputs[f"generation-{number}"] == grown[f"generation-{number}"].fingerprint


def test_equal_content_takes_the_published_id(grown: dict[str, Artifact]) -> None:
    view, table = view_of(grown), id_table(grown)
    for n in (10, 20):
        old, new = view.lookup([OLD[n].name, f"twin{n}"], "shop")
        np.testing.assert_array_equal(table.codes[new], table.codes[old])
    assert grown["ids-1"].meta["shared"] == 2
    first, second = view.lookup(["bare1", "bare2"], "shop")
    np.testing.assert_array_equal(table.codes[first], table.codes[second])


def test_a_changed_item_is_fused_anew_and_keeps_its_id(
    root: Path, trained: dict[str, Artifact], grown: dict[str, Artifact]
) -> None:
    view, table = view_of(grown), id_table(grown)
    (row,) = view.lookup(["i7"], "shop")
    fused = BlockSet.open(grown["fused-1"], "fused")
    rows = fused.column("row")
    assert rows.tolist() == [*range(500, 564), row]
    now = replace(draw(1, "x", seed=40)[0], name="i7")
    np.testing.assert_array_equal(fused.column("fused")[-1], embedded(trained["fusion"], [now])[0])
    np.testing.assert_array_equal(table.codes[row], trained["quantizer"].load_npy("semantic_ids.npy")[row])
    # Who looks like what i7 was takes its ID; who looks like what it is now does not.
    was = next(item for item in OLD if item.name == "i7")
    further = append(root, view, [replace(was, name="like-then"), replace(now, name="like-now")])
    learnt = learn(root, further, grown, configuration(root))
    then, here = further.lookup(["like-then", "like-now"], "shop")
    codes = id_table(learnt).codes
    np.testing.assert_array_equal(codes[then], codes[row])
    np.testing.assert_array_equal(codes[here], encoded(learnt, [now])[0])
    assert learnt["ids-4"].meta["shared"] == 1


def test_nothing_that_was_published_moves(root: Path, trained: dict[str, Artifact]) -> None:
    config = configuration(root)
    view = append(root, GenerationsView(trained["catalog"]), draw(50, "p", seed=21))
    one = learn(root, view, trained, config)
    before = {name: digests(artifact.path) for name, artifact in one.items()}
    codes = id_table(one).codes.copy()
    two = learn(root, append(root, view, draw(50, "q", seed=22), retire=["p1"]), one, config)
    assert {name: digests(artifact.path) for name, artifact in one.items()} == before
    after = id_table(two).codes
    assert after[: len(codes)].tobytes() == codes.tobytes()
    assert codes[:500].tobytes() == np.asarray(trained["quantizer"].load_npy("semantic_ids.npy")).tobytes()
    assert len(after) == len(codes) + 50


def test_ids_have_to_follow_one_another(grown: dict[str, Artifact], trained: dict[str, Artifact]) -> None:
    one, two, three = numbered(grown, "ids")
    for wrong in ([two], [two, one], [one, three]):
        with pytest.raises(DataError, match="do not go on from those before them"):
            IdTable(trained["quantizer"], wrong)
    with pytest.raises(DataError, match="not the IDs of a generation"):
        IdTable(trained["quantizer"], [grown["fused-1"]])
    generations = numbered(grown, "generation")
    assert current_ids(trained["quantizer"], generations, [one, two, three]) == [one, two, three]
    assert current_ids(trained["quantizer"], generations, [one, None, three]) == [one]
    assert current_ids(trained["quantizer"], generations[1:], [one, two]) == []
    other = Artifact(one.path, trained["quantizer"].manifest | {"fingerprint": "0" * 64})
    assert current_ids(other, generations, [one, two, three]) == []


def test_drift_rises_with_the_distance(root: Path, trained: dict[str, Artifact]) -> None:
    found = []
    for number, far in enumerate((0.0, 1.5, 4.0)):
        items = draw(200, f"d{number}-", seed=50 + number, far=far)
        view = append(root, GenerationsView(trained["catalog"]), items)
        found.append(learn(root, view, trained, configuration(root))["ids-1"].meta["drift"])
    near, middle, distant = found
    assert 0.7 < near["drift"] < 1.4
    assert not near["refit"]
    assert near["share_beyond"] < 0.12
    assert near["drift"] < middle["drift"] < distant["drift"]
    assert distant["refit"]
    assert distant["share_beyond"] > 0.5
    assert distant["perplexity_items"] == 200
    lenient = configuration(root, quality={"max_drift": 1000.0})
    view = append(root, GenerationsView(trained["catalog"]), draw(20, "e", seed=60, far=4.0))
    assert not learn(root, view, trained, lenient)["ids-1"].meta["drift"]["refit"]


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


SIZES = (3, 2)
CODES = st.tuples(st.integers(0, 2), st.integers(0, 1))


def place(
    new: list[tuple[tuple[int, int], int]],
    taken: list[tuple[tuple[int, ...], int]],
    config: RootConfig,
    sizes: tuple[int, ...],
) -> Any:
    books = Codebooks((torch.zeros(3, 2), torch.tensor([[0.0, 0.0], [1.0, 0.0]])))
    quantizer = Quantizer(torch.zeros(2), torch.ones(2), books)
    raw = np.array([codes for codes, _ in new], np.uint8).reshape(-1, 2)
    return place_beside(
        raw,
        np.array([content for _, content in new], np.int64),
        taken=Taken(
            np.array([codes for codes, _ in taken], np.uint8).reshape(-1, len(sizes)),
            np.array([content for _, content in taken], np.int64),
        ),
        sizes=sizes,
        quantizer=quantizer,
        config=config.quantizer,
        residuals=lambda rows, codes: torch.zeros(len(rows), 2),
    )


@given(
    st.lists(st.tuples(CODES, st.integers(0, 5)), max_size=10), st.lists(st.tuples(CODES, st.integers(0, 7)))
)
@settings(max_examples=60)
def test_digits_count_on(
    new: list[tuple[tuple[int, int], int]], old: list[tuple[tuple[int, int], int]]
) -> None:
    """Against a dictionary: the catalogue's digits first, then those of new contents as they come."""
    digits: dict[tuple[int, int], dict[int, int]] = {}
    first: dict[int, tuple[int, ...]] = {}
    taken = []
    for codes, content in old:
        bucket = digits.setdefault(codes, {})
        final = (*codes, bucket.setdefault(content, len(bucket)))
        taken.append((final, content))
        first.setdefault(content, final)
    expected, own = [], {}
    for codes, content in new:
        codes = own.setdefault(content, codes)
        if content in first:
            expected.append(first[content])
            continue
        bucket = digits.setdefault(codes, {})
        expected.append((*codes, bucket.setdefault(content, len(bucket))))
    needed = max([1, *(final[2] + 1 for final in expected), *(final[2] + 1 for final, _ in taken)])
    config = configuration(Path("-"))
    placed = place(new, taken, config, (*SIZES, needed))
    assert [tuple(codes) for codes in placed.codes.tolist()] == expected
    assert placed.shared == sum(content in first for _, content in new)
    had = max([1, *(final[2] + 1 for final, _ in taken)])
    if needed > had:
        with pytest.raises(ConfigError, match="has no digit left"):
            place(new, taken, config, (*SIZES, had))


@given(
    st.lists(st.tuples(CODES, st.integers(0, 5)), max_size=10), st.lists(st.tuples(CODES, st.integers(0, 7)))
)
@settings(max_examples=40)
def test_ids_are_shared_where_nothing_is_resolved(
    new: list[tuple[tuple[int, int], int]], taken: list[tuple[tuple[int, ...], int]]
) -> None:
    placed = place(new, taken, configuration(Path("-")), SIZES)
    first: dict[int, tuple[int, ...]] = {}
    for codes, content in [*taken, *new]:
        first.setdefault(content, codes)
    assert [tuple(codes) for codes in placed.codes.tolist()] == [first[content] for _, content in new]
    assert (placed.moved, placed.unresolved) == (0, 0)


@pytest.mark.parametrize(("policy", "capacity"), [("next_nearest", 1), ("next_nearest", 2), ("sinkhorn", 1)])
@given(
    st.lists(st.tuples(CODES, st.integers(0, 5)), max_size=10), st.lists(st.tuples(CODES, st.integers(0, 7)))
)
@settings(max_examples=40)
def test_only_new_items_move(
    policy: str,
    capacity: int,
    new: list[tuple[tuple[int, int], int]],
    taken: list[tuple[tuple[int, ...], int]],
) -> None:
    """Room is what published contents leave; sinkhorn places appended items as next_nearest does."""
    placed = place(new, taken, configuration(Path("-"), collisions=policy, capacity=capacity), SIZES)
    contents: dict[tuple[int, ...], set[int]] = {}
    first: dict[int, tuple[int, ...]] = {}
    for codes, content in taken:
        contents.setdefault(codes, set()).add(content)
        first.setdefault(content, codes)
    before = {codes: len(found) for codes, found in contents.items()}
    own: dict[int, tuple[int, ...]] = {}
    final = [tuple(codes) for codes in placed.codes.tolist()]
    for (codes, content), found in zip(new, final, strict=True):
        raw = own.setdefault(content, codes)
        assert found == first.get(content, found)
        assert content in first or found[0] == raw[0]
        contents.setdefault(found, set()).add(content)
    for codes, found in contents.items():
        if len(found) > max(capacity, before.get(codes, 0)):
            # Above the capacity only where the whole prefix is full.
            assert all(len(contents.get((codes[0], last), ())) >= capacity for last in range(SIZES[1]))
            assert placed.unresolved > 0
    assert placed.shared == sum(content in first for _, content in new)


def test_a_digit_of_a_real_table(
    root: Path, trained: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qbrec.quantizer.resolve.SPARE_DIGITS", 0)
    config = configuration(root, collisions="digit")
    found = train(root, trained["catalog"], config, name="digit")
    old = found["quantizer"].load_npy("semantic_ids.npy")
    most = found["quantizer"].meta["levels"][3]
    full = {tuple(codes) for codes in old[old[:, 3] == most - 1, :3].tolist()}
    drawn = draw(200, "digit", seed=71)
    raw = [tuple(codes) for codes in encoded(found, drawn).tolist()]
    crowded = [item for item, codes in zip(drawn, raw, strict=True) if codes in full]
    items = [item for item, codes in zip(drawn, raw, strict=True) if codes not in full][:12]
    view = append(root, GenerationsView(found["catalog"]), items)
    learnt = learn(root, view, found, config)
    table = id_table(learnt)
    rows = view.lookup([item.name for item in items], "shop")
    np.testing.assert_array_equal(table.codes[rows, :3], encoded(found, items))
    # No two contents have the same digit on one ID.
    live = ~np.asarray(view.retired)
    assert len(np.unique(table.codes[live], axis=0)) == live.sum()
    assert GrownIds(found["quantizer"], [learnt["ids-1"]]).show([int(rows[0])])[0].bucket == 1
    # One more on the fullest ID: its digits are all given.
    view = append(root, GenerationsView(found["catalog"]), crowded[:1])
    with pytest.raises(ConfigError, match=f"other items have all {most}"):
        learn(root, view, found, config)


def test_codes_of_single_modalities(root: Path, trained: dict[str, Artifact]) -> None:
    config = configuration(root, modalities=["joint", "text"], modality_levels=[4, 4])
    found = train(root, trained["catalog"], config, name="modal")
    items = [*draw(45, "k", seed=70), Item("bare", None)]
    view = append(root, GenerationsView(found["catalog"]), items)
    learnt = learn(root, view, found, config)
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


def test_new_items_are_recommended_and_retired_ones_never(
    root: Path, grown: dict[str, Artifact], tmp_path: Path
) -> None:
    config, view = configuration(root), view_of(grown)
    recommender = Recommender.from_artifacts(grown, ranking=config.ranking)
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
    later = append(root, view, draw(3, "late", seed=90))
    artifacts = {**grown, "generation-4": later.generations[-1].artifact}
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
        Recommender.from_artifacts(grown, ranking=config.ranking, domain="garden")


def test_a_bundle_knows_the_generations(root: Path, grown: dict[str, Artifact], tmp_path: Path) -> None:
    config = configuration(root)
    artifacts = {**grown, "evaluation": evaluation(root)}
    histories = [["n7", "i5"], ["m3"]]
    expected = Recommender.from_artifacts(grown, ranking=config.ranking).recommend(histories, k=50)
    for name, limit in (("inside", 1 << 30), ("outside", 0)):
        registry = config.registry.model_copy(update={"max_part_bytes": limit})
        shaped = config.model_copy(update={"registry": registry})
        bundle = write_bundle(tmp_path / name, config=shaped, artifacts=artifacts, card="")
        assert set(open_served(bundle)) == {"catalog", "quantizer", "finetune", *GENERATION_PARTS}
        assert Recommender.load(bundle).recommend(histories, k=50) == expected
    assert not list((tmp_path / "inside").rglob("*.tar"))
    assert not (tmp_path / "outside" / "ids-1").exists()


def test_the_card_says_what_was_appended(root: Path, grown: dict[str, Artifact]) -> None:
    artifacts = {**grown, "evaluation": evaluation(root)}
    card = model_card(configuration(root), artifacts)
    assert "in 3 generations: 124 items, 124 of them with semantic IDs; 3 items retired" in card
    assert ", –\n" in card  # the last generation has no new items, so there is no drift
    assert f"- ids-2: `{grown['ids-2'].fingerprint}`" in card
    before = {name: artifact for name, artifact in artifacts.items() if "-" not in name}
    assert "appended since" not in model_card(configuration(root), before)


def test_showing_and_finding_ids(grown: dict[str, Artifact]) -> None:
    table = id_table(grown)
    shown = GrownIds(grown["quantizer"], numbered(grown, "ids"))
    counts = grown["catalog"].load_npy("train_counts.npy")
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


def test_the_bonus_knows_only_what_was_trained_on() -> None:
    rng = np.random.default_rng(0)
    graphs = ItemGraphs.fit(Ragged.from_lists([[1, 2, 3], [2, 4], [3, 5]]), num_items=6, keep=5)
    bonus = Bonus(graphs, (2.0,) * len(graphs.names))
    histories = Ragged.from_lists([[1, 7, 2, 8], [9], [3, 4]])

    class Codes:
        name = "codes"

        def code_log_probs(self, histories: Ragged, domain: Any) -> torch.Tensor:
            return torch.from_numpy(np.log(rng.random((len(histories), 2, 4)))).float()

    base = FactorisedScorer(Codes(), semantic_ids=rng.integers(0, 4, (10, 2)))
    state = rng.bit_generator.state
    alone = base.scores(histories, 0)
    rng.bit_generator.state = state
    scores = BonusScorer(base, bonus).scores(histories, 0)
    assert scores.shape == (3, 10)
    assert torch.equal(scores[:, 6:], alone[:, 6:])
    assert torch.equal(scores[1], alone[1])
    assert (scores[0, :6] > alone[0, :6]).any()


@pytest.fixture(scope="module")
def joined(root: Path, trained: dict[str, Artifact], grown: dict[str, Artifact]) -> dict[str, Artifact]:
    """The same generations of a run with item graphs."""
    config = configuration(root)
    return learn(root, view_of(grown), with_bonus(root, trained, config), config)


def content(artifacts: Mapping[str, Artifact], name: str, generation: int) -> np.ndarray[Any, Any]:
    """A content view of the catalogue (0) or of a generation's new items, float32."""
    source = artifacts["fusion" if not generation else f"fused-{generation}"]
    if name == "fused":
        mean = BlockSet.open(artifacts["fusion"], "fused").column("fused").astype(np.float32).mean(0)
        fused = BlockSet.open(source, "fused")
        rows = fused.column("row")
        new = rows >= artifacts[f"generation-{generation}"].meta["first_row"] if generation else rows >= 0
        return fused.column("fused")[new].astype(np.float32) - mean
    view = GenerationsView(artifacts["catalog"], numbered(artifacts, "generation")[:generation])
    first, end = view.first_rows[generation : generation + 2]
    found = view.take(np.arange(first, end), [RaggedField("feature.text", counts="tokens.text")])
    tokens = found["feature.text"]
    assert isinstance(tokens, Ragged)
    out = np.zeros((end - first, grown_shop.DIM), np.float32)
    for row in range(len(out)):
        if tokens.lengths[row]:
            out[row] = tokens.row(row)[0]
    return out


def test_new_items_are_joined_to_those_they_are_like(
    joined: dict[str, Artifact], grown: dict[str, Artifact]
) -> None:
    view = view_of(joined)
    keep, shop = 30, view.base.candidates("shop")
    assert joined["neighbours"].manifest["config"]["kept"][1] == keep
    for number in (1, 2, 3):
        rows, added = joined[f"alike-{number}"], joined[f"generation-{number}"].meta["num_added"]
        assert rows.meta["first_row"] == view.first_rows[number]
        ours = without_prefix(
            graphs_of({k: t.numpy() for k, t in rows.load_safetensors(GRAPHS).items()}, num_columns=500)
        )
        assert {name: graph.shape for name, graph in ours.items()} == {
            "text": (added, 500), "fused": (added, 500),
        }  # fmt: skip
        if not added:
            continue
        ours_too = view.item_domain[view.first_rows[number] : view.first_rows[number + 1]] == 0
        for name, graph in ours.items():
            # As when they were added: what a later generation changes keeps its rows.
            new, old = content(joined, name, number), content(joined, name, 0)
            unit_new, unit_old = (
                x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9) for x in (new, old)
            )
            cosine = np.maximum(unit_new @ unit_old.T, 0) * shop * ours_too[:, None]
            least = np.sort(cosine, axis=1)[:, -keep, None]
            found = graph.toarray()
            sure = np.abs(cosine - least) > 1e-3  # half precision may swap those at the end of the list
            np.testing.assert_allclose(found[sure], np.where(cosine > least, cosine, 0)[sure] ** 2, atol=2e-3)
            assert np.diff(graph.indptr).max() == keep
            assert not found[~ours_too].any()


def test_the_content_of_old_and_new_items_is_read_once(
    joined: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    read, column = [], BlockSet.column

    def counted(self: BlockSet, *args: Any) -> Any:
        read.append(args[0])
        return column(self, *args)

    monkeypatch.setattr(BlockSet, "column", counted)
    generations = numbered(joined, "generation")
    for number in (1, 2, 3):
        view = GenerationsView(joined["catalog"], generations[:number])
        inputs = {"fusion": joined["fusion"], "fused": joined[f"fused-{number}"]}
        for name in views_of_catalog(view.base):
            read.clear()
            old, new = content_with_new(name, view, inputs)
            added = view.generations[-1].num_added
            assert read == ["fused"] * (name == "fused") * (1 + (added > 0))
            np.testing.assert_array_equal(old, content_of_catalog(name, view.base, joined["fusion"]))
            assert new.shape == (added, old.shape[1])
            if added:
                np.testing.assert_allclose(new, content(joined, name, number), atol=4e-3)


def test_appended_items_get_a_bonus(root: Path, joined: dict[str, Artifact]) -> None:
    config, view = configuration(root), view_of(joined)
    alone = {name: artifact for name, artifact in joined.items() if not name.startswith("alike-")}
    partly = {name: artifact for name, artifact in joined.items() if name not in ("alike-2", "alike-3")}
    history = ["i5", "i8", "n7", "i30", "i41", "i52", "i63"]
    scores = {}
    for name, artifacts in (("all", joined), ("partly", partly), ("none", alone)):
        found = Recommender.from_artifacts(artifacts, ranking=config.ranking)
        (items,) = found.recommend([history], k=found.num_candidates - len(history))
        scores[name] = {item["item_id"]: item["score"] for item in items}
        # With one bonus for the best, the ranker's list and the scorer's dense scores are one.
        codes = IdTable(artifacts["quantizer"], numbered(artifacts, "ids")).tokens
        scorer = load_scorer(
            artifacts["finetune"],
            artifacts["neighbours"],
            appended=numbered(artifacts, "alike"),
            semantic_ids=codes,
            chunk_items=1000,
        )
        rows = view.lookup([*scores[name]], "shop")
        dense = scorer.scores(Ragged.from_lists([view.lookup(history, "shop").tolist()]), 0)[0, rows]
        np.testing.assert_allclose(dense.numpy(), [*scores[name].values()], atol=1e-4)
    first = {name for name in scores["all"] if name[0] == "n"}
    later = {name for name in scores["all"] if name[0] == "m"}
    gained = {name for name, score in scores["all"].items() if score > scores["none"][name] + 1e-3}
    assert len(first & gained) > 10
    assert len(later & gained) > 3
    # One generation has its rows, the next one waits for them.
    for name in first:
        assert scores["partly"][name] == pytest.approx(scores["all"][name], abs=1e-4)
    for name in later:
        assert scores["partly"][name] == pytest.approx(scores["none"][name], abs=1e-4)


def test_graph_rows_have_to_go_on_from_the_graphs(root: Path, joined: dict[str, Artifact]) -> None:
    one, two, three = numbered(joined, "alike")
    assert ItemGraphs.load(joined["neighbours"], [one, two, three]).num_items == 624
    for wrong in ([two], [one, three, two], [joined["ids-1"]]):
        with pytest.raises(DataError, match="do not go on from the item graphs"):
            ItemGraphs.load(joined["neighbours"], wrong)
    ids = numbered(joined, "ids")
    assert current_alike(joined["neighbours"], ids, [one, two, three]) == [one, two, three]
    assert current_alike(joined["neighbours"], ids[:2], [one, two, three]) == [one, two]
    assert current_alike(joined["neighbours"], ids, [one, None, three]) == [one]
    other = Artifact(one.path, joined["neighbours"].manifest | {"fingerprint": "0" * 64})
    assert current_alike(other, ids, [one, two, three]) == []
    with pytest.raises(DataError, match="do not go on from the item graphs"):
        _appended_rows(other, [one], num_items=500)


@pytest.mark.parametrize("rows", [True, False])
def test_a_bundle_knows_the_graph_rows(
    root: Path, joined: dict[str, Artifact], tmp_path: Path, rows: bool
) -> None:
    """Those of runs that have none, too."""
    config = configuration(root)
    artifacts = {n: a for n, a in joined.items() if rows or not n.startswith("alike-")}
    bundle = write_bundle(
        tmp_path / "b", config=config, artifacts={**artifacts, "evaluation": evaluation(root)}, card=""
    )
    parts = GENERATION_PARTS | ({"alike-1", "alike-2", "alike-3"} if rows else set())
    assert set(open_served(bundle)) == {"catalog", "quantizer", "neighbours", "finetune", *parts}
    histories = [["n7", "i5"], ["m3"]]
    expected = Recommender.from_artifacts(artifacts, ranking=config.ranking).recommend(histories, k=50)
    assert Recommender.load(bundle).recommend(histories, k=50) == expected


def test_item_graphs_are_a_part_where_the_model_has_a_bonus(
    trained: dict[str, Artifact], joined: dict[str, Artifact]
) -> None:
    assert parts_of(joined) == PARTS
    # The graphs are there, but the model was trained without them.
    assert parts_of({**joined, "finetune": trained["finetune"]}).keys() == PARTS.keys() - {"neighbours"}
    with pytest.raises(DataError, match="no finetune artifact"):
        parts_of({name: artifact for name, artifact in joined.items() if name != "finetune"})


class Noted:
    """A run whose run.json names a catalogue, models and generations."""

    def __init__(self, folder: Path, artifacts: Mapping[str, Artifact]) -> None:
        self.config = configuration(folder)
        self.store = ArtifactStore(folder)
        self.said: list[str] = []
        self.warned: list[str] = []
        record = RunRecord.own(self.config, resume="auto")
        stages = {name: a for name, a in artifacts.items() if "-" not in name}
        record.stages = {name: {"key": a.key, "path": str(a.path)} for name, a in stages.items()}
        generations = numbered(artifacts, "generation")
        record.extra["generations"] = [{"key": a.key, "path": str(a.path)} for a in generations]
        record.save()
        record.close()

    def bring(self, max_drift: float = 1.5) -> tuple[list[Artifact], str]:
        record = RunRecord.own(self.config, resume="must")
        try:
            return bring_to_models(
                self.config, record, self.store,
                max_drift=max_drift, say=self.said.append, warn=self.warned.append,
            )  # fmt: skip
        finally:
            record.close()

    def edit(self, change: Any) -> None:
        path = run_directory(self.config) / "run.json"
        document = json.loads(path.read_text())
        change(document)
        path.write_text(json.dumps(document))

    def noted(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = RunRecord.load(run_directory(self.config)).extra["generations"]
        return found


def test_a_run_catches_up_and_does_nothing_twice(root: Path, grown: dict[str, Artifact], capsys: Any) -> None:
    run = Noted(root, grown)
    stages = RunRecord.load(run_directory(run.config)).stages
    run.edit(lambda d: d["stages"].pop("quantizer"))
    assert run.bring() == ([], "the run has no finished quantizer yet")
    assert "ids" not in run.noted()[0]
    assert [*with_generations(run.config, {"catalog": grown["catalog"]})] == [
        *("catalog", "generation-1", "generation-2", "generation-3")
    ]
    run.edit(lambda d: d["stages"].update(stages))
    ids, missing = run.bring()
    assert missing == ""
    assert [made.meta["first_row"] for made in ids] == [500, 564, 624]
    assert run.said == [
        "✓ generation 1: 64 new items have semantic IDs",
        "✓ generation 2: 60 new items have semantic IDs",
    ]
    assert run.warned == []
    np.testing.assert_array_equal(IdTable(grown["quantizer"], ids).codes, id_table(grown).codes)
    state, noted = digests(root / "artifacts"), run.noted()
    assert [place["ids"]["path"] for place in noted] == [str(made.path) for made in ids]
    # Again, and with another threshold: published IDs are not made anew.
    for threshold in (1.5, 0.001):
        again, _ = run.bring(threshold)
        assert [made.path for made in again] == [made.path for made in ids]
    assert (digests(root / "artifacts"), run.noted(), len(run.said)) == (state, noted, 2)
    # Forgotten by run.json (killed before it was written), they are found, not made.
    run.edit(lambda d: [place.pop("ids") for place in d["extra"]["generations"]])
    run.bring()
    assert (digests(root / "artifacts"), run.noted()) == (state, noted)
    found = with_generations(run.config, {name: grown[name] for name in ("catalog", "quantizer")})
    assert {name for name in found if "-" in name} == GENERATION_PARTS


def test_a_run_catches_up_with_its_item_graphs(
    root: Path, joined: dict[str, Artifact], tmp_path: Path
) -> None:
    run = Noted(root, {name: a for name, a in joined.items() if name != "neighbours"})
    models = {name: joined[name] for name in ("catalog", "quantizer", "neighbours")}
    run.bring()  # as before there were such rows
    assert not any("alike" in place for place in run.noted())
    assert not any(name.startswith("alike") for name in with_generations(run.config, models))
    place = {"key": joined["neighbours"].key, "path": str(joined["neighbours"].path)}
    run.edit(lambda d: d["stages"].update(neighbours=place))
    ids, _ = run.bring()
    found = with_generations(run.config, models)
    made = numbered(found, "alike")
    assert len(made) == 3
    for number, rows in enumerate(made, 1):
        assert rows.inputs["ids"] == ids[number - 1].fingerprint
        wanted = (joined[f"alike-{number}"].path / GRAPHS).read_bytes()
        assert (rows.path / GRAPHS).read_bytes() == wanted
    state, noted = digests(root / "artifacts"), run.noted()
    run.bring()
    assert (digests(root / "artifacts"), run.noted()) == (state, noted)
    # Without its row a generation waits, and those after it; then it is made again.
    shutil.rmtree(made[1].path)
    (left,) = numbered(with_generations(run.config, models), "alike")
    assert left.path == made[0].path
    run.bring()
    assert (made[1].path / GRAPHS).is_file()
    # Other graphs of the same models: rows of their own. Graphs of other models: none.
    short = run.config.model_copy(update={"ranking": run.config.ranking.model_copy(update={"alike": 3})})
    ctx = grown_shop.context(root, "neighbours", "short")
    ctx.recipe = STAGES["neighbours"].recipe(short)
    inputs = {name: joined[name] for name in ("catalog", "fusion", "quantizer")}
    other = neighbours_stage.run(ctx, short, inputs)
    assert not numbered(with_generations(run.config, {**models, "neighbours": other}), "alike")
    run.edit(lambda d: d["stages"]["neighbours"].update(path=str(other.path)))
    run.bring()
    again = numbered(with_generations(run.config, {**models, "neighbours": other}), "alike")
    assert [rows.meta["arrows"]["text"] for rows in again] == [3 * 62, 3 * 30, 0]
    manifest = json.loads((other.path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"inputs": {}}))
    run.edit(lambda d: [place.pop("alike") for place in d["extra"]["generations"]])
    run.edit(lambda d: d["stages"]["neighbours"].update(path=str(tmp_path)))
    run.bring()
    assert not any("alike" in place for place in run.noted())


@pytest.mark.parametrize("lost", ["fused", "ids"])
def test_what_the_models_made_is_made_again_where_it_is_gone(
    root: Path, grown: dict[str, Artifact], lost: str
) -> None:
    run = Noted(root, grown)
    before, _ = run.bring()
    codes = IdTable(grown["quantizer"], before).codes
    shutil.rmtree(run.noted()[1][lost]["path"])
    found = with_generations(run.config, {name: grown[name] for name in ("catalog", "quantizer")})
    assert ("ids-3" in found) == (lost == "fused"), "the intermediate is not needed to read the IDs"
    again, missing = run.bring()
    assert missing == ""
    assert Path(run.noted()[1][lost]["path"]).is_dir()
    np.testing.assert_array_equal(IdTable(grown["quantizer"], again).codes, codes)


def test_another_quantizer_gives_other_ids(root: Path, trained: dict[str, Artifact]) -> None:
    config = configuration(root, levels=[8, 8])
    view = append(root, GenerationsView(trained["catalog"]), draw(40, "o", seed=33, far=4.0))
    artifacts = {**trained, "generation-1": view.generations[0].artifact}
    run = Noted(root, artifacts)
    (first,), _ = run.bring()
    assert "refit: the new items of generation 1" in run.warned[0]
    other = train(root, trained["catalog"], config, name="other")["quantizer"]
    # Its IDs do not hold for another quantizer: the items wait for new ones.
    assert "ids-1" not in with_generations(run.config, {**trained, "quantizer": other})
    assert "ids-1" in with_generations(run.config, trained)
    run.edit(lambda d: d["stages"]["quantizer"].update(path=str(other.path)))
    (second,), _ = run.bring(max_drift=1000.0)
    assert second.meta["levels"] == [8, 8]
    assert second.path != first.path
    assert len(run.warned) == 1
    # A fusion of an earlier catalogue cannot read the items of this one.
    stale = Artifact(trained["fusion"].path, trained["fusion"].manifest)
    manifest = json.loads((stale.path / "manifest.json").read_text())
    folder = root / "stale"
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps(manifest | {"inputs": {"catalog": "0" * 64}}))
    run.edit(lambda d: d["stages"]["fusion"].update(path=str(folder)))
    assert run.bring() == ([], "the run's fusion was made before its catalogue was built anew")


def test_appending_needs_a_catalogue(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no finished catalogue"):
        append_generation(configuration(tmp_path), Request("", "x"), say=print, warn=print)
