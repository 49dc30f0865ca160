"""How many parameters the networks have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qbrec.config.stages import FusionConfig, SequenceConfig
from qbrec.plan.scenario import Modality

BAG_WIDTH = 32  # of the fusion network's table of structure buckets


@dataclass(frozen=True)
class Parameters:
    """Trained parameters, as the optimiser groups them.

    Attributes:
        matrices: In parameters of two and more dimensions, which decay.
        vectors: In the others.
        largest: In the largest one.
    """

    matrices: int
    vectors: int
    largest: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.matrices + self.vectors


def fusion_parameters(config: FusionConfig, modalities: Sequence[Modality]) -> Parameters:
    """Of the fusion network; ID rows lie outside it."""
    d, hidden = config.width, config.width // 4
    matrices = [d, (len(modalities) + 1) * d]  # shared query, kinds
    for modality in modalities:
        bag = modality.kind == "bag"
        matrices.append((BAG_WIDTH if bag else modality.dim) * d)
        if bag:
            matrices.append(modality.dim * BAG_WIDTH)
    # Cross-attention: query, key and value, out; then up and down of the feed-forward part.
    matrices += config.depth * [d * d, 2 * d * d, d * d, 2 * d * d, 2 * d * d]
    vectors = config.depth * (6 * d + d + 2 * d + d + 2 * d + d)
    matrices += (config.depth - 1) * [d * hidden, hidden]
    vectors += (config.depth - 1) * (2 * d + hidden + 1)
    return Parameters(sum(matrices), vectors, max(matrices))


def encoder_parameters(config: SequenceConfig, levels: Sequence[int], *, domains: int) -> Parameters:
    """Of the masked encoder."""
    w, codes = config.width, 2 + sum(levels)  # pad and mask come first
    matrices = [(codes + domains) * w, len(levels) * w, w * w, w * w]  # item projection, head
    if config.position == "learned":
        matrices.append((config.max_items + 1) * w)
    matrices += config.layers * [3 * w * w, w * w, 4 * w * w, 4 * w * w]
    vectors = config.layers * (4 * w + 3 * w + w + 4 * w + w) + 5 * w + codes
    return Parameters(sum(matrices), vectors, max(matrices))
