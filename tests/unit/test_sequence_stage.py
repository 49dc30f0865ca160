"""Pretraining and fine-tuning as stages: from artifacts to artifacts, in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qbrec.config import RootConfig, parse_config
from qbrec.engine.context import StageContext
from qbrec.engine.launch import process_group
from qbrec.errors import DataError
from qbrec.ranking.scorer import FactorisedScorer
from qbrec.sequence import stage
from qbrec.sequence.recommender import SequenceRecommender
from qbrec.sequence.tasks import HistoryCollate
from qbrec.storage.artifact import Artifact, ArtifactStore
from qbrec.storage.catalog_view import CatalogView
from qbrec.storage.ragged import Ragged
from tests.support.sequence_inputs import ITEMS, make_inputs

TRAIN = {"epochs": 30, "batch_size": 32, "micro_batch": 32, "learning_rate": 1e-2, "evaluate_every": 15}


def configuration(**sequence: Any) -> RootConfig:
    small = {"width": 32, "layers": 1, "heads": 2, "dropout": 0.0, "max_items": 8}
    domains = {name: {"items": "-", "interactions": "-"} for name in ("pets", "games")}
    settings = {**small, "pretrain": TRAIN, "finetune": {**TRAIN, "epochs": 15}, **sequence}
    return parse_config({"data": {"domains": domains, "target": "games"}, "sequence": settings})


def context(root: Path, name: str, key: str) -> StageContext:
    return StageContext.local(ArtifactStore(root), root / "run", stage=name, key=key * 64)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    root = tmp_path_factory.mktemp("sequence")
    inputs, config = make_inputs(root), configuration()
    with process_group(config):
        inputs["pretrain"] = stage.pretrain(context(root, "pretrain", "e"), config, dict(inputs))
        inputs["finetune"] = stage.finetune(context(root, "finetune", "f"), config, dict(inputs))
    return inputs


def test_both_stages_leave_what_the_contract_names(trained: dict[str, Artifact]) -> None:
    for name in ("pretrain", "finetune"):
        artifact = trained[name]
        assert artifact.kind == name
        artifact.verify()
        description = artifact.load_json("encoder.json")
        assert description["domains"] == ["pets", "games"]
        assert description["levels"] == [8, 8, 4]
        curve = artifact.load_json("curve.json")
        assert [entry["epoch"] for entry in curve] == ([15, 30] if name == "pretrain" else [15])
        assert artifact.meta["best"]["ndcg@10"] == max(entry["ndcg@10"] for entry in curve)
    assert trained["finetune"].inputs["pretrain"] == trained["pretrain"].fingerprint
    # Fine-tuning reads the target domain only, and no history of one item is ever trained on.
    assert trained["finetune"].meta["num_histories"] < trained["pretrain"].meta["num_histories"] < 90


def test_the_walk_of_each_domain_is_learnt(trained: dict[str, Artifact]) -> None:
    semantic_ids = trained["quantizer"].load_npy("semantic_ids.npy")
    recommender = SequenceRecommender.load(trained["finetune"], semantic_ids=semantic_ids)
    scorer = FactorisedScorer(recommender, semantic_ids=semantic_ids)
    games = np.array([[(s - i) % ITEMS + ITEMS for i in range(4)] for s in range(ITEMS)])
    scores = scorer.scores(Ragged.from_lists(games.tolist()), 1)[:, ITEMS:]
    target = torch.from_numpy((games[:, -1] - 1 - ITEMS) % ITEMS + ITEMS)
    rank = (scores > scores[torch.arange(ITEMS), target - ITEMS][:, None]).sum(1)
    assert float((rank < 5).float().mean()) > 0.8


def test_finetuning_starts_from_the_pretrained_weights(trained: dict[str, Artifact]) -> None:
    before = trained["pretrain"].load_safetensors("encoder.safetensors")
    after = trained["finetune"].load_safetensors("encoder.safetensors")
    assert before.keys() == after.keys()
    near = torch.nn.functional.cosine_similarity(
        before["tokens.weight"].flatten(), after["tokens.weight"].flatten(), dim=0
    )
    assert 0.7 < float(near) < 1 - 1e-6


def test_training_reads_no_validation_or_test_item(trained: dict[str, Artifact], tmp_path: Path) -> None:
    catalog = CatalogView(trained["catalog"])
    histories = catalog.load_histories()
    config = configuration()
    collate = HistoryCollate(max_items=100, seed=0, prefix=0.0)
    loader = stage.history_loader(
        context(tmp_path, "pretrain", "1"), catalog, config.sequence.pretrain, collate=collate, domain=None
    )
    read: dict[int, np.ndarray] = {}
    for step in loader.iterate(0):
        for batch in step:
            assert batch is not None
            ends = np.cumsum(batch.lengths.numpy())
            for sample, rows in zip(
                batch.samples.tolist(), np.split(batch.rows.numpy(), ends[:-1]), strict=True
            ):
                read[sample] = rows
    assert sorted(read) == np.flatnonzero(histories.cut[:, 0] >= 2).tolist()
    for user, rows in read.items():
        np.testing.assert_array_equal(rows, histories.rows.row(user)[: histories.cut[user, 0]])


def test_a_domain_without_histories_says_so(trained: dict[str, Artifact], tmp_path: Path) -> None:
    catalog = CatalogView(trained["catalog"])
    collate = HistoryCollate(max_items=9, seed=0, prefix=0.0)
    with pytest.raises(DataError, match="nothing to learn"):
        stage.history_loader(
            context(tmp_path, "finetune", "2"),
            catalog,
            configuration().sequence.finetune,
            collate=collate,
            domain=7,
        )
