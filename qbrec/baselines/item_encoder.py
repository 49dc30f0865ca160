"""A transformer over item numbers: SASRec where it is causal, BERT4Rec where it is not.

SASRec (Kang & McAuley 2018, arXiv 1808.09781): each place predicts the next item. BERT4Rec (Sun et al. 2019,
arXiv 1904.06690): hidden items are predicted from both sides; at the end of a history stands one more hidden
item, the recommendation. Both are trained with the softmax over all items, not with sampled negatives:
trained so to convergence they are much stronger than as first published (Klenitskiy & Vasilev 2023,
arXiv 2309.07602). Here both have pre-norm blocks and tied output weights with a bias. BERT4Rec's further
layer before the output is left out: the run without it learnt about twice as fast (Amazon Scientific, one
seed, mask ratio .3 against .2 and .6).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from qbrec.baselines.item_batch import ItemBatch
from qbrec.baselines.softmax import item_cross_entropy
from qbrec.config.stages import ItemEncoderConfig
from qbrec.engine.transformer import Block, Dropout

EMBEDDING_STD = 0.02


@dataclass(frozen=True)
class Question:
    """What is asked of a batch, and what the answers are told from.

    Attributes:
        places: int64 [M], places of the batch that are asked about.
        hidden: bool [S], items that must not be read; None: all are read.
        candidates: int64 [C], item numbers, ascending.
        log_weight: float32 [C], see `engine.candidates.Candidates.draw`.
    """

    places: torch.Tensor
    hidden: torch.Tensor | None
    candidates: torch.Tensor
    log_weight: torch.Tensor | None


class ItemEncoder(nn.Module):
    """Predicts items from the items around them.

    Positions count from the end of the history, so that the most recent item always has the same one.

    Args:
        config: Width, layers, heads, dropout, longest history.
        num_items: n, items of the domain.
        causal: A place sees itself and earlier ones only (SASRec); otherwise all, and the item number n
            stands for a hidden one (BERT4Rec).
    """

    def __init__(self, config: ItemEncoderConfig, *, num_items: int, causal: bool) -> None:
        super().__init__()
        self.config, self.num_items, self.causal = config, num_items, causal
        width = config.width
        self.items = nn.Embedding(num_items + (not causal), width)
        # BERT4Rec's hidden item takes a place of its own after H others.
        self.positions = nn.Embedding(config.max_items + (not causal), width)
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            Block(width, heads=config.heads, dropout=config.dropout, causal=causal)
            for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(width)
        self.bias = nn.Parameter(torch.zeros(num_items))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Embeddings small, since what is left of a larger start is noise in the score of a rare item.

        Blocks begin as a mean of the history, so that training starts at once; matrices are Xavier else.
        """
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=EMBEDDING_STD)
            elif isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for block in self.blocks:
            assert isinstance(block, Block)
            block.start_as_mean(depth=len(self.blocks))

    def forward(self, batch: ItemBatch, question: Question) -> torch.Tensor:
        """Cross-entropy over the candidates, summed over the places asked about; float32 scalar.

        The loss is made in here because ZeRO-3 lends parameters to their module's forward pass only.
        """
        states = self.states(batch, question.places, hidden=question.hidden)
        targets, candidates = batch.targets[question.places], question.candidates
        place = torch.searchsorted(candidates, targets).clamp(max=len(candidates) - 1)
        weight = self.items.weight
        return item_cross_entropy(
            states,
            (states.float() * weight[targets].float()).sum(1) + self.bias[targets].float(),
            weight=weight[candidates],
            bias=self.bias[candidates],
            log_weight=question.log_weight,
            place=place,
            there=candidates[place] == targets,
        )

    def states(
        self, batch: ItemBatch, places: torch.Tensor, *, hidden: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What is compared with the items' vectors, [M, D].

        Args:
            batch: Packed histories.
            places: int64 [M].
            hidden: bool [S], items that must not be read (BERT4Rec only).
        """
        items = batch.items
        if hidden is not None:
            items = items.masked_fill(hidden, self.num_items)
        x = self.dropout(self.items(items) + self.positions(batch.age))
        for block in self.blocks[:-1]:
            x = block(x, batch.groups, None)
        # Nothing reads the last layer anywhere but at these places.
        x = self.blocks[-1](x, batch.groups, None, places)
        out: torch.Tensor = self.norm(x)
        return out

    def scores(self, states: torch.Tensor) -> torch.Tensor:
        """Scores of all items of the domain, float32 [M, n], from states [M, D]."""
        return torch.addmm(self.bias, states, self.items.weight[: self.num_items].t()).float()
