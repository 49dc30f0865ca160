"""Everything that shapes what is learnt: fusion, quantizer, sequence, ranking, evaluation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from qbrec.config.base import Section
from qbrec.config.sections import Count, Fraction, Positive


class TrainConfig(Section):
    """One training loop: length, batch, optimiser, stopping. Batches are global, whatever the world size."""

    epochs: Positive = 10
    batch_size: Positive = 256  # samples per optimiser step, over all ranks
    micro_batch: Positive = 64  # samples per forward; a batch is dealt to the ranks in these units
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    betas: tuple[float, float] = (0.9, 0.98)
    warmup_fraction: Fraction = 0.05
    min_lr_fraction: Fraction = 0.05  # of learning_rate, at the end of the cosine
    clip_norm: float = Field(default=1.0, gt=0)
    evaluate_every: Positive = 1  # epochs
    patience: Count = 0  # evaluations without improvement before stopping; 0: never
    checkpoint_every: Positive = 200  # steps
    keep_checkpoints: Positive = 2  # the last ones; the best one stays as well
    keep_every: Count = 0  # steps; checkpoints at its multiples stay for good; 0: none


class FusionConfig(Section):
    """Stage 1: dynamic cross-modal semantic injection."""

    width: Positive = 128
    depth: Positive = 3
    heads: Positive = 4
    alignment_temperature: float = Field(default=0.07, gt=0)
    loss_temperature: float = Field(default=0.2, gt=0)
    # Consecutive samples that are each other's negatives: a multiple of train.micro_batch. Ranks share it
    # evenly if their number allows, at most in parts of a micro-batch; one rank alone runs it in one piece.
    group: Positive = 256
    # Query of an item: a learnt row of its own, one for all, or a random vector computed from its row.
    id_embedding: Literal["auto", "table", "shared", "hashed"] = "auto"
    row_learning_rate: float = Field(default=0.005, gt=0)  # of the rows of a table, by row-wise Adagrad
    gate: bool = True  # whether each item chooses how many blocks it takes
    # Which views are fused, by name: modalities of the catalogue, structure, behaviour; empty: all there are.
    modalities: tuple[str, ...] = ()
    id_dropout: Fraction = 0.3
    modality_dropout: Fraction = 0.1
    behaviour_dim: Count = 64  # of the co-occurrence view of the training part; 0: no such view
    behaviour_window: Positive = 5  # positions in a history within which two items are together
    # Of fused-behaviour in the loss, against 1 per other modality.
    behaviour_weight: float = Field(default=3.0, ge=0)
    behaviour_interactions: Positive = 50_000_000  # above this many a sample of the users is counted
    cross_weight: float = Field(default=0.25, ge=0)  # of two modalities with each other in the loss
    train: TrainConfig = TrainConfig(epochs=10, batch_size=512, micro_batch=256)

    @model_validator(mode="after")
    def _consistent(self) -> FusionConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.group % self.train.micro_batch:
            raise ValueError(
                f"group {self.group} is not a multiple of train.micro_batch {self.train.micro_batch}: "
                "a group of negatives is made of whole micro-batches"
            )
        return self


class QualityConfig(Section):
    """Gate on the codebooks: a run stops here rather than train stage 3 on a collapsed one."""

    min_perplexity_fraction: Fraction = 0.1  # of the codes at level 0
    min_perplexity: float = Field(default=0.0, ge=0)  # at level 0, whatever its size; 0: off
    max_dead_fraction: Fraction = 0.5  # codes that no item has, at any level, before collisions are resolved
    min_r2_held_out: Fraction = 0.1  # variance explained after all levels, on held-out items; 0: off
    # Mean cosine of items on one code of level 0, minus that in shuffled IDs, must exceed this; 0: off.
    min_cohesion_gain: Fraction = 0.05
    max_collision_rate: Fraction = 0.5  # items that share their ID with an item of other content
    max_largest_bucket: Count = 10_000  # distinct contents on one ID; 0: off
    # Quantisation error of appended items over that of the catalogue's: above it `qbrec append` says refit.
    max_drift: float = Field(default=1.5, gt=0)


class RqvaeConfig(Section):
    """Auto-encoder around the codebooks (method rqvae): warmed up, clustered, then trained through them."""

    latent: Positive = 32
    hidden: tuple[Positive, ...] = (256, 128)  # widths of the layers, from the input inwards
    beta: float = Field(default=0.25, ge=0)  # weight of the commitment of latents to their codes
    gradient: Literal["rotation", "straight_through"] = "rotation"  # how it passes the choice of codes
    warmup: TrainConfig = TrainConfig(epochs=10, batch_size=1024, micro_batch=1024)
    train: TrainConfig = TrainConfig(epochs=20, batch_size=1024, micro_batch=1024)


class QuantizerConfig(Section):
    """Stage 2: residual vector quantizer initialised by distributed k-means."""

    method: Literal["rq_kmeans", "rvq", "rqvae"] = "rvq"
    rqvae: RqvaeConfig = RqvaeConfig()
    levels: Literal["auto"] | tuple[Positive, ...] = "auto"
    # How k-means starts: k-means++ or k-means|| on a sample, or rows at random.
    seeding: Literal["plus_plus", "parallel", "random"] = "plus_plus"
    warmup: Literal["sample", "mini_batch"] = "sample"  # before the full passes: Lloyd on a sample, or this
    iterations: Count = 20  # most Lloyd iterations on the sample; on everything up to 131,072 items
    full_passes: Count = 1  # Lloyd iterations over all items after those on the sample
    sample: Positive = 1_048_576  # most items in the sample (128 per code), over all ranks
    refine_epochs: Count = 2  # joint EMA passes (rvq)
    refine_solves: Count = 1  # least-squares solves of all codebooks (rvq)
    beam: Positive = 1  # partial IDs kept while encoding; 1: greedy
    # Share of the items kept from the fit, for the held-out error.
    held_out: float = Field(default=0.05, ge=0, lt=1)
    # Items of different content on one ID: they share it, move to another last code, or get one more level.
    collisions: Literal["none", "next_nearest", "sinkhorn", "digit"] = "next_nearest"
    capacity: Positive = 1  # items of different content per ID, for next_nearest and sinkhorn
    sinkhorn_epsilon: float = Field(default=0.003, gt=0)  # weight of the entropy: larger is more even
    sinkhorn_iterations: Positive = 50
    # Deal the finished IDs to the items at random, to see what their meaning is worth.
    shuffled: bool = False
    # What gets codes: joint is the semantic ID; modalities of the catalogue give stage 3 tokens beside it.
    modalities: tuple[str, ...] = ("joint",)
    # Of each further modality, besides the code for items without it; auto: two of the size of level 0.
    modality_levels: Literal["auto"] | Annotated[tuple[Positive, ...], Field(min_length=1)] = "auto"
    quality: QualityConfig = QualityConfig()

    @field_validator("modalities")
    @classmethod
    def _joint_first(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if names[:1] != ("joint",) or len(set(names)) != len(names):
            raise ValueError("must begin with joint, the semantic ID, and name each further modality once")
        return names


class MaskConfig(Section):
    """Mixture and shape of the masks of stage 3 (paper: span, tail, multi-region)."""

    span: Fraction = 0.3
    tail: Fraction = 0.3
    multi_region: Fraction = 0.4
    ratio: Fraction = 0.3  # of the items of a history, for span and multi_region
    max_span: Positive = 5
    partial: Fraction = 0.1  # probability that only the deeper levels of an item are masked

    @model_validator(mode="after")
    def _some(self) -> MaskConfig:
        if self.span + self.tail + self.multi_region <= 0:
            raise ValueError("at least one of span, tail, multi_region must be above 0")
        return self


class SequenceConfig(Section):
    """Stage 3: masked encoder over semantic IDs, pretrained on all domains, fine-tuned on one."""

    width: Positive = 64
    layers: Positive = 2
    heads: Positive = 2
    dropout: Fraction = 0.3
    max_items: Positive = 50  # the last H items of a history
    position: Literal["learned", "rotary"] = "learned"
    # Catalogues of up to so many items give each a code of its own beside its semantic ID: a level that
    # large ones can do without, and whose bounds would slow exact search down. 0: none do.
    item_codes: Count = 32_768
    item_code_interactions: Positive = 4  # in training; items with fewer share one code
    codebook_start: bool = True  # code embeddings start from the quantizer's codebooks, not at random
    # Softmax over items against those over codes; 0: codes only.
    item_weight: float = Field(default=1.0, ge=0)
    candidates: Positive = 16_384  # items in that softmax; a uniform sample where the catalogue has more
    label_smoothing: Fraction = 0.0  # of the codes
    # Without it fine-tuning starts from scratch and takes over the length and learning rate of pretraining.
    pretraining: bool = True
    masks: MaskConfig = MaskConfig()
    finetune_masks: MaskConfig = MaskConfig(span=0.0, tail=1.0, multi_region=0.0, partial=0.0)
    # Share of the histories cut at a random item, so that every item is the last one at times.
    pretrain_prefix: Fraction = 0.5
    finetune_prefix: Fraction = 0.7
    validation_users: Count = 10_000  # users scored by every evaluation while training; 0: all
    pretrain: TrainConfig = TrainConfig(
        epochs=20, batch_size=128, micro_batch=64, learning_rate=2e-3, evaluate_every=2, patience=5
    )
    finetune: TrainConfig = TrainConfig(
        epochs=10, batch_size=128, micro_batch=64, learning_rate=2e-4, patience=3
    )

    @model_validator(mode="after")
    def _heads(self) -> SequenceConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.position == "rotary" and self.width // self.heads % 2:
            raise ValueError(f"rotary positions need an even width per head, not {self.width // self.heads}")
        return self


class RankingConfig(Section):
    """The one scorer that early stop, evaluation, recommend and bundle share."""

    # factorised: all codes of the next item at once, exact. autoregressive: code by code, a beam search;
    # early stop stays with the factorised score.
    scorer: Literal["factorised", "autoregressive"] = "factorised"
    beam: Positive = 50  # partial IDs kept per history and level (autoregressive)
    # Items kept per item that follow it in histories, for the bonus on the semantic-ID score; 0: no bonus.
    # Its weights are fitted on validation when fine-tuning ends.
    neighbours: Count = 100
    alike: Count = 30  # items of the most similar content kept per item and view, for the bonus too
    chunk_items: Positive = 65_536  # items scored at once


class ItemEncoderConfig(Section):
    """A transformer over item ids, trained with the softmax over all items."""

    width: Positive = 128
    layers: Positive = 2
    heads: Positive = 2
    dropout: Fraction = 0.5
    max_items: Positive = 50  # the last H items of a history
    candidates: Positive = 16_384  # items in the softmax; a uniform sample where the domain has more
    validation_users: Count = 10_000  # users scored by every evaluation while training; 0: all
    train: TrainConfig = TrainConfig(
        epochs=20, batch_size=128, micro_batch=64, learning_rate=2e-3, patience=5
    )

    @model_validator(mode="after")
    def _heads(self) -> ItemEncoderConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


class Bert4RecConfig(ItemEncoderConfig):
    """BERT4Rec: items are hidden and predicted from both sides."""

    dropout: Fraction = 0.3
    mask_ratio: Fraction = 0.4  # of the items of a history
    # Share of the histories that are cut at a random item, which alone is hidden, as when recommending.
    tail: Fraction = 0.5
    train: TrainConfig = TrainConfig(
        epochs=40, batch_size=128, micro_batch=64, learning_rate=1e-3, evaluate_every=2, patience=5
    )


class BaselinesConfig(Section):
    """The rivals that are trained; those that `evaluation.baselines` does not name are not."""

    sasrec: ItemEncoderConfig = ItemEncoderConfig()
    bert4rec: Bert4RecConfig = Bert4RecConfig()


class EvaluationConfig(Section):
    """Full-catalogue, leave-one-out ranking against every baseline."""

    baselines: tuple[Literal["popularity", "itemknn", "sasrec", "bert4rec"], ...] = (
        "popularity",
        "itemknn",
        "sasrec",
        "bert4rec",
    )
    # Runs of this many seeds, from run.seed on: every trained model is trained so often, and the metrics of
    # each user are averaged. The model that serves is that of run.seed.
    seeds: Positive = 1
    bootstrap: Positive = 2000
    batch_users: Positive = 256
    max_users: Count = 0  # 0: all
