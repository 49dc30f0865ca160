"""What pretraining and fine-tuning ask of the encoder: batches, masks and the loss, for `engine.train`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from qbrec.config.stages import MaskConfig
from qbrec.engine.candidates import Candidates
from qbrec.sequence.encoder import SequenceEncoder
from qbrec.sequence.masks import draw_masks, prefix_lengths
from qbrec.sequence.objective import item_loss, level_loss
from qbrec.sequence.packing import HiddenCodes, PackedHistories, PackedRows, pack
from qbrec.storage.block_reader import Fields
from qbrec.storage.ragged import Ragged


@dataclass(frozen=True)
class HistoryCollate:
    """Packs the *training part* of histories: validation and test items are cut off first.

    Attributes:
        max_items: Longest history kept, the item to predict included.
        seed: Seed of the random stream.
        prefix: Share of the histories that are cut at a random item, so that every item is the last one at
            times.
    """

    max_items: int
    seed: int
    prefix: float

    def __call__(self, fields: Fields, samples: NDArray[np.int64], epoch: int) -> PackedRows:
        """Pack histories.

        Args:
            fields: `HISTORY_FIELDS` of b histories.
            samples: int64 [b], global sample ids.
            epoch: Epoch of the batch.
        """
        histories, cut, domain = fields["row"], fields["cut"], fields["domain"]
        assert isinstance(histories, Ragged)
        assert isinstance(cut, np.ndarray)
        assert isinstance(domain, np.ndarray)
        histories = histories.prefix(cut[:, 0].astype(np.int64))
        if self.prefix > 0:
            lengths = prefix_lengths(
                torch.from_numpy(histories.lengths),
                torch.from_numpy(samples),
                seed=self.seed,
                epoch=epoch,
                probability=self.prefix,
            )
            histories = histories.prefix(lengths.numpy())
        histories = histories.last(self.max_items)
        return pack(histories, domains=domain.astype(np.int64), samples=samples, epoch=epoch)[0]


@dataclass(frozen=True)
class MaskedBatch:
    """A prepared micro-batch.

    Attributes:
        histories: What is read.
        hidden: What is hidden of it.
        whole: int64 [M], the items all of whose codes are hidden.
        epoch: Its epoch.
    """

    histories: PackedHistories
    hidden: HiddenCodes
    whole: torch.Tensor
    epoch: int


class MaskedTask:
    """Predict hidden codes and hidden items (`engine.Task`). Pretraining and fine-tuning differ in masks.

    Args:
        module: The encoder.
        semantic_ids: Codes of all items, any integer type [N, L].
        masks: Mixture and shape of the masks.
        seed: Seed of the random stream.
        candidates: Items that a wholly hidden item is told from.
        item_weight: Of the loss over items against the loss over levels; 0: levels only.
        label_smoothing: Share of a code's target spread over the other codes of the level.
    """

    def __init__(
        self,
        module: SequenceEncoder,
        *,
        semantic_ids: NDArray[Any],
        masks: MaskConfig,
        seed: int,
        candidates: Candidates,
        item_weight: float = 1.0,
        label_smoothing: float = 0.0,
    ) -> None:
        self.module: nn.Module = module
        self.num_levels = module.vocabulary.num_levels
        self.masks, self.seed, self.label_smoothing = masks, seed, label_smoothing
        self.candidates, self.item_weight = candidates, item_weight
        self._table = id_table(semantic_ids)

    def prepare(self, batch: PackedRows, device: torch.device) -> tuple[MaskedBatch, torch.Tensor]:
        """Gather the codes and draw the masks on the device.

        Returns:
            The prepared batch, and the number of hidden codes (float32 scalar).
        """
        if self._table.device != device:
            self._table = self._table.to(device)
        histories = batch.to(device, self._table)
        mask = draw_masks(
            histories.lengths,
            histories.samples,
            self.masks,
            num_levels=self.num_levels,
            seed=self.seed,
            epoch=batch.epoch,
        )
        whole = mask.all(1).nonzero()[:, 0]
        prepared = MaskedBatch(histories, HiddenCodes.find(mask), whole, batch.epoch)
        return prepared, mask.sum().to(torch.float32)

    def loss(self, module: nn.Module, batch: MaskedBatch) -> torch.Tensor:
        """Loss over levels plus `item_weight` × loss over items, summed over hidden codes."""
        logits = module(batch.histories, batch.hidden)
        codes = batch.histories.codes
        targets = [codes[:, level][items] for level, items in enumerate(batch.hidden.items)]
        total = level_loss(logits, targets, label_smoothing=self.label_smoothing)
        if self.item_weight > 0:
            # A hidden item counts as its L codes do, so that the weight means the same for any L.
            total = total + self.item_weight * self.num_levels * self._item_loss(logits, batch)
        return total

    def _item_loss(self, logits: list[torch.Tensor], batch: MaskedBatch) -> torch.Tensor:
        histories, whole = batch.histories, batch.whole
        # An item's place among those whose code of a level is hidden.
        rank = batch.hidden.mask.cumsum(0) - 1  # [S, L]
        rows, log_weight = self.candidates.draw(histories.samples, epoch=batch.epoch)
        return item_loss(
            [scores[rank[whole, level]] for level, scores in enumerate(logits)],
            target_codes=histories.codes[whole],
            target_rows=histories.rows[whole],
            candidate_codes=self._table[rows].to(torch.int64),
            candidate_rows=rows,
            log_weight=log_weight,
        )


def id_table(semantic_ids: NDArray[Any]) -> torch.Tensor:
    """Semantic IDs as a tensor: unsigned of one or two bytes where they fit, else int32; [N, L]."""
    small = semantic_ids.dtype in (np.uint8, np.uint16)
    return torch.from_numpy(np.array(semantic_ids, dtype=semantic_ids.dtype if small else np.int32))
