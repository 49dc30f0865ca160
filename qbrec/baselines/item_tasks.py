"""What SASRec and BERT4Rec learn: the next item at every place, and hidden items (`engine.Task`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from qbrec.baselines.item_batch import ItemBatch, cloze_mask
from qbrec.baselines.item_encoder import ItemEncoder, Question
from qbrec.config.stages import Bert4RecConfig
from qbrec.engine.candidates import Candidates


@dataclass
class ItemTask:
    """Predict items of packed histories.

    Attributes:
        module: The encoder.
        candidates: Items that the right one is told from, by number.
        seed: Seed of the random stream.
        cloze: How items are hidden; None: nothing is, each place of a batch asks for its target.
    """

    module: nn.Module
    candidates: Candidates
    seed: int
    cloze: Bert4RecConfig | None = None

    @classmethod
    def of(cls, module: ItemEncoder, *, candidates: Candidates, seed: int) -> ItemTask:
        """The task of an encoder: SASRec's where it is causal, else BERT4Rec's."""
        cloze = module.config if isinstance(module.config, Bert4RecConfig) else None
        return cls(module, candidates, seed, cloze)

    def prepare(
        self, batch: ItemBatch, device: torch.device
    ) -> tuple[tuple[ItemBatch, Question], torch.Tensor]:
        """Move the batch to the device and draw there what is hidden.

        Returns:
            Batch and question, and the number of places asked about (float32 scalar).
        """
        batch = batch.to(device)
        if self.cloze is None:
            hidden, places = None, torch.arange(len(batch.items), device=device)
        else:
            hidden = cloze_mask(batch, ratio=self.cloze.mask_ratio, tail=self.cloze.tail, seed=self.seed)
            places = hidden.nonzero()[:, 0]
        rows, log_weight = self.candidates.draw(batch.samples, epoch=batch.epoch)
        question = Question(places, hidden, rows, log_weight)
        return (batch, question), torch.tensor(float(len(places)), device=device)

    def loss(self, module: nn.Module, batch: tuple[ItemBatch, Question]) -> torch.Tensor:
        """Cross-entropy summed over the places asked about."""
        loss: torch.Tensor = module(*batch)
        return loss
