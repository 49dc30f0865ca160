"""Item graphs of a run that grew: rows of new items, the bonus that they give, the bundle that holds them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qbrec.errors import DataError
from qbrec.neighbours.content import content_of_catalog, content_with_new, views_of_catalog
from qbrec.ranking.bonus import Bonus, BonusScorer
from qbrec.ranking.counted import count_arrows
from qbrec.ranking.graphs import GRAPHS, ItemGraphs, _appended_rows, graphs_of, without_prefix
from qbrec.ranking.scorer import FactorisedScorer
from qbrec.registry.bundle import PARTS, open_served, parts_of, write_bundle
from qbrec.registry.recommend import Recommender
from qbrec.sequence.bonus import load_scorer
from qbrec.storage.artifact import Artifact
from qbrec.storage.blocks import BlockSet, RaggedField
from qbrec.storage.generations import GenerationsView
from qbrec.storage.id_table import IdTable, current_alike, numbered
from qbrec.storage.ragged import Ragged
from tests.support import grown_shop
from tests.support.grown_run import GENERATION_PARTS, evaluation, view_of
from tests.support.grown_shop import configuration


def test_the_bonus_knows_only_what_was_trained_on() -> None:
    rng = np.random.default_rng(0)
    training = Ragged.from_lists([[1, 2, 3], [2, 4], [3, 5]])
    graphs = ItemGraphs(**count_arrows(training, num_items=6, keep=5))
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
    joined_run: dict[str, Artifact], grown_run: dict[str, Artifact]
) -> None:
    view = view_of(joined_run)
    keep, shop = 30, view.base.candidates("shop")
    assert joined_run["neighbours"].manifest["config"]["kept"][1] == keep
    for number in (1, 2, 3):
        rows, added = joined_run[f"alike-{number}"], joined_run[f"generation-{number}"].meta["num_added"]
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
            new, old = content(joined_run, name, number), content(joined_run, name, 0)
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
    joined_run: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    read, column = [], BlockSet.column

    def counted(self: BlockSet, *args: Any) -> Any:
        read.append(args[0])
        return column(self, *args)

    monkeypatch.setattr(BlockSet, "column", counted)
    generations = numbered(joined_run, "generation")
    for number in (1, 2, 3):
        view = GenerationsView(joined_run["catalog"], generations[:number])
        inputs = {"fusion": joined_run["fusion"], "fused": joined_run[f"fused-{number}"]}
        for name in views_of_catalog(view.base):
            read.clear()
            old, new = content_with_new(name, view, inputs)
            added = view.generations[-1].num_added
            assert read == ["fused"] * (name == "fused") * (1 + (added > 0))
            np.testing.assert_array_equal(old, content_of_catalog(name, view.base, joined_run["fusion"]))
            assert new.shape == (added, old.shape[1])
            if added:
                np.testing.assert_allclose(new, content(joined_run, name, number), atol=4e-3)


def test_appended_items_get_a_bonus(shop_root: Path, joined_run: dict[str, Artifact]) -> None:
    config, view = configuration(shop_root), view_of(joined_run)
    alone = {name: artifact for name, artifact in joined_run.items() if not name.startswith("alike-")}
    partly = {name: artifact for name, artifact in joined_run.items() if name not in ("alike-2", "alike-3")}
    history = ["i5", "i8", "n7", "i30", "i41", "i52", "i63"]
    scores = {}
    for name, artifacts in (("all", joined_run), ("partly", partly), ("none", alone)):
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


def test_graph_rows_have_to_go_on_from_the_graphs(shop_root: Path, joined_run: dict[str, Artifact]) -> None:
    one, two, three = numbered(joined_run, "alike")
    assert ItemGraphs.load(joined_run["neighbours"], [one, two, three]).num_items == 624
    for wrong in ([two], [one, three, two], [joined_run["ids-1"]]):
        with pytest.raises(DataError, match="do not go on from the item graphs"):
            ItemGraphs.load(joined_run["neighbours"], wrong)
    ids = numbered(joined_run, "ids")
    assert current_alike(joined_run["neighbours"], ids, [one, two, three]) == [one, two, three]
    assert current_alike(joined_run["neighbours"], ids[:2], [one, two, three]) == [one, two]
    assert current_alike(joined_run["neighbours"], ids, [one, None, three]) == [one]
    other = Artifact(one.path, joined_run["neighbours"].manifest | {"fingerprint": "0" * 64})
    assert current_alike(other, ids, [one, two, three]) == []
    with pytest.raises(DataError, match="do not go on from the item graphs"):
        _appended_rows(other, [one], num_items=500)


@pytest.mark.parametrize("rows", [True, False])
def test_a_bundle_knows_the_graph_rows(
    shop_root: Path, joined_run: dict[str, Artifact], tmp_path: Path, rows: bool
) -> None:
    """Those of runs that have none, too."""
    config = configuration(shop_root)
    artifacts = {n: a for n, a in joined_run.items() if rows or not n.startswith("alike-")}
    bundle = write_bundle(
        tmp_path / "b", config=config, artifacts={**artifacts, "evaluation": evaluation(shop_root)}, card=""
    )
    parts = GENERATION_PARTS | ({"alike-1", "alike-2", "alike-3"} if rows else set())
    assert set(open_served(bundle)) == {"catalog", "quantizer", "neighbours", "finetune", *parts}
    histories = [["n7", "i5"], ["m3"]]
    expected = Recommender.from_artifacts(artifacts, ranking=config.ranking).recommend(histories, k=50)
    assert Recommender.load(bundle).recommend(histories, k=50) == expected


def test_item_graphs_are_a_part_where_the_model_has_a_bonus(
    trained_run: dict[str, Artifact], joined_run: dict[str, Artifact]
) -> None:
    assert parts_of(joined_run) == PARTS
    # The graphs are there, but the model was trained without them.
    assert parts_of({**joined_run, "finetune": trained_run["finetune"]}).keys() == PARTS.keys() - {
        "neighbours"
    }
    with pytest.raises(DataError, match="no finetune artifact"):
        parts_of({name: artifact for name, artifact in joined_run.items() if name != "finetune"})
