"""Cross-entropy over the items of a catalogue whose scores are never all in memory."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.autograd.function import once_differentiable

CHUNK_SCORES = 1 << 20  # scores made at once: they stay in the processor's cache


def item_cross_entropy(
    states: torch.Tensor,
    own: torch.Tensor,
    *,
    weight: torch.Tensor,
    bias: torch.Tensor,
    log_weight: torch.Tensor | None,
    place: torch.Tensor,
    there: torch.Tensor,
) -> torch.Tensor:
    """Cross-entropy of the softmax over items, summed over the places asked about.

    The partition function is exp(own) + Σ weight · exp(scores of the candidates other than the target): exact
    where the candidates are the whole pool (each stands for itself), an unbiased estimate where they are a
    uniform sample of it.

    Args:
        states: [M, D].
        own: float32 [M], scores of the targets.
        weight: [C, D], output vectors of the candidates.
        bias: [C], theirs.
        log_weight: float32 [C], log of the number of items each candidate stands for; None: one each.
        place: int64 [M], the target's place among the candidates, where it is there.
        there: bool [M], whether it is.

    Returns:
        float32 scalar.
    """
    loss = _CrossEntropy.apply(states, own, weight, bias, log_weight, place, there)  # type: ignore[no-untyped-call]
    return cast(torch.Tensor, loss)


class _CrossEntropy(torch.autograd.Function):
    """The loss and, in the same pass, its gradients: a chunk's scores become their own gradient in place.

    Automatic differentiation would keep [M, C] scores and go over them a dozen times.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        own: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        log_weight: torch.Tensor | None,
        place: torch.Tensor,
        there: torch.Tensor,
    ) -> torch.Tensor:
        """Arguments as of `item_cross_entropy`."""
        shift = bias.float() if log_weight is None else bias.float() + log_weight
        loss = torch.zeros((), dtype=torch.float32, device=states.device)
        to_states, to_own = torch.empty_like(states), torch.empty_like(own)
        to_weight = torch.zeros_like(weight, dtype=torch.float32)
        to_bias = torch.zeros_like(bias, dtype=torch.float32)
        step = max(CHUNK_SCORES // max(len(weight), 1), 1)
        for begin in range(0, len(states), step):
            part = slice(begin, begin + step)
            mine = own[part]
            scores = (states[part] @ weight.t()).float().add_(shift)  # [m, C]
            row = torch.arange(len(mine), device=mine.device)
            scores[row, place[part]] = scores[row, place[part]].masked_fill(there[part], -torch.inf)
            peak = torch.maximum(scores.amax(1), mine)
            shares = scores.sub_(peak[:, None]).exp_()
            own_share = (mine - peak).exp()
            total = shares.sum(1) + own_share
            loss += (peak + total.log() - mine).sum()
            shares.mul_((1 / total)[:, None])
            small = shares.to(weight.dtype)
            to_states[part] = small @ weight
            to_weight += small.t() @ states[part]
            to_bias += shares.sum(0)
            to_own[part] = own_share / total - 1
        ctx.save_for_backward(to_states, to_own, to_weight.to(weight.dtype), to_bias.to(bias.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """What the forward pass found, scaled."""
        found = (saved * gradient.to(saved.dtype) for saved in ctx.saved_tensors)
        return (*found, None, None, None)
