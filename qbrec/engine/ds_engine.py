"""DeepSpeed itself: imported late and light, started on a process group that exists already."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

from torch import nn

from qbrec.config.stages import TrainConfig
from qbrec.engine.context import StageContext
from qbrec.engine.ds_config import deepspeed_config
from qbrec.engine.meter import collectives
from qbrec.engine.state import reset_counters


def start_engine(module: nn.Module, ctx: StageContext, config: TrainConfig) -> Any:
    """`deepspeed.initialize`; matrices decay, vectors do not.

    Args:
        module: What is trained; DeepSpeed may partition its parameters.
        ctx: The rank's context; its process group must exist.
        config: Optimiser and batch.

    Returns:
        The DeepSpeed engine.
    """
    deepspeed = import_deepspeed(ctx.device.type)
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    engine, *_ = deepspeed.initialize(
        model=module.to(ctx.device),
        model_parameters=[group for group in groups if group["params"]],
        config=deepspeed_config(ctx.compute, config),
        dist_init_required=False,
    )
    reset_counters(engine)
    if ctx.compute.compile:
        engine.compile(compile_kwargs={"dynamic": True})
    return engine


def import_deepspeed(device: str) -> Any:
    """The deepspeed module, set up for a device (`cpu` or `cuda`)."""
    os.environ.setdefault("DS_ACCELERATOR", device)
    # DeepSpeed's autotuner, which we do not use, tries to import MLflow: six of the eight seconds its import
    # takes, in every worker. None in sys.modules makes that attempt an ImportError, which it handles.
    hidden = "mlflow" not in sys.modules
    if hidden:
        sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        import deepspeed
        from deepspeed.comm import comm
        from deepspeed.ops import __compatible_ops__
        from deepspeed.utils import logger
    finally:
        if hidden:
            del sys.modules["mlflow"]
    logger.setLevel(logging.WARNING)
    comm.comms_logger = collectives
    if device == "cpu":
        # Otherwise DeepSpeed compiles a shared-memory operator, which needs g++ and ninja.
        __compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
