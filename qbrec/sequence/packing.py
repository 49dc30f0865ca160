"""Packed micro-batches: histories side by side, sorted by length as `engine.transformer` wants them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from qbrec.engine.transformer import length_groups
from qbrec.storage.ragged import Ragged


@dataclass(frozen=True)
class PackedRows:
    """Histories of one micro-batch as item rows on the host, sorted by length: what the loader hands out.

    Attributes:
        rows: int64 [S], item rows of all histories, S = Σ lengths.
        lengths: int64 [B], ascending, at least 1.
        domains: int64 [B], domain index.
        samples: int64 [B], global sample ids (keys of the random stream).
        groups: (number of histories, items in each) of every group, in the order of the histories.
        epoch: Epoch the batch is part of.
    """

    rows: torch.Tensor
    lengths: torch.Tensor
    domains: torch.Tensor
    samples: torch.Tensor
    groups: tuple[tuple[int, int], ...]
    epoch: int

    def to(self, device: torch.device | str, id_table: torch.Tensor) -> PackedHistories:
        """The batch on `device`, its codes gathered there from `id_table` (any integer type [N, L])."""
        rows = self.rows.to(device, non_blocking=True)
        return PackedHistories(
            rows=rows,
            codes=id_table[rows].to(torch.int64),
            lengths=self.lengths.to(device, non_blocking=True),
            domains=self.domains.to(device, non_blocking=True),
            samples=self.samples.to(device, non_blocking=True),
            groups=self.groups,
        )


def pack(
    histories: Ragged, *, domains: NDArray[np.int64], samples: NDArray[np.int64], epoch: int = 0
) -> tuple[PackedRows, NDArray[np.int64]]:
    """Sort histories by length and lay them side by side.

    Args:
        histories: B rows of item rows, each at least one long.
        domains: int64 [B].
        samples: int64 [B], global sample ids.
        epoch: Epoch they are read in.

    Returns:
        The packed batch, and its order int64 [B]: packed history `i` is history `order[i]`.
    """
    order, groups = length_groups(histories.lengths)
    assert not groups or groups[0][1] >= 1, "an empty history has no token to hide"
    histories = histories.take(order)
    packed = PackedRows(
        rows=torch.from_numpy(histories.values.astype(np.int64)),
        lengths=torch.from_numpy(histories.lengths),
        domains=torch.from_numpy(domains[order]),
        samples=torch.from_numpy(samples[order]),
        groups=groups,
        epoch=epoch,
    )
    return packed, order


@dataclass(frozen=True)
class PackedHistories:
    """Histories of one micro-batch as codes on the device, sorted by length.

    Attributes:
        rows: int64 [S], item rows, S = Σ lengths.
        codes: int64 [S, L], their codes.
        lengths: int64 [B], ascending, on the device.
        domains: int64 [B], domain index.
        samples: int64 [B], global sample ids (keys of the random stream).
        groups: (number of histories, items in each) of every group, in the order of the histories.
    """

    rows: torch.Tensor
    codes: torch.Tensor
    lengths: torch.Tensor
    domains: torch.Tensor
    samples: torch.Tensor
    groups: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return len(self.lengths)


@dataclass(frozen=True)
class HiddenCodes:
    """Which codes of a batch are hidden, and where: found once for the encoder and all losses.

    Attributes:
        mask: bool [S, L], True where hidden.
        items: Per level int64 [M_l], the items (places in the batch) whose code of that level is hidden.
    """

    mask: torch.Tensor
    items: tuple[torch.Tensor, ...]

    @classmethod
    def find(cls, mask: torch.Tensor) -> HiddenCodes:
        """From `mask` alone; waits for the device, so this belongs before the first forward of a step."""
        counts: list[int] = mask.sum(0).tolist()
        return cls(mask, mask.t().nonzero()[:, 1].split(counts))


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
    # Before an item's first token stand one domain token per sequence up to its own, and L tokens per earlier
    # item.
    item_tokens = (place * num_levels + owner + 1)[:, None] + level
    domain_tokens = (ends - lengths) * num_levels + batch
    return TokenLayout(
        item_tokens=item_tokens,
        domain_tokens=domain_tokens,
        age=ends[owner] - 1 - place,
        num_tokens=len(lengths) + num_items * num_levels,
    )
