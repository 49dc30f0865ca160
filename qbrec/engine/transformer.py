"""Transformer blocks over packed sequences, without a single padded token.

Sequences are sorted by length, so that those of equal length form one contiguous slice, a *group*. Everything
but attention works token by token on the flat array; attention views each group as [sequences, tokens, …],
which needs neither padding nor a mask nor a copy.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

ATTENTION_GAIN = 0.5  # share of what a token collects that is added to it, at the start


def length_groups(lengths: NDArray[np.int64]) -> tuple[NDArray[np.int64], tuple[tuple[int, int], ...]]:
    """How sequences are laid side by side.

    Args:
        lengths: int64 [B].

    Returns:
        The order that sorts them by length, int64 [B], and (number of sequences, length) of every group.
    """
    order = np.argsort(lengths, kind="stable")
    values, counts = np.unique(lengths, return_counts=True)
    return order, tuple((int(count), int(value)) for value, count in zip(values, counts, strict=True))


class Dropout(nn.Module):
    """Dropout whose random bits are drawn four elements at a time on a CPU.

    `torch.dropout` takes as long there as three products with a square matrix (width 256). The share dropped
    is rounded to a multiple of 2^-16, and what is kept is scaled by exactly that.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x, a share of its elements set to 0 and the others scaled, while training."""
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return functional.dropout(x, self.share, self.training)
        dropped = min(round(self.share * 2**16), 2**16 - 1)
        if not self.training or not dropped:
            return x
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        bits = words.view(torch.int16)[: x.numel()].view(x.shape)  # uniform in -2^15 … 2^15 - 1
        return x * (bits >= dropped - 2**15).to(x.dtype).mul_(2**16 / (2**16 - dropped))


class Block(nn.Module):
    """Pre-norm transformer block over a packed array of sequences.

    Args:
        width: D.
        heads: Attention heads.
        dropout: Share dropped of what attention and feed-forward add.
        causal: Whether a token attends to itself and earlier ones only.
    """

    def __init__(self, width: int, *, heads: int, dropout: float, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_output = nn.Linear(width, width)
        self.feed_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.dropout = Dropout(dropout)

    @torch.no_grad()
    def start_as_mean(self, *, depth: int) -> None:
        """Make values and attention output (scaled) identities, on top of an ordinary initialisation.

        A token then begins by collecting what its sequence is, rather than noise; what feed-forward layers
        add is shrunk by the number of blocks, `depth`.
        """
        nn.init.eye_(self.qkv.weight[2 * self.attention_output.in_features :])
        nn.init.eye_(self.attention_output.weight).mul_(ATTENTION_GAIN)
        self.down.weight.mul_((2 * depth) ** -0.5)

    def forward(
        self,
        x: torch.Tensor,
        groups: tuple[tuple[int, int], ...],
        rotation: tuple[torch.Tensor, torch.Tensor] | None,
        keep: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One block.

        Args:
            x: float [num_tokens, D].
            groups: (sequences, tokens in each), covering `x` in order.
            rotation: Rotary cosine and sine [num_tokens, head width / 2], or None.
            keep: int64 [M], the tokens that are read afterwards; None: all.

        Returns:
            float [num_tokens or M, D].
        """
        mixed = self._attend(self.qkv(self.attention_norm(x)), groups, rotation)
        if keep is not None:
            x, mixed = x[keep], mixed[keep]
        x = x + self.dropout(self.attention_output(mixed))
        fed = self.down(functional.gelu(self.up(self.feed_norm(x)), approximate="tanh"))
        out: torch.Tensor = x + self.dropout(fed)
        return out

    def _attend(
        self,
        qkv: torch.Tensor,
        groups: tuple[tuple[int, int], ...],
        rotation: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        """[num_tokens, D] from [num_tokens, 3D]: a token attends to the tokens of its own sequence."""
        width = qkv.shape[-1] // 3
        qkv = qkv.view(len(qkv), 3, self.heads, width // self.heads)
        if rotation is not None:
            query, key, value = qkv.unbind(1)
            qkv = torch.stack((_rotate(query, *rotation), _rotate(key, *rotation), value), 1)
        mixed = []
        for (count, tokens), part in zip(groups, qkv.split([c * t for c, t in groups]), strict=True):
            query, key, value = part.view(count, tokens, *part.shape[1:]).permute(2, 0, 3, 1, 4)
            # Each [count, heads, tokens, D / heads].
            out = functional.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
            mixed.append(out.transpose(1, 2).reshape(count * tokens, width))
        return torch.cat(mixed)


def _rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotates pairs of channels of x [num_tokens, heads, channels]."""
    first, second = x.chunk(2, -1)
    cosine, sine = cosine[:, None].to(x.dtype), sine[:, None].to(x.dtype)
    return torch.cat((first * cosine - second * sine, first * sine + second * cosine), -1)
