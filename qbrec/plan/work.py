"""Floating-point operations of training: matrix products and attention, two for every multiplication."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qbrec.config.stages import FusionConfig, MaskConfig, SequenceConfig
from qbrec.plan.parameters import BAG_WIDTH
from qbrec.plan.scenario import RARE, Lengths, Modality

FORWARD_AND_BACKWARD = 3  # the backward pass of a product is two products


def fusion_forward(config: FusionConfig, modalities: Sequence[Modality]) -> tuple[float, float]:
    """Of one item: the projection of its features, whose own gradient nobody needs, and all the rest."""
    d, m = config.width, len(modalities)
    features = sum(2.0 * x.longest * x.dim * d for x in modalities if x.kind == "dense")
    rest = sum(2.0 * BAG_WIDTH * d for x in modalities if x.kind == "bag")
    rest += sum(2 * 2.0 * x.longest * d for x in modalities if x.kind == "dense")  # alignment
    # Query, out and feed-forward of the state; key and value of its M + 1 tokens; attention to them.
    rest += config.depth * 2.0 * (6 * d * d + 2 * (m + 1) * d * d + 2 * (m + 1) * d)
    rest += (config.depth - 1) * 2.0 * (d // 4) * (d + 1)
    return features, rest


def fusion_flops(config: FusionConfig, modalities: Sequence[Modality], *, items: int, group: int) -> float:
    """Of the forward and backward pass of some items.

    Args:
        config: Sizes of the network.
        modalities: What it reads.
        items: In all micro-batches.
        group: Items that each is contrasted with.
    """
    features, rest = fusion_forward(config, modalities)
    rest += num_pairs(modalities) * 2.0 * group * config.width
    return items * (2 * features + FORWARD_AND_BACKWARD * rest)


def num_pairs(modalities: Sequence[Modality]) -> int:
    """Pairs of views that the fusion loss contrasts."""
    return len(modalities) + math.comb(sum(m.kind == "dense" for m in modalities), 2)


@dataclass(frozen=True)
class SequenceBatch:
    """What a micro-batch of stage 3 holds; means may be fractions.

    Attributes:
        sequences: B.
        items: S, over all of them.
        hidden: Hidden codes, over all levels.
        whole: Items hidden at all levels.
        squares: Sum over the sequences of the squared number of their tokens.
        same: Share of the items in the largest group of sequences of one length, taken by attention at once.
    """

    sequences: float
    items: float
    hidden: float
    whole: float
    squares: float
    same: float = 1.0


def sequence_batch(sequences: int, items: float, *, masks: MaskConfig, levels: int) -> SequenceBatch:
    """Expected contents of a micro-batch of sequences with so many items in all."""
    share = hidden_share(masks, items / sequences)
    chosen = items * share
    partial = masks.partial if levels > 1 else 0.0
    # A partially hidden item loses its levels from a random one in 1 … L - 1 on: half of them on average.
    hidden = chosen * ((1 - partial) * levels + partial * levels / 2)
    tokens = 1 + levels * items / sequences
    return SequenceBatch(sequences, items, hidden, chosen * (1 - partial), sequences * tokens * tokens)


def hidden_share(masks: MaskConfig, length: float) -> float:
    """Expected share of the items of a history of this length that are hidden."""
    total = masks.span + masks.tail + masks.multi_region
    span = max(masks.ratio * length, 1.0)
    regions = max(min(max(masks.ratio * length, 2.0), length / 2), 1.0)
    items = (masks.span * span + masks.tail + masks.multi_region * regions) / total
    return min(items / length, 1.0)


def encoder_forward(config: SequenceConfig, levels: Sequence[int], batch: SequenceBatch) -> float:
    """Of one forward pass of the encoder; the last block computes hidden tokens only, after attention."""
    w = config.width
    tokens = batch.sequences + batch.items * len(levels)
    upper = config.layers - 1
    products = batch.items * w * w  # item projection
    products += upper * tokens * 12 * w * w
    products += tokens * 3 * w * w + batch.hidden * 9 * w * w
    products += batch.hidden * w * w  # head
    products += batch.hidden / len(levels) * sum(levels) * w
    products += config.layers * 2 * batch.squares * w  # attention
    return 2.0 * products


def encoder_flops(config: SequenceConfig, levels: Sequence[int], batch: SequenceBatch) -> float:
    """Of the forward and backward pass of a micro-batch."""
    return FORWARD_AND_BACKWARD * encoder_forward(config, levels, batch)


def mean_batch(sequences: int, lengths: Lengths, *, masks: MaskConfig, levels: int) -> SequenceBatch:
    """A micro-batch of mean length; the spread of lengths makes attention cost more than the mean does."""
    batch = sequence_batch(sequences, sequences * lengths.mean, masks=masks, levels=levels)
    spread = (levels * lengths.deviation) ** 2
    return SequenceBatch(
        batch.sequences, batch.items, batch.hidden, batch.whole, batch.squares + sequences * spread
    )


def largest_batch(sequences: int, lengths: Lengths, *, masks: MaskConfig, levels: int) -> SequenceBatch:
    """The largest micro-batch of a long training: many items, and many of them hidden."""
    batch = sequence_batch(sequences, lengths.most(sequences), masks=masks, levels=levels)
    total = masks.span + masks.tail + masks.multi_region
    many = (masks.span + masks.multi_region) / total  # of the histories, the others hide one item
    spread = math.sqrt(many * (1 - many)) * max(masks.ratio * lengths.mean - 1, 0.0)
    mean = batch.items * hidden_share(masks, batch.items / sequences)
    factor = min(1 + RARE * spread * math.sqrt(sequences) / mean, batch.items / mean)
    return SequenceBatch(
        batch.sequences,
        batch.items,
        batch.hidden * factor,
        batch.whole * factor,
        batch.squares + sequences * (levels * lengths.deviation) ** 2,
        same=min(lengths.capped * lengths.longest * sequences / batch.items, 1.0),
    )


def quantizer_flops(
    rows: int,
    total: int,
    width: int,
    levels: Sequence[int],
    *,
    sample: Sequence[int],
    iterations: int,
    full_passes: int,
    refine_epochs: int,
    refine_solves: int,
    world: int,
) -> float:
    """Of one rank's part of the fit and of the encoding of its rows, at most.

    Args:
        rows: Of this rank.
        total: N.
        width: D.
        levels: Codes per level.
        sample: Rows that Lloyd starts on, per level, over all ranks.
        iterations: Lloyd iterations on the sample.
        full_passes: Over all rows.
        refine_epochs: Of moving averages.
        refine_solves: Least squares.
        world: W.
    """
    flops = 0.0
    for codes, drawn in zip(levels, sample, strict=True):
        whole = drawn >= total
        passes = max(iterations, full_passes) if whole else full_passes
        flops += 2.0 * codes * width * (passes * rows + (0 if whole else iterations * drawn / world))
    everything = 2.0 * sum(levels) * width * rows
    # Descending between levels, and the last encoding; revival encodes once; every change of the codebooks is
    # judged on held-out rows, which are few, and least squares encode first.
    return flops + everything * (3 + refine_epochs + refine_solves)
