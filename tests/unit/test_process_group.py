"""Several runs in one process, as in a notebook."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from qbrec.config import RootConfig
from qbrec.config.stages import TrainConfig
from qbrec.engine.context import StageContext
from qbrec.engine.ds_engine import start_engine
from qbrec.engine.launch import process_group
from qbrec.storage.artifact import ArtifactStore


def test_a_process_that_left_its_group_can_train_again(tmp_path: Path) -> None:
    ctx = StageContext.local(ArtifactStore(tmp_path), tmp_path / "run")
    for _ in range(2):
        with process_group(RootConfig()):
            assert dist.is_initialized()
            engine = start_engine(torch.nn.Linear(2, 1), ctx, TrainConfig())
            engine.backward(engine(torch.ones(1, 2)).sum())
            engine.step()
        assert not dist.is_initialized()
