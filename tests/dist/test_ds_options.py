"""Every option of ours that is meant for DeepSpeed is found in the running engine, and trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from qbrec.config.sections import ComputeConfig
from qbrec.config.stages import TrainConfig
from qbrec.engine.context import StageContext
from qbrec.engine.ds_config import deepspeed_config
from qbrec.engine.ds_engine import start_engine
from qbrec.engine.train import train
from qbrec.storage.artifact import ArtifactStore
from tests.support.half import allow_half
from tests.support.spawn import run_ranks
from tests.support.training import ToyLoader, ToyTask

CONFIG = TrainConfig(epochs=3, batch_size=8, micro_batch=2, learning_rate=1e-2)


def _context(rank: int, world: int, folder: str, compute: dict[str, Any]) -> StageContext:
    Path(folder).mkdir(parents=True, exist_ok=True)
    return StageContext(
        store=ArtifactStore(folder), run_dir=Path(folder), stage="toy", key="k" * 64, seed=3,
        rank=rank, world=world,
        compute=ComputeConfig(**{"device": "cpu", "precision": "float32", **compute}),
    )  # fmt: skip


def _facts(
    rank: int, world: int, folder: str, compute: dict[str, Any], schedule: dict[str, Any]
) -> dict[str, Any]:
    """What the engine says of itself, not what we told it."""
    allow_half()
    config = CONFIG.model_copy(update=schedule)
    engine = start_engine(ToyTask().module, _context(rank, world, folder, compute), config)
    optimizer, torch_optimizer = engine.optimizer, getattr(engine.optimizer, "optimizer", engine.optimizer)
    groups = torch_optimizer.param_groups
    facts = {
        "stage": engine.zero_optimization_stage(),
        "partitions": type(optimizer).__name__,
        "bf16": engine.bfloat16_enabled(),
        "fp16": engine.fp16_enabled(),
        "clipping": engine.gradient_clipping(),
        "micro_batch": engine.train_micro_batch_size_per_gpu(),
        "optimizer": type(torch_optimizer).__name__,
        "betas": tuple(groups[0]["betas"]),
        "decays": sorted({group["weight_decay"] for group in groups}),
        "overlap": getattr(optimizer, "overlap_comm", engine.zero_overlap_comm()),
        "bucket": getattr(optimizer, "reduce_bucket_size", None),
        "gather_bucket": getattr(optimizer, "allgather_bucket_size", None),
        "prefetch": engine.zero_prefetch_bucket_size(),
        "offload_optimizer": bool(
            getattr(optimizer, "cpu_offload", getattr(optimizer, "offload_optimizer", False))
        ),
        "offload_parameters": bool(getattr(optimizer, "offload_param", False)),
        "dtype": str(next(engine.module.parameters()).dtype),
        "partitioned": all(hasattr(p, "ds_tensor") for p in engine.module.parameters()),
        "compiled": engine.is_compiled,
    }
    if engine.fp16_enabled():
        scaler = getattr(optimizer, "loss_scale_config", None) or optimizer.loss_scaler
        facts |= {"scale": scaler.cur_scale, "window": scaler.scale_window}
    engine.destroy()
    return facts


@pytest.mark.dist
@pytest.mark.parametrize(
    ("compute", "schedule", "expected"),
    [
        ({"zero_stage": 0}, {},
         {"stage": 0, "partitions": "AdamW", "partitioned": False, "optimizer": "AdamW"}),
        ({"zero_stage": 1}, {}, {"stage": 1, "overlap": False}),
        ({"zero_stage": 2}, {}, {"stage": 2, "partitioned": False}),
        ({"zero_stage": 3}, {}, {"stage": 3, "partitioned": True}),
        ({"precision": "bfloat16"}, {}, {"bf16": True, "dtype": "torch.bfloat16"}),
        ({"precision": "float16", "loss_scale_power": 9, "loss_scale_window": 77}, {},
         {"fp16": True, "dtype": "torch.float16", "scale": 512.0, "window": 77}),
        ({"offload_optimizer": True}, {}, {"offload_optimizer": True}),
        ({"offload_optimizer": True, "zero_stage": 3}, {}, {"offload_optimizer": True}),
        ({"offload_parameters": True, "zero_stage": 3}, {}, {"offload_parameters": True}),
        ({"overlap_communication": True, "zero_stage": 2}, {}, {"overlap": True}),
        ({"overlap_communication": True, "zero_stage": 3}, {}, {"overlap": True}),
        ({"overlap_communication": False, "zero_stage": 3}, {}, {"overlap": False}),
        ({"bucket_elements": 12_346}, {}, {"bucket": 12_346, "gather_bucket": 12_346}),
        ({"bucket_elements": 12_346, "zero_stage": 3}, {}, {"prefetch": 12_346}),
        ({}, {"clip_norm": 0.25, "micro_batch": 4}, {"clipping": 0.25, "micro_batch": 4}),
        ({}, {"betas": (0.8, 0.95), "weight_decay": 0.3}, {"betas": (0.8, 0.95), "decays": [0.0, 0.3]}),
        ({"compile": True}, {}, {"compiled": True}),
    ],
    ids=str,
)  # fmt: skip
def test_option_reaches_deepspeed(
    compute: dict[str, Any], schedule: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    (facts,) = run_ranks(_facts, 1, str(tmp_path), compute, schedule)
    assert {name: facts[name] for name in expected} == expected


def _losses(rank: int, world: int, folder: str, compute: dict[str, Any]) -> list[float]:
    allow_half()
    ctx = _context(rank, world, folder, compute)
    return train(ctx, ToyTask(), ToyLoader(rank, world), config=CONFIG, label="toy").losses


@pytest.mark.dist
@pytest.mark.parametrize(
    "compute",
    [
        {"offload_optimizer": True, "zero_stage": 2},
        {"offload_optimizer": True, "offload_parameters": True, "zero_stage": 3},
        {"overlap_communication": True, "zero_stage": 2},
        {"bucket_elements": 50, "zero_stage": 1},
        {"bucket_elements": 50, "zero_stage": 3},
    ],
    ids=str,
)
def test_options_that_move_memory_leave_the_losses_alone(compute: dict[str, Any], tmp_path: Path) -> None:
    (expected,) = run_ranks(_losses, 1, str(tmp_path / "plain"), {"zero_stage": 0})
    for losses in run_ranks(_losses, 2, str(tmp_path / "with"), compute):
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-5, atol=0)


@pytest.mark.dist
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_half_precision_follows_float32_at_every_stage(stage: int, precision: str, tmp_path: Path) -> None:
    (expected,) = run_ranks(_losses, 1, str(tmp_path / "plain"), {"zero_stage": 0})
    half = {"zero_stage": stage, "precision": precision, "loss_scale_power": 6}
    (losses,) = run_ranks(_losses, 1, str(tmp_path / "half"), half)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=0.03, atol=0.03)
    assert losses != expected, "it was not half precision"


def test_auto_is_resolved_and_nothing_is_unknown_to_deepspeed() -> None:
    config = deepspeed_config(ComputeConfig(zero_stage=3, offload_optimizer=True), CONFIG)
    assert "auto" not in str(config)
    from deepspeed.runtime.config import DeepSpeedConfig

    # DeepSpeed ignores a top-level key it does not know: each of ours must be one it reads.
    source = Path(DeepSpeedConfig.__init__.__code__.co_filename).with_name("constants.py").read_text()
    for key in config:
        assert f'"{key}"' in source or key == "zero_optimization", key


@pytest.mark.parametrize(
    "wrong", [{"offload_parameters": True}, {"offload_optimizer": True, "zero_stage": 0}]
)
def test_offload_that_the_stage_cannot_do_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="zero_stage"):
        ComputeConfig(**wrong)
