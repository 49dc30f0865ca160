"""Multi-view symmetric InfoNCE over one group of items, absent views masked, equal content no negative."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qbrec.fusion.model import BEHAVIOUR, ModalitySpec

FUSED = -1  # index of the fused vector in a pair of views

Pair = tuple[int, int]


def view_pairs(modalities: Sequence[ModalitySpec]) -> tuple[Pair, ...]:
    """The pairs of views that are contrasted: fused with every modality, dense modalities with each other.

    A pair holds indices of modalities, or `FUSED`. Structure takes no part in pairs without `FUSED`: its
    table is learnt, and a table row that only has to please the text view memorises it.
    """
    dense = [i for i, spec in enumerate(modalities) if spec.kind == "dense"]
    fused = [(FUSED, i) for i in range(len(modalities))]
    return (*fused, *((a, b) for n, a in enumerate(dense) for b in dense[n + 1 :]))


def pair_weights(
    modalities: Sequence[ModalitySpec], pairs: Sequence[Pair], *, behaviour: float, cross: float
) -> tuple[float, ...]:
    """Weight of each pair in the loss.

    Args:
        modalities: The model's.
        pairs: Of `view_pairs`.
        behaviour: Of fused↔behaviour, against 1 for fused↔text, fused↔image and so on.
        cross: Of two modalities with each other.
    """
    weights = []
    for left, right in pairs:
        if left != FUSED:
            weights.append(cross)
        else:
            weights.append(behaviour if modalities[right].name == BEHAVIOUR else 1.0)
    return tuple(weights)


def count_anchors(present: Tensor, *, pairs: Sequence[Pair], weights: Sequence[float]) -> Tensor:
    """Weighted number of anchors (items with both views, over all pairs) in a group; float scalar.

    Args:
        present: bool [B, M].
        pairs: Of `view_pairs`.
        weights: Weight of each pair.
    """
    total = torch.zeros((), dtype=torch.float32, device=present.device)
    for pair, weight in zip(pairs, weights, strict=True):
        total = total + weight * _valid(present, pair).sum()
    return total


def multi_view_loss(
    fused: Tensor,
    views: Tensor,
    *,
    present: Tensor,
    content: Tensor,
    pairs: Sequence[Pair],
    weights: Sequence[float],
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Sum over anchors of the symmetric InfoNCE of all pairs of views inside one group.

    A group is never split over ranks or micro-batches, so the sum (and its gradient) over the groups of a
    batch does not depend on world size.

    Args:
        fused: [B, D].
        views: [M, B, D].
        present: bool [B, M].
        content: int64 [B, M]; two items with the same number have the same content in that view and are not
            each other's negatives in any pair with that view.
        pairs: Of `view_pairs`.
        weights: Weight of each pair.
        temperature: τ of the loss.

    Returns:
        Weighted sum over all pairs and anchors (float32 scalar; mean of both directions per anchor), and the
        unweighted sums per pair [P], detached. Divide by `count_anchors`.
    """
    unit = [F.normalize(view.float(), dim=-1) for view in (*views, fused)]
    sums = []
    for left, right in pairs:
        valid = _valid(present, (left, right))
        logits = unit[left] @ unit[right].T / temperature
        same = torch.zeros_like(logits, dtype=torch.bool)
        for view in (left, right):
            if view != FUSED:
                same |= content[:, None, view] == content[None, :, view]
        same.fill_diagonal_(False)
        logits = logits.masked_fill(same, float("-inf"))
        own = logits.diagonal()
        # The item's own column stays finite even where it is absent itself, so no row is ever empty.
        apart = ~torch.eye(len(own), dtype=torch.bool, device=own.device)
        forward = torch.logsumexp(logits.masked_fill(~valid[None, :] & apart, float("-inf")), dim=1) - own
        backward = torch.logsumexp(logits.masked_fill(~valid[:, None] & apart, float("-inf")), dim=0) - own
        sums.append(torch.where(valid, (forward + backward) / 2, torch.zeros_like(own)).sum())
    per_pair = torch.stack(sums)
    return per_pair @ torch.tensor(weights, device=per_pair.device), per_pair.detach()


def _valid(present: Tensor, pair: Pair) -> Tensor:
    valid = torch.ones_like(present[:, 0])
    for view in pair:
        if view != FUSED:
            valid = valid & present[:, view]
    return valid
