"""From our typed configuration to DeepSpeed's dictionary, every "auto" resolved."""

from __future__ import annotations

from typing import Any

import torch

from qbrec.config.sections import ComputeConfig
from qbrec.config.stages import TrainConfig


def resolve_device(compute: ComputeConfig) -> str:
    """`cpu` or `cuda`."""
    if compute.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return compute.device


def resolve_precision(compute: ComputeConfig) -> str:
    """`float32`, `bfloat16` or `float16`: bfloat16 on a GPU that has it, float32 on a CPU."""
    if compute.precision == "auto":
        cuda = resolve_device(compute) == "cuda"
        return "bfloat16" if cuda and torch.cuda.is_bf16_supported() else "float32"
    return compute.precision


def deepspeed_config(compute: ComputeConfig, train: TrainConfig) -> dict[str, Any]:
    """The ds_config of a stage.

    Gradient accumulation is steered by the loop (`set_gradient_accumulation_boundary`), because the last
    batch of an epoch has fewer micro-batches than the others; DeepSpeed itself is told 1.
    """
    device, precision = resolve_device(compute), resolve_precision(compute)
    stage = compute.zero_stage
    zero: dict[str, Any] = {"stage": stage}
    if stage:
        overlap = compute.overlap_communication
        zero |= {
            "overlap_comm": device == "cuda" if overlap == "auto" else overlap,
            "reduce_bucket_size": compute.bucket_elements,
        }
    if stage in (1, 2):
        zero["allgather_bucket_size"] = compute.bucket_elements
    if stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": compute.bucket_elements,
            # Small parameters would otherwise stay whole on every rank and never be partitioned.
            "stage3_param_persistence_threshold": 10_000,
        }
    pinned = {"device": "cpu", "pin_memory": device == "cuda"}
    if compute.offload_optimizer:
        zero["offload_optimizer"] = pinned
    if compute.offload_parameters:
        zero["offload_param"] = pinned
    return {
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": train.clip_norm,
        "steps_per_print": 1_000_000_000,
        "optimizer": {
            "type": "AdamW",
            "params": {
                # The loop sets the rate before every step; until then nothing may move: some stages make
                # AdamW's moments by a step, and weight decay would count.
                "lr": 0.0,
                "betas": list(train.betas),
                "eps": 1e-8,
                "weight_decay": train.weight_decay,
                # DeepSpeed's fused CPU Adam needs a compiler at run time; torch's does not.
                "torch_adam": True,
                "fused": True,
                "adam_w_mode": True,
            },
        },
        "zero_optimization": zero,
        "bf16": {"enabled": precision == "bfloat16"},
        "fp16": {
            "enabled": precision == "float16",
            "loss_scale": 0,  # dynamic
            "initial_scale_power": compute.loss_scale_power,
            "loss_scale_window": compute.loss_scale_window,
        },
    }
