"""The encoder trained on two ranks, its weights partitioned, against one rank: the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qbrec.config import parse_config
from qbrec.engine.context import StageContext
from qbrec.sequence import stage
from qbrec.storage.artifact import ArtifactStore
from tests.support.sequence_inputs import make_inputs
from tests.support.spawn import run_ranks

pytestmark = pytest.mark.dist


def pretrain(rank: int, world: int, root: str, zero_stage: int) -> dict[str, Any]:
    train = {"epochs": 3, "batch_size": 32, "micro_batch": 8, "learning_rate": 3e-3, "evaluate_every": 3}
    config = parse_config(
        {
            "data": {"domains": {"pets": {"items": "-", "interactions": "-"}}},
            # Wide enough for ZeRO 3 to partition the tied embedding, which is read outside its own module.
            "sequence": {
                "width": 512,
                "layers": 1,
                "heads": 4,
                "dropout": 0.1,
                "max_items": 8,
                "pretrain": train,
            },
            "compute": {"zero_stage": zero_stage},
        }
    )
    store = ArtifactStore(root)
    inputs = {name: store.find(name, letter * 64) for name, letter in (("catalog", "c"), ("quantizer", "d"))}
    ctx = StageContext(
        store=store,
        run_dir=Path(root) / f"run-{world}-{zero_stage}",
        stage="pretrain",
        key=f"{world}{zero_stage}" * 32,
        seed=0,
        rank=rank,
        world=world,
        compute=config.compute,
    )
    ctx.run_dir.mkdir(exist_ok=True)
    artifact = stage.pretrain(ctx, config, inputs)  # type: ignore[arg-type]
    return {
        "weights": artifact.load_safetensors("encoder.safetensors"),
        "ndcg": artifact.meta["best"]["ndcg@10"],
        "users": artifact.meta["best"]["num_users"],
    }


def test_two_ranks_with_partitioned_weights_train_what_one_rank_trains(tmp_path: Path) -> None:
    make_inputs(tmp_path)
    alone = run_ranks(pretrain, 1, str(tmp_path), 0)[0]
    together = run_ranks(pretrain, 2, str(tmp_path), 3)
    for result in together:
        assert result["users"] == alone["users"]
        assert result["ndcg"] == pytest.approx(alone["ndcg"], abs=0.03)
        for name, weight in alone["weights"].items():
            torch.testing.assert_close(result["weights"][name], weight, atol=2e-4, rtol=1e-2, msg=name)
