"""The masked encoder: a pre-norm BERT over semantic IDs, unpadded, with one output range per level."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from qbrec.config.stages import SequenceConfig
from qbrec.sequence.packing import HiddenCodes, PackedHistories, TokenLayout, token_layout
from qbrec.sequence.vocabulary import Vocabulary

EMBEDDING_STD = 0.1
ATTENTION_GAIN = 0.5  # share of what a token collects that is added to it, at the start


class SequenceEncoder(nn.Module):
    """Predicts the hidden codes of histories.

    Token = code (or mask) embedding + position of its item + level + mean embedding of the item's visible
    codes. Positions count from the end of the history, so that the most recent item always has the same one.
    Output weights are the code embeddings (tied), and a hidden code is compared with the codes of its own
    level only.

    Args:
        config: Width, layers, heads, dropout, longest history, kind of positions.
        vocabulary: Levels and domains.
    """

    def __init__(self, config: SequenceConfig, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.config, self.vocabulary = config, vocabulary
        width = config.width
        self.tokens = nn.Embedding(vocabulary.size, width)
        self.level_embedding = nn.Embedding(vocabulary.num_levels, width)
        # A history of H items plus the item that is to be predicted.
        self.num_positions = config.max_items + 1
        if config.position == "learned":
            self.positions = nn.Embedding(self.num_positions, width)
        self.item_projection = nn.Linear(width, width, bias=False)
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            Block(width, heads=config.heads, dropout=config.dropout) for _ in range(config.layers)
        )
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.LayerNorm(width))
        self.code_bias = nn.Parameter(torch.zeros(vocabulary.starts[-1]))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start as a recommender of what is like the history, rather than as noise.

        Values, attention outputs, item projection and head begin as (scaled) identities: a hidden token then
        collects the embeddings of its history and is compared with the codes as they are. With
        embeddings from the codebooks it reaches in two epochs what Xavier matrices need twelve for (Amazon
        Scientific), and ends higher. The rest is Xavier, feed-forward outputs
        shrunk by depth; embeddings are normal.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=EMBEDDING_STD)
        width = self.config.width
        for block in self.blocks:
            assert isinstance(block, Block)
            nn.init.eye_(block.qkv.weight[2 * width :])
            nn.init.eye_(block.attention_output.weight).mul_(ATTENTION_GAIN)
            block.down.weight.mul_((2 * len(self.blocks)) ** -0.5)
        for linear in (self.item_projection, self.head[1]):
            assert isinstance(linear, nn.Linear)
            nn.init.eye_(linear.weight)

    @torch.no_grad()
    def start_from_codebooks(self, codebooks: Sequence[torch.Tensor | None], *, first_level: int = 0) -> None:
        """Give the code embeddings the geometry of the quantizer's codebooks, so that like codes start alike.

        The codebooks are projected on their common principal directions and rotated at random (heads read
        slices of the width); every level is scaled to the standard deviation of the embeddings it replaces.
        Call it once for each space that codebooks live in: the semantic ID's, each single modality's.

        Args:
            codebooks: Per level of one space float [K, D']. A level without one (None), and codes beyond K
                (that of items without the modality), keep their random start.
            first_level: Level of the first of them.
        """
        vocabulary, width = self.vocabulary, self.config.width
        placed = [(first_level + i, book) for i, book in enumerate(codebooks) if book is not None]
        assert placed, "a space without a codebook"
        assert all(len(book) <= vocabulary.levels[level] for level, book in placed)
        stacked = torch.cat([codebook.double() for _, codebook in placed])
        _, _, directions = torch.linalg.svd(stacked, full_matrices=False)
        directions = directions[:width]  # [min(width, D'), D']
        rotation, _ = torch.linalg.qr(torch.randn(width, len(directions), dtype=torch.float64))
        for level, codebook in placed:
            projected = codebook.double() @ directions.T @ rotation.T  # [K_l, width]
            spread = projected.square().mean().sqrt().clamp(min=1e-12)
            first = vocabulary.starts[level]
            self.tokens.weight[first : first + len(codebook)] = (projected * (EMBEDDING_STD / spread)).to(
                self.tokens.weight.dtype
            )

    def forward(self, batch: PackedHistories, hidden: HiddenCodes) -> list[torch.Tensor]:
        """Scores of the codes of every hidden token.

        Args:
            batch: Packed histories.
            hidden: Which codes must be predicted; their values in `batch.codes` are not read.

        Returns:
            Per level float32 [M_l, K_l], in the order of `hidden.items[l]`.
        """
        layout = token_layout(
            batch.lengths, num_items=len(batch.codes), num_levels=self.vocabulary.num_levels
        )
        wanted = [layout.item_tokens[:, level][items] for level, items in enumerate(hidden.items)]
        x = self._embed(batch, hidden.mask, layout)
        rotation = self._rotation(layout)
        groups = tuple((count, 1 + items * self.vocabulary.num_levels) for count, items in batch.groups)
        for block in self.blocks[:-1]:
            x = block(x, groups, rotation)
        # Nothing reads the last layer anywhere but at the hidden tokens.
        x = self.head(self.blocks[-1](x, groups, rotation, torch.cat(wanted)))
        return self._logits(x, [len(places) for places in wanted])

    def _embed(self, batch: PackedHistories, hidden: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        """Input of the first block, [num_tokens, D]."""
        vocabulary = self.vocabulary
        ids = torch.where(hidden, vocabulary.mask, vocabulary.tokens(batch.codes))  # [S, L]
        codes = self.tokens(ids)  # [S, L, D]
        visible = (~hidden).to(codes.dtype)[..., None]
        item = self.item_projection((codes * visible).sum(1) / visible.sum(1).clamp(min=1))  # [S, D]
        if self.config.position == "learned":
            item = item + self.positions(layout.age)
        content = codes + item[:, None] + self.level_embedding.weight
        domains = self.tokens(vocabulary.domain_tokens(batch.domains))  # [B, D]
        x = content.new_empty(layout.num_tokens, content.shape[-1])
        x = x.index_copy(0, layout.item_tokens.reshape(-1), content.reshape(-1, content.shape[-1]))
        x = x.index_copy(0, layout.domain_tokens, domains.to(x.dtype))
        out: torch.Tensor = self.dropout(x)
        return out

    def _rotation(self, layout: TokenLayout) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Cosine and sine [num_tokens, head width / 2] of rotary positions (Su et al. 2021), or None."""
        if self.config.position == "learned":
            return None
        half = self.config.width // self.config.heads // 2
        frequency = 10_000.0 ** (-torch.arange(half, device=layout.age.device, dtype=torch.float32) / half)
        place = torch.zeros(layout.num_tokens, device=layout.age.device)
        place[layout.item_tokens] = -layout.age.to(torch.float32)[:, None]
        angle = place[:, None] * frequency
        return angle.cos(), angle.sin()

    def _logits(self, x: torch.Tensor, counts: list[int]) -> list[torch.Tensor]:
        """Per level float32 [M_l, K_l] from head outputs [ΣM_l, D]."""
        levels = self.vocabulary.levels
        first, last = self.vocabulary.starts[0], self.vocabulary.starts[-1]
        weights = self.tokens.weight[first:last].split(levels)
        biases = self.code_bias[first:].split(levels)
        return [
            functional.linear(rows, weight, bias).float()
            for rows, weight, bias in zip(x.split(counts), weights, biases, strict=True)
        ]


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
    """Pre-norm transformer block over a packed array of sequences."""

    def __init__(self, width: int, *, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_output = nn.Linear(width, width)
        self.feed_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.dropout = Dropout(dropout)

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
            out = functional.scaled_dot_product_attention(query, key, value)
            mixed.append(out.transpose(1, 2).reshape(count * tokens, width))
        return torch.cat(mixed)


def _rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotates pairs of channels of x [num_tokens, heads, channels]."""
    first, second = x.chunk(2, -1)
    cosine, sine = cosine[:, None].to(x.dtype), sine[:, None].to(x.dtype)
    return torch.cat((first * cosine - second * sine, first * sine + second * cosine), -1)
