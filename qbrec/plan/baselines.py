"""What SASRec and BERT4Rec over item ids need: every rank has one vector per item, every step moves all."""

from __future__ import annotations

from dataclasses import dataclass

from qbrec.baselines.softmax import CHUNK_SCORES
from qbrec.config import RootConfig
from qbrec.config.stages import Bert4RecConfig, ItemEncoderConfig
from qbrec.plan.activations import Numbers
from qbrec.plan.disk import checkpoint_files
from qbrec.plan.memory import FLOAT, RankMemory, add_training, precise
from qbrec.plan.parameters import Parameters
from qbrec.plan.scenario import Lengths, Resolved, Scenario, sequence_lengths
from qbrec.plan.stages import INT64, STEPS_AHEAD, Dealt, StagePlan, add_scores, add_validation, history_rate
from qbrec.plan.work import FORWARD_AND_BACKWARD


@dataclass(frozen=True)
class ItemsBatch:
    """What a micro-batch holds; means may be fractions.

    Attributes:
        items: S, read, over all histories.
        places: M, asked about.
        squares: Sum over the histories of the squared number of items.
    """

    items: float
    places: float
    squares: float


def item_parameters(config: ItemEncoderConfig, *, items: int) -> Parameters:
    """Of a transformer over `items` items."""
    w, cloze = config.width, isinstance(config, Bert4RecConfig)
    table = (items + cloze) * w
    matrices = [table, (config.max_items + cloze) * w]
    matrices += config.layers * [3 * w * w, w * w, 4 * w * w, 4 * w * w]
    vectors = config.layers * (4 * w + 3 * w + w + 4 * w + w) + 2 * w + items
    return Parameters(sum(matrices), vectors, max(matrices))


def item_flops(config: ItemEncoderConfig, batch: ItemsBatch, *, candidates: int) -> float:
    """Of the forward and backward pass of a micro-batch."""
    w = config.width
    products = (config.layers - 1) * batch.items * 12 * w * w
    # After its attention, the last block computes the places only.
    products += batch.items * 3 * w * w + batch.places * 9 * w * w
    products += batch.places * candidates * w
    products += config.layers * 2 * batch.squares * w  # attention
    return FORWARD_AND_BACKWARD * 2.0 * products


def item_activations(
    config: ItemEncoderConfig, numbers: Numbers, batch: ItemsBatch, *, items: int, candidates: int
) -> float:
    """Bytes at the peak of a forward and backward pass, at most; up to a quarter more than there are."""
    w = config.width
    noise = numbers.dropout if config.dropout else 0
    # Embedding and its dropout; of a block the same tensors as in `activations.encoder_activations`.
    total = batch.items * w * (numbers.act + noise)
    total += config.layers * batch.items * w * (17 * numbers.act + 2 * noise)
    # The candidates' vectors and their gradient, twice where it is summed in float32.
    total += candidates * w * (numbers.act + FLOAT + (numbers.act if numbers.act < FLOAT else 0))
    # On the way forward a chunk's scores. On the way back gradients as large as the table, of two of the ways
    # into it before they are added up.
    return total + max(3 * FLOAT * max(CHUNK_SCORES, candidates), 2 * items * w * numbers.act)


def batch_of(config: ItemEncoderConfig, lengths: Lengths, *, items: float) -> ItemsBatch:
    """Expected contents of a micro-batch of whole histories with so many items in all."""
    micro = config.train.micro_batch
    squares = micro * ((items / micro) ** 2 + lengths.deviation**2)
    if not isinstance(config, Bert4RecConfig):
        return ItemsBatch(items - micro, items - micro, squares)
    mean = items / micro
    hidden = mean * config.mask_ratio + (1 - config.mask_ratio) ** mean  # one where chance hides none
    return ItemsBatch(items, micro * ((1 - config.tail) * hidden + config.tail), squares)


def baseline_plan(name: str, config: RootConfig, scenario: Scenario, resolved: Resolved) -> StagePlan:
    """A trained baseline, of all users and items, as of a single domain."""
    settings: ItemEncoderConfig = getattr(config.baselines, name)
    train, on_gpu = settings.train, scenario.gpu is not None
    dealt = Dealt.of(scenario.users, train, micro_batch=train.micro_batch, world=scenario.world)
    lengths = sequence_lengths(scenario, longest=settings.max_items + 1, prefix=0.0)
    parameters = item_parameters(settings, items=scenario.items)
    candidates = min(settings.candidates, scenario.items)
    largest = batch_of(settings, lengths, items=lengths.most(train.micro_batch))
    numbers = Numbers.of(resolved.precision, on_gpu=on_gpu)
    memory = RankMemory.start(on_gpu=on_gpu)
    add_training(
        memory,
        parameters,
        compute=precise(config.compute, precision=resolved.precision, on_gpu=on_gpu),
        train=train,
        world=scenario.world,
        activations=round(
            item_activations(settings, numbers, largest, items=scenario.items, candidates=candidates)
        ),
        micro_steps=dealt.micro_steps,
    )
    memory.host.keep("batches read ahead", STEPS_AHEAD * dealt.micro_steps * 2 * INT64 * largest.items)
    add_scores(memory, config, scenario)
    add_validation(memory, scenario, most=settings.validation_users)
    disk = {
        "network": FLOAT * parameters.total,
        "numbers of items": INT64 * scenario.items,
        "checkpoints": checkpoint_files(train) * 3 * FLOAT * parameters.total,
    }
    mean = batch_of(settings, lengths, items=train.micro_batch * lengths.mean)
    speed = scenario.peak(resolved.precision) * scenario.mfu
    seconds = item_flops(settings, mean, candidates=candidates) / speed + scenario.overhead
    rate = history_rate(train, scenario, seconds=seconds)
    steps = dealt.steps * train.epochs
    hours = steps * dealt.micro_steps * seconds / 3600
    return StagePlan(name, memory, disk, rate, steps, hours, dealt.busy)
