"""The evaluation stage over two domains, against ranks worked out by sorting."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from qbrec.config import RootConfig, parse_config
from qbrec.engine.context import StageContext
from qbrec.evaluation.stage import run
from qbrec.evaluation.table import format_table
from qbrec.ranking import METRICS, metrics_of_ranks
from qbrec.sequence.encoder import SequenceEncoder
from qbrec.sequence.recommender import SequenceRecommender, save_encoder
from qbrec.sequence.vocabulary import Vocabulary
from qbrec.storage.artifact import Artifact, ArtifactStore
from qbrec.storage.catalog_view import CatalogView
from tests.support.sequence_inputs import DOMAINS, ITEMS, LEVELS, make_inputs


def configured(**evaluation: object) -> RootConfig:
    domains = {name: {"items": "x", "interactions": "x"} for name in DOMAINS}
    return parse_config(
        {
            "data": {"domains": domains, "target": "games"},
            "sequence": {"width": 16, "layers": 1, "heads": 2, "max_items": 6},
            "ranking": {"chunk_items": 17},
            "evaluation": {
                "bootstrap": 50,
                "batch_users": 7,
                "baselines": ("popularity", "itemknn"),
                **evaluation,
            },
        }
    )


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Artifact]:
    monkeypatch.setattr(
        CatalogView, "near_duplicate_group", property(lambda self: np.arange(self.num_items) // 2)
    )
    found = make_inputs(tmp_path)
    torch.manual_seed(0)
    writer = ArtifactStore(tmp_path).writer("finetune", "f" * 64)
    writer.prepare()
    save_encoder(writer, SequenceEncoder(configured().sequence, Vocabulary(LEVELS, DOMAINS)))
    found["finetune"] = writer.commit(meta={}, inputs={}, config={}, seed=0)
    return found


def evaluate(root: Path, config: RootConfig, inputs: dict[str, Artifact], *, key: str) -> Artifact:
    context = StageContext.local(ArtifactStore(root), root / "run", stage="evaluation", key=key * 64)
    return run(context, config, inputs)


def test_ranks_and_metrics(tmp_path: Path, inputs: dict[str, Artifact]) -> None:
    found = evaluate(tmp_path, configured(), inputs, key="e")
    metrics = found.load_json("metrics.json")
    table = pq.read_table(found.file("ranks.parquet"))
    assert set(metrics["models"]) == {"qbrec", "popularity", "itemknn"}
    assert set(metrics["settings"]["itemknn"]) == {"alpha", "decay"}
    assert metrics["protocol"]["num_candidates"] == ITEMS
    assert set(np.asarray(table["domain"])) == {1}
    assert table.num_rows == found.meta["num_users"] == metrics["protocol"]["num_users"]

    # the model's own ranks, once more: all scores summed and sorted, one user at a time
    catalog = CatalogView(inputs["catalog"])
    codes = inputs["quantizer"].load_npy("semantic_ids.npy")
    model = SequenceRecommender.load(inputs["finetune"], semantic_ids=codes)
    histories = catalog.load_histories("games")
    candidates = np.arange(ITEMS, 2 * ITEMS)
    mine = codes[candidates].astype(int)
    place = {int(user): i for i, user in enumerate(histories.user)}
    names = ("user", "target_row", "qbrec_kept", "qbrec_removed", "in_non_duplicate")
    for user, target, kept, removed, fresh in zip(*(table[c].to_pylist() for c in names), strict=True):
        index = place[user]
        cut = int(histories.cut[index, 1])
        history = histories.rows.row(index)[:cut]
        assert target == histories.rows.row(index)[cut]
        log_probs = model.code_log_probs(histories.rows.take(np.array([index])).prefix(np.array([cut])), 1)[0]
        # rounded: the last bit may differ with the batch, so ranks are held between their bounds
        scores = np.round(sum(log_probs[i, mine[:, i]].numpy() for i in range(len(LEVELS))), 4)
        own, seen = scores[target - ITEMS], scores[np.unique(history) - ITEMS]
        above, level = (scores > own).sum(), (scores >= own).sum()
        assert above + 1 <= kept <= level
        assert above + 1 - (seen >= own).sum() <= removed <= level - (seen > own).sum()
        assert fresh == (not np.isin(history // 2, target // 2).any())
    share = metrics["protocol"]["duplicate_share"]
    assert share == pytest.approx(1 - np.mean(table["in_non_duplicate"].to_pylist()))
    assert 0 < share < 1
    values = metrics_of_ranks(table["qbrec_removed"].to_numpy().astype(np.int64))
    for i, metric in enumerate(METRICS):
        assert metrics["models"]["qbrec"]["removed"][metric]["mean"] == pytest.approx(values[:, i].mean())
    # users walk along a ring: co-occurrence finds the next item, popularity does not
    knn = metrics["models"]["itemknn"]["removed"]["hr@1"]["mean"]
    assert knn > 0.8
    assert knn > metrics["models"]["popularity"]["removed"]["hr@1"]["mean"] + 0.3
    assert "games" in format_table(metrics)
    assert '"stage": "evaluation"' in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_configuration_matters(tmp_path: Path, inputs: dict[str, Artifact]) -> None:
    found = evaluate(tmp_path, configured(baselines=("popularity",), max_users=5), inputs, key="a")
    metrics = found.load_json("metrics.json")
    assert set(metrics["models"]) == {"qbrec", "popularity"}
    assert metrics["protocol"]["num_users"] == 5
    more = evaluate(
        tmp_path, configured(baselines=("popularity",), max_users=5, bootstrap=3), inputs, key="b"
    )
    cells = [a.load_json("metrics.json")["models"]["qbrec"]["removed"]["mrr"] for a in (found, more)]
    assert cells[0]["mean"] == cells[1]["mean"]
    assert cells[0]["low"] != cells[1]["low"]
    # how many users are scored at once is a matter of speed alone
    other = evaluate(
        tmp_path, configured(baselines=("popularity",), max_users=5, batch_users=2), inputs, key="c"
    )
    tables = [pq.read_table(a.file("ranks.parquet")) for a in (found, other)]
    assert tables[0]["popularity_removed"].equals(tables[1]["popularity_removed"])


def test_retired_items_are_no_candidates(
    tmp_path: Path, inputs: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(baselines=("popularity",))
    whole = evaluate(tmp_path, config, inputs, key="a")
    popular = np.argsort(-np.asarray(CatalogView(inputs["catalog"]).train_counts)[ITEMS:])[:5] + ITEMS
    monkeypatch.setattr(
        CatalogView, "retired", property(lambda self: np.isin(np.arange(self.num_items), popular))
    )
    found = evaluate(tmp_path, config, inputs, key="b")
    assert found.load_json("metrics.json")["protocol"]["num_candidates"] == ITEMS - 5
    before, after = (pq.read_table(a.file("ranks.parquet")) for a in (whole, found))
    live = ~np.isin(before["target_row"], popular)
    gained = before["popularity_kept"].to_numpy() - after["popularity_kept"].to_numpy()
    assert (gained[live] >= 0).all()
    assert (gained[live] == 5).any()
