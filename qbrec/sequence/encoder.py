"""The masked encoder: a pre-norm BERT over semantic IDs, unpadded, with one output range per level."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from qbrec.config.stages import SequenceConfig
from qbrec.engine.transformer import Block, Dropout
from qbrec.sequence.packing import HiddenCodes, PackedHistories, TokenLayout, token_layout
from qbrec.sequence.vocabulary import Vocabulary

EMBEDDING_STD = 0.1
ITEM_CODE_STD = 0.02


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
        for block in self.blocks:
            assert isinstance(block, Block)
            block.start_as_mean(depth=len(self.blocks))
        for linear in (self.item_projection, self.head[1]):
            assert isinstance(linear, nn.Linear)
            nn.init.eye_(linear.weight)

    @torch.no_grad()
    def start_small(self, level: int) -> None:
        """Begin with hardly anything at a level whose codes mean nothing of themselves (`item_codes`)."""
        first, end = self.vocabulary.starts[level : level + 2]
        self.tokens.weight[first:end].mul_(ITEM_CODE_STD / EMBEDDING_STD)

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
