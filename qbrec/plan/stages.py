"""What each stage needs: memory of a rank, bytes on disk, bytes to read per second, steps and hours."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from qbrec.config import RootConfig
from qbrec.config.stages import MaskConfig, TrainConfig
from qbrec.fusion.embed import CHUNK
from qbrec.plan.activations import Numbers, encoder_activations, fusion_activations
from qbrec.plan.disk import PAGE, checkpoint_files, graph_bytes, item_bytes, item_runs
from qbrec.plan.memory import FLOAT, RankMemory, add_rows, add_training, precise
from qbrec.plan.parameters import encoder_parameters, fusion_parameters
from qbrec.plan.scenario import Resolved, Scenario, sequence_lengths
from qbrec.plan.work import encoder_flops, fusion_flops, fusion_forward, largest_batch, mean_batch
from qbrec.quantizer.packing import code_dtype
from qbrec.ranking.validate import batch_rows
from qbrec.storage.order import WINDOW_BLOCKS

STEPS_AHEAD = 3  # of the loader: one in use, one ready, one being made
INT64 = 8
_OVERSAMPLE = 16  # of the randomised SVD behind the behaviour view


@dataclass
class StagePlan:
    """The needs of one stage.

    Attributes:
        name: Name of the stage.
        memory: Of rank 0, the one that also writes; None where no formula is honest.
        disk: Bytes that stay, by what they are.
        read_rate: Bytes/s that one rank reads so that data does not hold it up.
        steps: Optimiser steps.
        hours: Of computing, at the share of the peak and with the overhead that are assumed.
        busy: Ranks that have micro-batches of a step, where not all of them do.
    """

    name: str
    memory: RankMemory | None = None
    disk: dict[str, int] = field(default_factory=dict)
    read_rate: float | None = None
    steps: int | None = None
    hours: float | None = None
    busy: int | None = None


@dataclass(frozen=True)
class Dealt:
    """How a step's batch falls to the ranks.

    Attributes:
        steps: Optimiser steps of one epoch.
        micro_steps: Micro-batches of one rank in a step.
        busy: Ranks that have any.
    """

    steps: int
    micro_steps: int
    busy: int

    @classmethod
    def of(cls, samples: int, train: TrainConfig, *, micro_batch: int, world: int) -> Dealt:
        """A global batch in micro-batches, dealt out in turn."""
        micro_batches = math.ceil(train.batch_size / micro_batch)
        return cls(
            math.ceil(samples / train.batch_size),
            math.ceil(micro_batches / world),
            min(micro_batches, world),
        )


def fusion_plan(config: RootConfig, scenario: Scenario, resolved: Resolved) -> StagePlan:
    """Stage 1."""
    fusion, world, modalities = config.fusion, scenario.world, scenario.modalities
    on_gpu = scenario.gpu is not None
    shared = math.gcd(world, fusion.group // fusion.train.micro_batch)  # ranks that share a group
    batch = fusion.group // shared
    dealt = Dealt.of(scenario.items, fusion.train, micro_batch=batch, world=world)
    parameters = fusion_parameters(fusion, modalities)
    numbers = Numbers.of(resolved.precision, on_gpu=on_gpu)
    memory = RankMemory.start(on_gpu=on_gpu)
    add_training(
        memory,
        parameters,
        compute=precise(config.compute, precision=resolved.precision, on_gpu=on_gpu),
        train=fusion.train,
        world=world,
        activations=fusion_activations(fusion, modalities, numbers, batch=batch, group=fusion.group),
        micro_steps=dealt.micro_steps,
    )
    item = batch_bytes(scenario)
    step_items = dealt.micro_steps * batch
    memory.host.keep("batches read ahead", STEPS_AHEAD * step_items * item)
    # Content is hashed, modality by modality, as integers of 8 bytes: what is stored, and its products.
    numbers_read = max((m.tokens * m.dim for m in modalities if m.kind == "dense"), default=0)
    memory.host.keep("hashing the content of a batch", 2 * INT64 * batch * numbers_read)
    if on_gpu:
        memory.device.keep("batch", step_items * item)
    # Old and new window are there at once when one follows the other.
    window = 2 * WINDOW_BLOCKS * config.catalog.block_bytes / world
    memory.host.keep("loader window", min(window, scenario.items * item_bytes(modalities)))
    memory.device.keep("evaluation sample", min(CHUNK, scenario.items) * item)
    _behaviour(memory, config, scenario)
    rows = scenario.items if resolved.id_embedding == "table" else 0
    if rows:
        add_rows(memory, rows=rows, width=fusion.width, world=world, batch=step_items)
    memory.mapped = int(scenario.items * (item_bytes(modalities) + 2 * fusion.behaviour_dim))
    disk = {
        "fused vectors": scenario.items * (2 * fusion.width + 1 + INT64),
        "network": FLOAT * parameters.total,
        "behaviour view": 2 * scenario.items * fusion.behaviour_dim,
        "ID rows": FLOAT * fusion.width * rows,
        "checkpoints": checkpoint_files(fusion.train)
        * (3 * FLOAT * parameters.total + FLOAT * (fusion.width + 1) * rows),
    }
    speed = scenario.peak(resolved.precision) * scenario.mfu
    micro = fusion_flops(fusion, modalities, items=batch, group=fusion.group) / speed + scenario.overhead
    step_seconds = dealt.micro_steps * micro
    steps = dealt.steps * fusion.train.epochs
    # Rows are gathered from mapped blocks: a run of bytes brings the pages that it lies on, and at worst what
    # all ranks together read.
    touched = sum(min(run + PAGE, run * world) for run in item_runs(modalities))
    embed = sum(fusion_forward(fusion, modalities)) * scenario.items / world / speed
    return StagePlan(
        "fusion",
        memory,
        {name: size for name, size in disk.items() if size},
        step_items * touched / step_seconds,
        steps,
        (steps * step_seconds + embed) / 3600,
        dealt.busy,
    )


def batch_bytes(scenario: Scenario) -> float:
    """Of one item in a batch: features padded to the longest item as float32, buckets, masks, hashes."""
    size = float(INT64 + len(scenario.modalities) * (2 + INT64))
    for modality in scenario.modalities:
        if modality.kind == "dense":
            size += modality.longest * (FLOAT * modality.dim + 1)
        else:
            size += modality.longest * INT64
    return size


def _behaviour(memory: RankMemory, config: RootConfig, scenario: Scenario) -> None:
    """The behaviour view, which rank 0 computes for all before training."""
    fusion = config.fusion
    if not fusion.behaviour_dim:
        return
    phase = "behaviour view (rank 0)"
    counted = min(scenario.users * scenario.train_interactions, fusion.behaviour_interactions)
    pairs = min(2 * fusion.behaviour_window * counted, float(scenario.items) ** 2)
    # Both triangles as CSR (4 + 4 bytes), the sum so far and the new one while they are added; histories.
    memory.host.during(phase, "histories", 2 * INT64 * counted)
    memory.host.during(phase, "co-occurrence, at most", 3 * 8 * pairs)
    # Singular vectors: what is projected, its copy for LAPACK, what LAPACK gives; the result and its scaling.
    wide = fusion.behaviour_dim + _OVERSAMPLE
    memory.host.during(
        phase, "singular vectors", FLOAT * scenario.items * (3 * wide + 2 * fusion.behaviour_dim)
    )


def sequence_plan(name: str, config: RootConfig, scenario: Scenario, resolved: Resolved) -> StagePlan:
    """Stage 3, `pretrain` or `finetune`; fine-tuning is planned for all users, as of a single domain."""
    sequence, world, levels = config.sequence, scenario.world, read_levels(config, scenario, resolved)
    tuning = name == "finetune"
    train: TrainConfig = sequence.finetune if tuning else sequence.pretrain
    masks: MaskConfig = sequence.finetune_masks if tuning else sequence.masks
    prefix = sequence.finetune_prefix if tuning else sequence.pretrain_prefix
    on_gpu = scenario.gpu is not None
    dealt = Dealt.of(scenario.users, train, micro_batch=train.micro_batch, world=world)
    lengths = sequence_lengths(scenario, longest=sequence.max_items + 1, prefix=prefix)
    parameters = encoder_parameters(sequence, levels, domains=scenario.domains)
    numbers = Numbers.of(resolved.precision, on_gpu=on_gpu)
    candidates = min(sequence.candidates, scenario.items)
    largest = largest_batch(train.micro_batch, lengths, masks=masks, levels=len(levels))
    memory = RankMemory.start(on_gpu=on_gpu)
    add_training(
        memory,
        parameters,
        compute=precise(config.compute, precision=resolved.precision, on_gpu=on_gpu),
        train=train,
        world=world,
        activations=encoder_activations(sequence, levels, numbers, largest, candidates=candidates),
        micro_steps=dealt.micro_steps,
    )
    memory.host.keep("batches read ahead", STEPS_AHEAD * dealt.micro_steps * INT64 * largest.items)
    _ranking(memory, config, scenario, levels)
    add_validation(memory, scenario, most=sequence.validation_users)
    if tuning:
        _graphs(memory, config, scenario)
    disk = {
        "network": FLOAT * parameters.total,
        "checkpoints": checkpoint_files(train) * 3 * FLOAT * parameters.total,
    }
    mean = mean_batch(train.micro_batch, lengths, masks=masks, levels=len(levels))
    speed = scenario.peak(resolved.precision) * scenario.mfu
    seconds = encoder_flops(sequence, levels, mean) / speed + scenario.overhead
    rate = history_rate(train, scenario, seconds=seconds)
    steps = dealt.steps * train.epochs
    hours = steps * dealt.micro_steps * seconds / 3600
    return StagePlan(name, memory, disk, rate, steps, hours, dealt.busy)


def _graphs(memory: RankMemory, config: RootConfig, scenario: Scenario) -> None:
    # As stored, and once more with rows that add up to one, those of content turned round as well.
    memory.host.during("bonus", "item graphs, at most", 3 * graph_bytes(config, scenario))


def history_rate(train: TrainConfig, scenario: Scenario, *, seconds: float) -> float:
    """Bytes/s that a rank reads of histories, where a micro-batch takes so many seconds."""
    # A history is one run of rows; its domain, its end and its length lie elsewhere.
    run = INT64 * scenario.interactions
    touched = sum(min(size + PAGE, size * scenario.world) for size in (run, 1, 8, 8))
    return train.micro_batch * touched / seconds


def read_levels(config: RootConfig, scenario: Scenario, resolved: Resolved) -> tuple[int, ...]:
    """Codes per level that the encoder reads: those of the semantic ID, then the item codes, if any."""
    some = scenario.items <= config.sequence.item_codes
    return (*resolved.levels, scenario.items + 1) if some else resolved.levels


def _ranking(memory: RankMemory, config: RootConfig, scenario: Scenario, levels: tuple[int, ...]) -> None:
    """What every rank holds to score users by semantic IDs."""
    items, depth = scenario.items, len(levels)
    kind = code_dtype(levels)
    narrow = items * depth * (kind.itemsize if kind.itemsize <= 2 else FLOAT)
    memory.device.keep("id table", narrow)
    if items <= config.sequence.item_codes:
        memory.host.keep("codes and item codes", kind.itemsize * items * depth)
    memory.device.during("evaluation", "id table of the scorer", narrow + FLOAT * items * depth)
    memory.host.during("evaluation", "codes of the scorer", FLOAT * items * depth)
    add_scores(memory, config, scenario)


def add_scores(memory: RankMemory, config: RootConfig, scenario: Scenario) -> None:
    """What every rank holds to rank targets over the whole catalogue."""
    items = scenario.items
    memory.host.keep("candidates and order of items", items * (INT64 + INT64 + 1))
    if memory.on_gpu:
        memory.device.during("forward and backward", "candidates", INT64 * items)
    scored = batch_rows(config.evaluation.batch_users, items) * items
    memory.device.during("evaluation", "scores", scored * (FLOAT + (3 if memory.on_gpu else 0)))


def add_validation(memory: RankMemory, scenario: Scenario, *, most: int) -> None:
    """The histories of validation users (`most`; 0: all), on every rank while it trains."""
    drawn = min(scenario.users, most or scenario.users)
    memory.host.keep("histories of validation users", _history_bytes(scenario, users=drawn))
    # Domain and number, where validation and test begin (twice), and who has a target.
    begin = scenario.users * (1 + INT64 + 2 * INT64 + INT64)
    memory.host.during("drawing validation users", "where parts of all histories begin", begin)


def _history_bytes(scenario: Scenario, *, users: int) -> float:
    """Rows and times, and what there is once per user: number, domain, parts, two offsets."""
    return users * (2 * INT64 * scenario.interactions + 4 * INT64 + 1)


def evaluation_plan(config: RootConfig, scenario: Scenario, resolved: Resolved) -> StagePlan:
    """The last stage, the users shared among the ranks: the least time that moving dense scores takes."""
    on_gpu = scenario.gpu is not None
    memory = RankMemory.start(on_gpu=on_gpu)
    _ranking(memory, config, scenario, read_levels(config, scenario, resolved))
    memory.host.keep("histories of all users", _history_bytes(scenario, users=scenario.users))
    parts = 2 * INT64 * scenario.users * scenario.interactions
    memory.host.during("reading histories", "their parts, before they are joined", parts)
    _graphs(memory, config, scenario)
    users = min(scenario.users, config.evaluation.max_users or scenario.users)
    models = 1 + bool(config.ranking.neighbours) + len(config.evaluation.baselines)
    hours = None
    if scenario.gpu:
        # Made, turned over (read and written), compared thrice, and read twice for the top items.
        passes = 1 + 2 + 3 + 2
        hours = users * models * passes * FLOAT * scenario.items / scenario.gpu.bandwidth / 3600
        hours /= scenario.world
    disk = {"ranks of every user": users * (8 + 1 + 8 + 4 + 8 * models)}
    return StagePlan("evaluation", memory, disk, hours=hours)
