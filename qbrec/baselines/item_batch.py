"""Histories of items packed side by side, and which places of them a model is asked about."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from qbrec.config.stages import Bert4RecConfig
from qbrec.engine.mixing import uniform
from qbrec.engine.transformer import length_groups
from qbrec.storage.block_reader import Fields
from qbrec.storage.ragged import Ragged

# Purposes in the stream of random numbers (`engine.mixing.uniform`).
TAIL, TAIL_PLACE, MASK, FALLBACK = range(4)


@dataclass(frozen=True)
class ItemBatch:
    """Histories of one micro-batch, sorted by length.

    Items are numbered within their domain (see `ItemNumbers`).

    Attributes:
        items: int64 [S], what is read, S = Σ lengths.
        targets: int64 [S], the item that is right at each place.
        lengths: int64 [B], ascending, at least 1.
        samples: int64 [B], global sample ids (keys of the random stream).
        groups: (number of histories, items in each) of every group, in the order of the histories.
        epoch: Epoch the batch is part of.
    """

    items: torch.Tensor
    targets: torch.Tensor
    lengths: torch.Tensor
    samples: torch.Tensor
    groups: tuple[tuple[int, int], ...]
    epoch: int

    def to(self, device: torch.device) -> ItemBatch:
        """The batch on a device."""
        return ItemBatch(
            items=self.items.to(device, non_blocking=True),
            targets=self.targets.to(device, non_blocking=True),
            lengths=self.lengths.to(device, non_blocking=True),
            samples=self.samples.to(device, non_blocking=True),
            groups=self.groups,
            epoch=self.epoch,
        )

    @property
    def age(self) -> torch.Tensor:
        """Place of every item counted from the end of its history, int64 [S]: 0 is the last one."""
        return (self.ends - 1)[self.owner] - torch.arange(len(self.items), device=self.items.device)

    @property
    def owner(self) -> torch.Tensor:
        """History of every item, int64 [S]."""
        batch = torch.arange(len(self.lengths), device=self.lengths.device)
        return torch.repeat_interleave(batch, self.lengths, output_size=len(self.items))

    @property
    def ends(self) -> torch.Tensor:
        """Place after the last item of every history, int64 [B]."""
        return torch.cumsum(self.lengths, 0)


def pack_items(
    histories: Ragged,
    *,
    targets: NDArray[np.int64] | None = None,
    samples: NDArray[np.int64] | None = None,
    epoch: int = 0,
) -> tuple[ItemBatch, NDArray[np.int64]]:
    """Sort histories by length and lay them side by side.

    Args:
        histories: B rows of item numbers, each at least one long.
        targets: int64 [S], in the order of `histories.values`; by default these themselves.
        samples: int64 [B], global sample ids; by default 0 … B - 1.
        epoch: Epoch they are read in.

    Returns:
        The batch, and its order int64 [B]: its history `i` is history `order[i]`.
    """
    order, groups = length_groups(histories.lengths)
    assert not groups or groups[0][1] >= 1, "an empty history has no place to ask about"
    goals = histories.values if targets is None else targets
    packed = histories.take(order)
    keys = np.arange(len(order)) if samples is None else samples
    batch = ItemBatch(
        items=torch.from_numpy(packed.values.astype(np.int64)),
        targets=torch.from_numpy(Ragged(goals, histories.offsets).take(order).values.astype(np.int64)),
        lengths=torch.from_numpy(packed.lengths),
        samples=torch.from_numpy(keys[order]),
        groups=groups,
        epoch=epoch,
    )
    return batch, order


@dataclass(frozen=True)
class ItemNumbers:
    """Numbers of a domain's items from 0: a model has no parameters for items of other domains.

    Attributes:
        rows: Item rows of the domain, int64 [n], ascending.
        num_rows: N, rows of the whole catalogue.
    """

    rows: NDArray[np.int64]
    num_rows: int

    def __len__(self) -> int:
        return len(self.rows)

    def of(self, histories: Ragged) -> Ragged:
        """Histories in these numbers; rows of other domains and rows that do not exist are left out."""
        values = np.asarray(histories.values, np.int64)
        place = np.searchsorted(self.rows, values).clip(max=len(self.rows) - 1)
        return Ragged(place, histories.offsets).where(self.rows[place] == values)


@dataclass(frozen=True)
class ItemCollate:
    """Packs the *training part* of histories: validation and test items are cut off first.

    Attributes:
        numbers: Of the items.
        max_items: H, most items that are read before the one to predict.
        cloze: How items are hidden, each place asking for its own (BERT4Rec); None: each place asks for the
            item after it (SASRec).
        seed: Seed of the random stream.
    """

    numbers: ItemNumbers
    max_items: int
    cloze: Bert4RecConfig | None
    seed: int

    def __call__(self, fields: Fields, samples: NDArray[np.int64], epoch: int) -> ItemBatch:
        """Pack histories.

        Args:
            fields: `engine.history_loader.HISTORY_FIELDS` of b histories whose training part has two items.
            samples: int64 [b], global sample ids.
            epoch: Epoch of the batch.
        """
        rows, cut = fields["row"], fields["cut"]
        assert isinstance(rows, Ragged)
        assert isinstance(cut, np.ndarray)
        histories = self.numbers.of(rows.prefix(cut[:, 0].astype(np.int64)))
        if self.cloze is not None:
            histories = histories.prefix(self._lengths(histories, samples, epoch)).last(self.max_items + 1)
            return pack_items(histories, samples=samples, epoch=epoch)[0]
        histories = histories.last(self.max_items + 1)
        following = np.delete(histories.values, histories.offsets[:-1])
        read = histories.prefix(histories.lengths - 1)
        return pack_items(read, targets=following, samples=samples, epoch=epoch)[0]

    def _lengths(self, histories: Ragged, samples: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        """Where histories end, int64 [b]: tail histories after any item but the first, others as they do."""
        assert self.cloze is not None
        keys, whole = torch.from_numpy(samples), torch.from_numpy(histories.lengths)
        u = uniform(keys, seed=self.seed, epoch=epoch, purpose=TAIL_PLACE)
        cut = whole - (u * (whole - 1)).to(torch.int64)  # 2 … whole, where there are two
        tail = tail_histories(keys, share=self.cloze.tail, seed=self.seed, epoch=epoch)
        return torch.where(tail, cut, whole).numpy()


def tail_histories(samples: torch.Tensor, *, share: float, seed: int, epoch: int) -> torch.Tensor:
    """Which histories are cut at a random item, which alone is hidden, as when recommending; bool [b]."""
    return uniform(samples, seed=seed, epoch=epoch, purpose=TAIL) < share


def cloze_mask(batch: ItemBatch, *, ratio: float, tail: float, seed: int) -> torch.Tensor:
    """Which items of each history are hidden (Sun et al. 2019, section 3.6).

    In `tail_histories` the last item alone; in the others each item with probability `ratio`, and one at
    random where that hides none.

    Args:
        batch: Histories; their sample ids and epoch are the keys of the draw.
        ratio: Probability of an item.
        tail: Share of tail histories.
        seed: Seed of the random stream, the same as that of `ItemCollate`.

    Returns:
        bool [S].
    """
    owner, age = batch.owner, batch.age

    def draw(samples: torch.Tensor, purpose: int, index: torch.Tensor | int = 0) -> torch.Tensor:
        return uniform(samples, seed=seed, epoch=batch.epoch, purpose=purpose, index=index)

    hidden = draw(batch.samples[owner], MASK, age) < ratio
    some = torch.zeros_like(batch.lengths).index_add_(0, owner, hidden.to(torch.int64)) > 0
    spare = (draw(batch.samples, FALLBACK) * batch.lengths).to(torch.int64)  # below 2^24 items: exact
    hidden |= (age == spare[owner]) & ~some[owner]
    last = tail_histories(batch.samples, share=tail, seed=seed, epoch=batch.epoch)
    return torch.where(last[owner], age == 0, hidden)
