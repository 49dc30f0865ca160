"""Weights and moments of a DeepSpeed engine by parameter name, whatever the ZeRO stage and world size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

MOMENTS = ("exp_avg", "exp_avg_sq")


def read_weights(engine: Any) -> dict[str, torch.Tensor]:
    """Full float32 weights on the CPU, the same on every rank. A collective call."""
    from deepspeed.utils import safe_get_full_fp32_param

    weights = {}
    for name, parameter in _parameters(engine):
        full = safe_get_full_fp32_param(parameter)
        # Stage 0 in float32 has no master copy: the parameter itself is the full weight.
        weights[name] = (parameter.data if full is None else full).detach().float().cpu().clone()
    kept = engine.module.state_dict().keys()  # a buffer may be declared not to be part of the state
    for name, buffer in engine.module.named_buffers():
        if name in kept:
            weights[name] = buffer.detach().cpu().clone()
    return weights


def read_moments(engine: Any) -> dict[str, torch.Tensor]:
    """Both moments of AdamW as `<moment>.<parameter>`, float32 on the CPU. Collective, after a first step."""
    from deepspeed.utils import safe_get_full_optimizer_state

    _relink(engine)
    moments = {}
    for name, parameter in _parameters(engine):
        for moment in MOMENTS:
            if _is_plain(engine):
                full = engine.optimizer.state[parameter][moment]
            else:
                full = safe_get_full_optimizer_state(parameter, moment)
            moments[f"{moment}.{name}"] = full.detach().float().cpu().clone()
    return moments


def write_state(
    engine: Any,
    *,
    weights: dict[str, torch.Tensor],
    moments: dict[str, torch.Tensor],
    step: int,
    loss: Callable[[], torch.Tensor],
) -> None:
    """Load weights, moments and AdamW's step count into a fresh engine. A collective call.

    Args:
        engine: What `deepspeed.initialize` gave.
        weights: As `read_weights` gave them.
        moments: As `read_moments` gave them.
        step: Optimiser steps taken so far.
        loss: Computes any loss through `engine`; it is multiplied by zero.
    """
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    # AdamW makes its moments at its first step, and each step copies the master weights to where forward
    # reads them. With lr 0 and zero gradients a step does both and moves nothing else, at every ZeRO stage.
    _idle_step(engine, loss)
    _relink(engine)
    for name, parameter in _parameters(engine):
        if _is_plain(engine):
            parameter.data.copy_(weights[name])
        else:
            safe_set_full_fp32_param(parameter, weights[name].to(engine.device))
    for name, buffer in engine.module.named_buffers():
        if name in weights:
            buffer.copy_(weights[name].to(buffer.device))
    _idle_step(engine, loss)
    for name, parameter in _parameters(engine):
        for moment in MOMENTS:
            value = moments[f"{moment}.{name}"]
            if _is_plain(engine):
                engine.optimizer.state[parameter][moment].copy_(value)
            else:
                safe_set_full_optimizer_state(parameter, value.to(engine.device), moment)
    for state in _torch_optimizer(engine).state.values():
        state["step"].fill_(step)


def _idle_step(engine: Any, loss: Callable[[], torch.Tensor]) -> None:
    rates = [group["lr"] for group in engine.optimizer.param_groups]
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.0
    engine.set_gradient_accumulation_boundary(True)
    engine.backward(loss() * 0.0, scale_wrt_gas=False)
    engine.step()
    for group, rate in zip(engine.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _relink(engine: Any) -> None:
    # Stages 1 and 2 link moments to parameters inside their very first step, group by group, before the later
    # groups have any: link again now that all of them exist.
    if hasattr(engine.optimizer, "_hp_optimizer_states_linked"):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _is_plain(engine: Any) -> bool:
    return isinstance(engine.optimizer, torch.optim.Optimizer)


def _torch_optimizer(engine: Any) -> Any:
    return engine.optimizer if _is_plain(engine) else engine.optimizer.optimizer


def _parameters(engine: Any) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
