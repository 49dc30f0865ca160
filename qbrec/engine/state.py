"""Weights and moments of a DeepSpeed engine by parameter name, whatever the ZeRO stage and world size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

MOMENTS = ("exp_avg", "exp_avg_sq")
_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def read_weights(engine: Any) -> dict[str, torch.Tensor]:
    """Full float32 weights on the CPU, the same on every rank. A collective call."""
    from deepspeed.utils import safe_get_full_fp32_param

    weights = {}
    whole = _whole(engine)
    for name, parameter in _parameters(engine):
        full = safe_get_full_fp32_param(parameter) if whole is None else whole[parameter]
        weights[name] = full.detach().float().cpu().clone()
    kept = engine.module.state_dict().keys()  # a buffer may be declared not to be part of the state
    for name, buffer in engine.module.named_buffers():
        if name in kept:
            weights[name] = buffer.detach().cpu().clone()
    return weights


def read_moments(engine: Any) -> dict[str, torch.Tensor]:
    """Both moments of AdamW as `<moment>.<parameter>`, float32 on the CPU. Collective."""
    from deepspeed.utils import safe_get_full_optimizer_state

    if not read_counters(engine)["optimizer_step"]:
        # fp16 has left out every step so far: AdamW has no moments yet.
        trained = dict(_parameters(engine))
        weights = {name: w for name, w in read_weights(engine).items() if name in trained}
        return {f"{m}.{name}": torch.zeros_like(w) for name, w in weights.items() for m in MOMENTS}
    _relink(engine)
    moments, whole = {}, _whole(engine)
    for name, parameter in _parameters(engine):
        for moment in MOMENTS:
            if whole is not None:
                full = _torch_optimizer(engine).state[whole[parameter]][moment]
            else:
                full = safe_get_full_optimizer_state(parameter, moment)
            moments[f"{moment}.{name}"] = full.detach().float().cpu().clone()
    return moments


def read_counters(engine: Any) -> dict[str, float]:
    """AdamW's step count and the state of fp16's loss scaler, the same on every rank.

    The count is not the loop's: fp16 leaves out the steps whose gradients overflow.
    """
    steps = [int(state["step"]) for state in _torch_optimizer(engine).state.values() if "step" in state]
    counters = {"optimizer_step": float(max(steps, default=0))}
    scaler = _loss_scaler(engine)
    if scaler is not None:
        counters |= {name: float(getattr(scaler, name)) for name in _SCALER_FIELDS if hasattr(scaler, name)}
    return counters


def loss_scale(engine: Any) -> float:
    """What `engine.backward` multiplies the loss by: 1 except in fp16."""
    scaler = _loss_scaler(engine)
    return 1.0 if scaler is None else float(scaler.cur_scale)


def write_state(
    engine: Any,
    *,
    weights: dict[str, torch.Tensor],
    moments: dict[str, torch.Tensor],
    counters: Mapping[str, float],
    loss: Callable[[], torch.Tensor],
) -> None:
    """Load weights, moments and counters into a fresh engine. A collective call.

    Args:
        engine: What `deepspeed.initialize` gave.
        weights: As `read_weights` gave them.
        moments: As `read_moments` gave them.
        counters: As `read_counters` gave them.
        loss: Computes any loss through `engine`; it is multiplied by zero.
    """
    # AdamW makes its moments at its first step, and each step copies the master weights to where forward
    # reads them. With lr 0 and zero gradients a step does both and moves nothing else, at every ZeRO stage.
    _idle_step(engine, loss)
    _relink(engine)
    whole = _whole(engine)
    for name, parameter in _parameters(engine):
        _write(engine, whole, parameter, weights[name])
    for name, buffer in engine.module.named_buffers():
        if name in weights:
            buffer.copy_(weights[name].to(buffer.device))
    _idle_step(engine, loss)
    for name, parameter in _parameters(engine):
        for moment in MOMENTS:
            _write(engine, whole, parameter, moments[f"{moment}.{name}"], moment)
    for state in _torch_optimizer(engine).state.values():
        state["step"].fill_(counters["optimizer_step"])
    scaler = _loss_scaler(engine)
    if scaler is not None:
        for name in _SCALER_FIELDS:
            if name in counters and hasattr(scaler, name):
                setattr(scaler, name, type(getattr(scaler, name))(counters[name]))


def _write(
    engine: Any,
    whole: dict[Any, torch.Tensor] | None,
    parameter: Any,
    value: torch.Tensor,
    moment: str | None = None,
) -> None:
    """Put a full weight, or a full moment, where the engine keeps it; `whole` is `_whole(engine)`."""
    from deepspeed.utils import (
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    value = value.to(engine.device)
    if hasattr(parameter, "ds_tensor"):
        # Stage 3. DeepSpeed's own way from full to parts fails where a size is no multiple of the ranks.
        length, rank = parameter.ds_tensor.numel(), dist.get_rank(parameter.ds_process_group)
        part = value.flatten()[rank * length : (rank + 1) * length]
        part = torch.nn.functional.pad(part, (0, length - len(part)))
        if moment is None:
            safe_set_local_fp32_param(parameter, part)
        else:
            safe_set_local_optimizer_state(parameter, part, moment)
    elif whole is not None:
        kept = whole[parameter]
        (kept.data if moment is None else _torch_optimizer(engine).state[kept][moment]).copy_(value)
    elif moment is None:
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, moment)


def reset_counters(engine: Any) -> None:
    """Let AdamW count from 0: some stages make its moments by a step with zero gradients when they begin."""
    for state in _torch_optimizer(engine).state.values():
        if "step" in state:
            state["step"].zero_()


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


def _loss_scaler(engine: Any) -> Any:
    """Where DeepSpeed keeps fp16's loss scale: with the optimiser's config at stage 0, else in a scaler."""
    if not engine.fp16_enabled():
        return None
    optimizer = engine.optimizer
    return getattr(optimizer, "loss_scale_config", None) or optimizer.loss_scaler


def _whole(engine: Any) -> dict[Any, torch.Tensor] | None:
    """At stage 0, by parameter the float32 tensor that AdamW moves: itself, or its master copy. Else None."""
    if engine.zero_optimization_stage():
        return None
    if isinstance(engine.optimizer, torch.optim.Optimizer):
        return {parameter: parameter for _, parameter in _parameters(engine)}
    halves, masters = engine.optimizer.fp16_groups, engine.optimizer.fp32_groups  # bf16 too, by these names
    return {
        p: m for group, kept in zip(halves, masters, strict=True) for p, m in zip(group, kept, strict=True)
    }


def _torch_optimizer(engine: Any) -> Any:
    plain = isinstance(engine.optimizer, torch.optim.Optimizer)
    return engine.optimizer if plain else engine.optimizer.optimizer


def _parameters(engine: Any) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
