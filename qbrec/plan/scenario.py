"""The size of a run: catalogue, users, machines; and what the configuration's `auto` becomes at that size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from qbrec.catalog.encoders.image import DIM as PICTURE_DIM
from qbrec.catalog.encoders.text import FIELDS
from qbrec.config import RootConfig
from qbrec.config.sections import CatalogConfig
from qbrec.engine.hardware import Accelerator, peak_flops, peak_of
from qbrec.errors import ConfigError
from qbrec.fusion.model import BEHAVIOUR, STRUCTURE
from qbrec.fusion.stage import TABLE_LIMIT
from qbrec.quantizer.fit import resolve_levels

NAMED_ENCODER_DIM = 768  # of a text or CLIP model whose width only its download would tell
HELD_BACK = 2  # interactions of each user that validation and test take from training
GIB = 1 << 30
# Standard deviations above the mean of what the largest micro-batch has. Two quantities that vary on their
# own add up to some 4, which a micro-batch exceeds once in 30,000.
RARE = 3


@dataclass(frozen=True)
class Modality:
    """One source of meaning, as stored.

    Attributes:
        name: Name of the modality.
        kind: `dense` (feature tokens of `dim` numbers) or `bag` (`dim` hashed buckets).
        dim: Width of a feature token, or number of buckets.
        tokens: Mean number of feature tokens (or of buckets) of an item.
        longest: Most tokens of an item: what a micro-batch is padded to.
    """

    name: str
    kind: Literal["dense", "bag"]
    dim: int
    tokens: float
    longest: int


@dataclass(frozen=True)
class Scenario:
    """What a plan is made for.

    Attributes:
        items: N.
        users: Number of users.
        interactions: Mean number of interactions of a user.
        world: W, ranks: one per GPU, or per CPU machine.
        per_machine: Ranks on one machine.
        gpu: The accelerator; None: ranks compute on CPUs.
        cpu_flops: FLOP/s of a rank on a CPU in float32.
        host_bytes: Memory of one machine.
        disk_rate: Bytes/s that one machine reads.
        mfu: Share of the peak that matrix products reach in training.
        overhead: Seconds of a micro-batch besides them: launches of kernels, Python, DeepSpeed.
        modalities: What the fusion network reads.
        history: Mean number of items of a training sequence; None: from `interactions`.
        domains: Number of domains.
    """

    items: int
    users: int
    interactions: float
    world: int
    per_machine: int
    gpu: Accelerator | None
    cpu_flops: float
    host_bytes: int
    disk_rate: float
    mfu: float
    overhead: float
    modalities: tuple[Modality, ...]
    history: float | None = None
    domains: int = 1

    def peak(self, precision: str) -> float:
        """FLOP/s of a rank at best."""
        return peak_of(self.gpu, precision) if self.gpu else self.cpu_flops

    @property
    def train_interactions(self) -> float:
        """Mean number of interactions of a user that training may see."""
        return max(self.interactions - HELD_BACK, 0.0)


@dataclass(frozen=True)
class Resolved:
    """What `auto` becomes.

    Attributes:
        precision: `float32`, `bfloat16` or `float16`.
        levels: Codes per level.
        id_embedding: `table`, `shared` or `hashed`.
    """

    precision: str
    levels: tuple[int, ...]
    id_embedding: str


def resolve(config: RootConfig, scenario: Scenario) -> Resolved:
    """Resolve `auto` as the stages do at that size.

    Raises:
        ConfigError: Levels cannot be fitted or packed, or the GPU lacks the precision asked for.
    """
    precision = config.compute.precision
    if precision == "auto":
        precision = "bfloat16" if scenario.gpu and scenario.gpu.has_bfloat16 else "float32"
    if precision == "bfloat16" and scenario.gpu and not scenario.gpu.has_bfloat16:
        raise ConfigError(
            f"{scenario.gpu.name} does not compute in bfloat16",
            where="compute.precision",
            fix="use float16 or auto",
        )
    levels = resolve_levels(
        config.quantizer.levels,
        num_items=scenario.items,
        num_train=scenario.items - int(scenario.items * config.quantizer.held_out),
        further=1 if config.quantizer.collisions == "digit" else 0,
    )
    identity = config.fusion.id_embedding
    if identity == "auto":
        identity = "table" if scenario.items < TABLE_LIMIT else "shared"
    return Resolved(precision, levels, identity)


def default_modalities(config: RootConfig) -> tuple[Modality, ...]:
    """Text, image and structure as the catalogue's encoders write them, and the behaviour view.

    Every item is taken to have one picture, and a title, labels and a description that fills its tokens.
    """
    catalog = config.catalog
    text = catalog.text
    most = len(FIELDS) - 2 + text.description_tokens + bool(text.attributes)
    image = catalog.image
    built_in = image.encoder == "pixel-statistics"
    found = [
        Modality(
            "image",
            "dense",
            PICTURE_DIM if built_in else NAMED_ENCODER_DIM,
            image.tokens_per_picture,
            image.tokens_per_picture * image.max_pictures,
        ),
        Modality(
            "text", "dense", text.dim if text.encoder == "hashed-ngram" else NAMED_ENCODER_DIM, most, most
        ),
    ]
    return tuple(found) + further_modalities(config, catalog)


def further_modalities(config: RootConfig, catalog: CatalogConfig) -> tuple[Modality, ...]:
    """Structure, and the behaviour view where it is switched on: what no encoder makes."""
    slots = catalog.structure_depth + 1
    structure = Modality(STRUCTURE, "bag", catalog.structure_buckets, slots, slots)
    dim = config.fusion.behaviour_dim
    return (structure, Modality(BEHAVIOUR, "dense", dim, 1, 1)) if dim else (structure,)


@dataclass(frozen=True)
class Lengths:
    """Items in training sequences.

    Attributes:
        mean: Mean number.
        deviation: Standard deviation.
        longest: Where they are cut.
        capped: Share of the sequences that are so long.
    """

    mean: float
    deviation: float
    longest: int
    capped: float

    def most(self, sequences: int) -> int:
        """Items in the largest micro-batch of a long training."""
        most = sequences * self.mean + RARE * self.deviation * math.sqrt(sequences)
        return math.ceil(min(most, sequences * self.longest))


def sequence_lengths(scenario: Scenario, *, longest: int, prefix: float) -> Lengths:
    """Lengths of the sequences that stage 3 trains on.

    The training parts of histories are taken to be exponentially distributed. A share `prefix` of them is cut
    at a random item, and all keep their last `longest` items.

    Args:
        scenario: Interactions per user, or the mean itself.
        longest: `max_items` + 1.
        prefix: Share of the histories that are cut.
    """
    if scenario.history is not None:
        mean = min(scenario.history, float(longest))
        # None longer than `longest`: the nearer the mean comes to it, the less they can differ.
        return Lengths(mean, mean * (1 - mean / longest), longest, float(mean == longest))
    whole = max(scenario.train_interactions, 2.0)
    cut = (whole + 2) / 2
    moments = [_capped_moments(mean, longest) for mean in (whole, cut)]
    first, second = ((1 - prefix) * a + prefix * b for a, b in zip(moments[0], moments[1], strict=True))
    capped = (1 - prefix) * math.exp(-longest / whole) + prefix * math.exp(-longest / cut)
    return Lengths(max(first, 2.0), math.sqrt(max(second - first * first, 0.0)), longest, capped)


def _capped_moments(mean: float, cap: float) -> tuple[float, float]:
    """First and second moment of min(X, cap), X exponentially distributed with this mean."""
    tail = math.exp(-cap / mean)
    return mean * (1 - tail), 2 * mean * mean * (1 - tail * (1 + cap / mean))


def measured_cpu_flops() -> float:
    """FLOP/s of this machine, for plans of CPU machines like it."""
    return peak_flops(torch.device("cpu"), "float32") or 0.0
