"""Multi-view symmetric InfoNCE over one group of items, absent views masked, equal content no negative."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class GroupViews:
    """What the loss reads of the items of a group, or of the part of a group that one rank has.

    Attributes:
        vectors: float [M + 1, B, D], the views and, last, the fused vectors (index `FUSED`).
        present: bool [B, M].
        content: int64 [B, M]; two items with the same number have the same content in that view and are not
            each other's negatives in any pair with that view.
    """

    vectors: Tensor
    present: Tensor
    content: Tensor


def multi_view_loss(
    own: GroupViews,
    group: GroupViews,
    *,
    first: int,
    pairs: Sequence[Pair],
    weights: Sequence[float],
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Sum over this rank's anchors of the symmetric InfoNCE of all pairs of views inside one group.

    Added up over the ranks that share a group it is the loss of the group, so neither it nor its gradient
    depends on how many share it.

    Args:
        own: The anchors, B of them.
        group: All items of the group, the anchors' positives and negatives; may be `own` itself.
        first: Place of the first anchor in the group.
        pairs: Of `view_pairs`.
        weights: Weight of each pair.
        temperature: τ of the loss.

    Returns:
        Weighted sum over all pairs and anchors (float32 scalar; mean of both directions per anchor), and the
        unweighted sums per pair [P], detached. Divide by `count_anchors`.
    """
    alone = group is own
    unit = F.normalize(own.vectors.float(), dim=-1)
    others = unit if alone else F.normalize(group.vectors.float(), dim=-1)
    size = len(own.present)
    places = torch.arange(size, device=unit.device)
    itself = torch.zeros(size, len(group.present), dtype=torch.bool, device=unit.device)
    itself[places, first + places] = True
    sums = []
    for left, right in pairs:
        same = torch.zeros_like(itself)
        for view in (left, right):
            if view != FUSED:
                same |= own.content[:, None, view] == group.content[None, :, view]
        # The item's own column stays finite even where it is absent itself, so no row is ever empty.
        hidden = (same | ~_valid(group.present, (left, right))[None, :]) & ~itself
        logits = unit[left] @ others[right].T / temperature
        reverse = logits.T if alone else unit[right] @ others[left].T / temperature
        both = torch.stack([logits, reverse]).masked_fill(hidden, float("-inf"))
        positive = logits[places, first + places]
        valid = _valid(own.present, (left, right))
        each = torch.logsumexp(both, dim=2).mean(0) - positive
        sums.append(torch.where(valid, each, torch.zeros_like(each)).sum())
    per_pair = torch.stack(sums)
    return per_pair @ torch.tensor(weights, device=per_pair.device), per_pair.detach()


def _valid(present: Tensor, pair: Pair) -> Tensor:
    valid = torch.ones_like(present[:, 0])
    for view in pair:
        if view != FUSED:
            valid = valid & present[:, view]
    return valid
