"""What automatic differentiation keeps of a forward pass until its backward pass, and the peak around it.

Counted from the code of the modules: every tensor that an operation saves for its gradient, in units of rows
times width. Tensors of a few numbers per row (means and deviations of norms, positions) are counted only
where they add up. At the end of the forward pass all of it is there at once. On the way back only the last
attention of the encoder, large beside what has been freed by then, can need more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qbrec.config.stages import FusionConfig, SequenceConfig
from qbrec.plan.parameters import BAG_WIDTH
from qbrec.plan.scenario import Modality
from qbrec.plan.work import SequenceBatch, num_pairs

FLOAT, INT64, BOOL = 4, 8, 1


@dataclass(frozen=True)
class Numbers:
    """How numbers are stored.

    Attributes:
        act: Bytes of an activation.
        on_gpu: CUDA keeps the mask of a dropout as bytes; a CPU keeps it as factors of the activation's type.
    """

    act: int
    on_gpu: bool

    @classmethod
    def of(cls, precision: str, *, on_gpu: bool) -> Numbers:
        """For a precision."""
        return cls(4 if precision == "float32" else 2, on_gpu)

    @property
    def dropout(self) -> int:
        """Bytes kept per number by a dropout."""
        return BOOL if self.on_gpu else self.act


def fusion_activations(
    config: FusionConfig, modalities: Sequence[Modality], numbers: Numbers, *, batch: int, group: int
) -> int:
    """Bytes at the peak of the fusion network and its loss.

    Args:
        config: Sizes of the network.
        modalities: What it reads.
        numbers: How numbers are stored.
        batch: B, items of one forward on one rank.
        group: G, items that each is contrasted with, those of neighbouring ranks among them.
    """
    d, m = config.width, len(modalities)
    dense = [x for x in modalities if x.kind == "dense"]
    # Of a block, in units of B × D. The M + 1 tokens: normed, as keys, as values. The state: before and after
    # the first norm, its query, what it reads, before and after the second norm, the change it takes; and the
    # hidden layer (2 D) on both sides of its GELU.
    units: float = config.depth * (3 * (m + 1) + 7 + 4)
    units += (config.depth - 1) * 1.5  # a gate: normed state, and D / 4 on both sides of its GELU
    units += m + 1  # the tokens themselves
    # Alignment: tokens projected and normalised, the normalised query.
    units += sum(2 * x.longest + 1 for x in dense)
    network = units * batch * d
    network += sum(batch * x.longest * x.dim for x in dense)  # standardised features
    network += sum(batch * BAG_WIDTH for x in modalities if x.kind == "bag")
    # Norms keep two numbers a row: two norms of the state and one of the tokens per block, one per gate.
    statistics = batch * 2 * (config.depth * (m + 3) + config.depth - 1)
    # The loss, in float32: vectors as they are and normalised, of the batch and of a shared group.
    vectors = 2 * (m + 1) * d * (batch if group == batch else batch + group)
    pairs = num_pairs(modalities) * batch * group * (2 * FLOAT + BOOL)
    # Going back through a pair: the gradient of a logsumexp is made of three arrays as large as its input.
    transient = 3 * batch * group * 2 * FLOAT
    return round(network * numbers.act + (statistics + vectors) * FLOAT + pairs + transient)


def encoder_activations(
    config: SequenceConfig, levels: Sequence[int], numbers: Numbers, batch: SequenceBatch, *, candidates: int
) -> int:
    """Bytes at the peak of the encoder and its losses.

    Args:
        config: Sizes of the encoder.
        levels: Codes per level.
        numbers: How numbers are stored.
        batch: The largest micro-batch.
        candidates: C, items that a hidden one is told from.
    """
    w, depth = config.width, len(levels)
    codes = batch.items * depth
    tokens = batch.sequences + codes
    noise = numbers.dropout if config.dropout else 0
    # Embedding: codes, mean codes of items; its dropout.
    total = (codes + batch.items) * w * numbers.act + tokens * w * noise
    total += codes * 2 * INT64  # tokens and their places
    # Attention (flash): input, normed input, query, key and value, its output before that of all groups is
    # joined, and one number a token and head.
    attention = tokens * w * 6 * numbers.act + tokens * config.heads * FLOAT
    # After it: what it gives, residual, normed, hidden layer (4 w) before and after its GELU; two dropouts.
    after = w * (3 + 8) * numbers.act + 2 * w * noise
    statistics = 2 * FLOAT
    total += config.layers * (attention + tokens * statistics)
    total += (config.layers - 1) * tokens * (after + statistics)
    if config.position == "rotary":
        total += tokens * w // config.heads * FLOAT
    # Going back through the last attention: gradients of the residual beside it, of query, key and value as
    # it gives them for sequences taken at once, when what it gave has been freed, and joined for all; with
    # rotary positions those of query and key before their rotation.
    turned = 2 if config.position == "rotary" else 0
    backward = total + tokens * w * (4 + turned + 2 * batch.same) * numbers.act
    # The last block goes on with hidden tokens only; then the head: two norms, a product, and what it gives.
    total += batch.hidden * (after + statistics + 4 * w * numbers.act + 2 * statistics)
    scores = batch.hidden / depth * sum(levels) * FLOAT
    total += scores  # log-probabilities
    if config.item_weight > 0:
        whole = batch.whole * sum(levels) * FLOAT
        total += whole + batch.whole * candidates * FLOAT
        # Codes of the candidates, and where they lie in a table of scores; that table.
        total += 3 * depth * candidates * INT64 + whole
    # Scores themselves, and in half precision what they were before they became float32.
    total += scores + (scores / FLOAT * numbers.act if numbers.act < FLOAT else 0)
    return math.ceil(max(total, backward))
