"""Weights that training starts with are in the race: they stay where nothing better comes of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

from qbrec.config import parse_config
from qbrec.config.stages import TrainConfig
from qbrec.engine.context import StageContext
from qbrec.engine.launch import process_group
from qbrec.engine.train import TrainResult, train
from qbrec.storage.artifact import ArtifactStore
from tests.support.training import Interrupted, ToyLoader, ToyTask

SCHEDULE = TrainConfig(epochs=3, batch_size=8, micro_batch=2, learning_rate=0.01, checkpoint_every=4)


def taught(root: Path, *, start_best: bool, stop_at: int = 0) -> tuple[ToyTask, TrainResult]:
    """Train; the metric is best at the start, or worst."""
    ctx = StageContext.local(ArtifactStore(root), root / "run", stage="toy", key="k" * 64)
    task, loader = ToyTask(), ToyLoader(0, 1, stop_at=stop_at)
    before = [p.detach().clone() for p in task.module.parameters()]

    def evaluate(module: nn.Module) -> Mapping[str, float]:
        moved = sum(
            float((p.cpu() - was).abs().sum()) for p, was in zip(module.parameters(), before, strict=True)
        )
        return {"m": -moved if start_best else moved}

    result = train(
        ctx, task, loader, config=SCHEDULE, label="toy", evaluate=evaluate, monitor="m", start_counts=True
    )
    return task, result


@pytest.mark.parametrize("stopped", [False, True])
def test_the_best_of_start_and_epochs_is_kept(tmp_path: Path, stopped: bool) -> None:
    began = ToyTask().module.state_dict()
    with process_group(parse_config({})):
        for start_best in (True, False):
            root = tmp_path / str(start_best)
            if stopped:  # goes on from a checkpoint of the second epoch
                with pytest.raises(Interrupted):
                    taught(root, start_best=start_best, stop_at=8)
            task, result = taught(root, start_best=start_best)
            places = [(entry["epoch"], entry["step"]) for entry in result.curve]
            assert places == [(0, 0), (1, 5), (2, 10), (3, 15)]
            assert result.best["epoch"] == (0 if start_best else 3)
            after = task.module.state_dict()
            same = all(torch.equal(after[name], began[name]) for name in began)
            assert same == start_best
            # What is finished is read back, not trained again.
            again, found = taught(root, start_best=start_best)
            assert found.best == result.best
            assert all(torch.equal(again.module.state_dict()[name], after[name]) for name in after)
