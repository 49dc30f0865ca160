"""Packed micro-batches: histories of different lengths side by side without a single padded token.

Histories are sorted by length, so that those of equal length form one contiguous slice, a *group*. Everything but attention works token by
token on the flat array; attention views each group as [sequences, tokens, …], which needs neither padding nor a mask nor a copy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class PackedHistories:
    """Histories of one micro-batch, sorted by length.

    Attributes:
        codes: int64 [S, L], codes of all items, S = Σ lengths.
        lengths: int64 [B], ascending, on the device.
        domains: int64 [B], domain index.
        samples: int64 [B], global sample ids (keys of the random stream).
        groups: (number of histories, items in each) of every group, in the order of the histories.
    """

    codes: torch.Tensor
    lengths: torch.Tensor
    domains: torch.Tensor
    samples: torch.Tensor
    groups: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return len(self.lengths)

    def to(self, device: torch.device | str) -> PackedHistories:
        """The same batch on `device`."""
        return PackedHistories(
            codes=self.codes.to(device, non_blocking=True),
            lengths=self.lengths.to(device, non_blocking=True),
            domains=self.domains.to(device, non_blocking=True),
            samples=self.samples.to(device, non_blocking=True),
            groups=self.groups,
        )


def length_order(lengths: np.ndarray) -> np.ndarray:
    """int64 [B]: the order that sorts histories by length; ties keep their place."""
    return np.argsort(lengths, kind="stable")


def length_groups(lengths: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Groups of equal length of ascending `lengths` int64 [B]."""
    values, counts = np.unique(lengths, return_counts=True)
    return tuple((int(count), int(value)) for value, count in zip(values, counts, strict=True))


@dataclass(frozen=True)
class TokenLayout:
    """Where every token of a packed batch lies. Each sequence is its domain token, then L tokens per item.

    Attributes:
        item_tokens: int64 [S, L], flat token position of every code.
        domain_tokens: int64 [B], flat token position of every domain token.
        age: int64 [S], item position counted from the end: 0 is the last item.
        num_tokens: Length of the flat array, B + S·L.
    """

    item_tokens: torch.Tensor
    domain_tokens: torch.Tensor
    age: torch.Tensor
    num_tokens: int


def token_layout(lengths: torch.Tensor, *, num_items: int, num_levels: int) -> TokenLayout:
    """Layout of histories of `lengths` int64 [B] whose sum is `num_items`."""
    device = lengths.device
    batch = torch.arange(len(lengths), device=device)
    owner = torch.repeat_interleave(batch, lengths, output_size=num_items)  # [S]
    ends = torch.cumsum(lengths, 0)  # [B]
    place = torch.arange(num_items, device=device)  # [S]
    level = torch.arange(num_levels, device=device)
    # Before an item's first token stand one domain token per sequence up to its own, and L tokens per earlier item.
    item_tokens = (place * num_levels + owner + 1)[:, None] + level
    domain_tokens = (ends - lengths) * num_levels + batch
    return TokenLayout(
        item_tokens=item_tokens,
        domain_tokens=domain_tokens,
        age=ends[owner] - 1 - place,
        num_tokens=len(lengths) + num_items * num_levels,
    )
