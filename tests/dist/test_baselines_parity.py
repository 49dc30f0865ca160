"""SASRec and BERT4Rec trained on two ranks, their weights partitioned, against one rank: the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qbrec.baselines import stage
from qbrec.config import parse_config
from qbrec.engine.context import StageContext
from qbrec.storage.artifact import ArtifactStore
from tests.support.sequence_inputs import make_inputs
from tests.support.spawn import run_ranks

pytestmark = pytest.mark.dist


def train(rank: int, world: int, root: str, zero_stage: int) -> dict[str, Any]:
    # Wide enough for ZeRO 3 to partition the table of items, which is read as the output, too.
    settings = {
        "width": 512,
        "layers": 1,
        "dropout": 0.1,
        "max_items": 8,
        "train": {
            "epochs": 3,
            "batch_size": 32,
            "micro_batch": 8,
            "learning_rate": 3e-3,
            "evaluate_every": 3,
        },
    }
    config = parse_config(
        {
            "data": {"domains": {"pets": {"items": "-", "interactions": "-"}}},
            "baselines": {"sasrec": settings, "bert4rec": settings},
            "compute": {"zero_stage": zero_stage},
        }
    )
    store, found = ArtifactStore(root), {}
    catalog = store.find("catalog", "c" * 64)
    assert catalog is not None
    for name in ("sasrec", "bert4rec"):
        ctx = StageContext(
            store=store,
            run_dir=Path(root) / f"run-{world}-{zero_stage}",
            stage=name,
            key=f"{world}{zero_stage}" * 32,
            seed=0,
            rank=rank,
            world=world,
            compute=config.compute,
        )
        ctx.run_dir.mkdir(exist_ok=True)
        artifact = getattr(stage, name)(ctx, config, {"catalog": catalog})
        best = {key: artifact.meta["best"][key] for key in ("ndcg@10", "num_users")}
        found[name] = {"weights": artifact.load_safetensors("item_encoder.safetensors"), **best}
    return found


def test_two_ranks_with_partitioned_weights_train_what_one_rank_trains(tmp_path: Path) -> None:
    make_inputs(tmp_path)
    alone = run_ranks(train, 1, str(tmp_path), 0)[0]
    for result in run_ranks(train, 2, str(tmp_path), 3):
        for name, expected in alone.items():
            found = result[name]
            assert found["num_users"] == expected["num_users"]
            assert found["ndcg@10"] == pytest.approx(expected["ndcg@10"], abs=0.03)
            for key, weight in expected["weights"].items():
                torch.testing.assert_close(found["weights"][key], weight, atol=2e-4, rtol=1e-2, msg=key)
