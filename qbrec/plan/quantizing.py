"""What stage 2 needs: k-means and residual quantisation of all fused vectors, each rank its own rows."""

from __future__ import annotations

from itertools import combinations

from qbrec.config import RootConfig
from qbrec.config.stages import QuantizerConfig
from qbrec.plan.disk import quantizer_disk
from qbrec.plan.memory import FLOAT, Memory, RankMemory
from qbrec.plan.scenario import Resolved, Scenario
from qbrec.plan.stages import INT64, StagePlan
from qbrec.plan.work import quantizer_flops
from qbrec.quantizer.kmeans.chunks import split_rows
from qbrec.quantizer.kmeans.fit import (
    MAX_SEED_ROWS,
    MIN_SEED_ROWS,
    SAMPLE_PER_CODE,
    SEED_ROWS_PER_CODE,
    SMALL,
)
from qbrec.quantizer.packing import code_dtype

_SORTED = 16  # arrays of an integer per item that resolving collisions has at once, about


def sample_rows(config: QuantizerConfig, codes: int, train: int) -> tuple[int, int]:
    """Rows that Lloyd starts on, and rows of them that the seeding sees, as `fit_kmeans` takes them."""
    small = train <= min(config.sample, SMALL)
    drawn = min(train, train if small else min(config.sample, SAMPLE_PER_CODE * codes))
    few = max(SEED_ROWS_PER_CODE * codes, MIN_SEED_ROWS) if drawn < train else MAX_SEED_ROWS
    return drawn, min(few, MAX_SEED_ROWS, drawn)


def quantizer_plan(config: RootConfig, scenario: Scenario, resolved: Resolved) -> StagePlan:
    """Stage 2; the small auto-encoder of the method `rqvae` is not counted."""
    quantizer, width, levels = config.quantizer, config.fusion.width, resolved.levels
    start, stop = split_rows(scenario.items, rank=scenario.world - 1, world=scenario.world)
    rows, depth = stop - start, len(levels)
    train = scenario.items - int(scenario.items * quantizer.held_out)
    samples = [sample_rows(quantizer, codes, train) for codes in levels]
    memory = RankMemory.start(on_gpu=scenario.gpu is not None)
    device = memory.device
    vectors = FLOAT * rows * width
    device.keep("fused vectors", vectors)
    device.keep("which are held out", rows)
    memory.host.during("reading", "vectors as stored", 2 * rows * width)
    device.during("reading", "whether they are finite", rows * width)
    phase = "k-means"
    device.during(phase, "residuals", vectors)
    # Lengths, codes, and the rows once more in half precision or along their main directions.
    device.during(phase, "kernel", rows * (FLOAT + FLOAT) + vectors // 2)
    drawn, seen = max(samples)
    own = drawn / scenario.world
    device.during(phase, "sample, on every rank", FLOAT * width * (drawn + own + seen))
    if quantizer.method == "rvq":
        _refinement(device, quantizer, rows=rows, width=width, levels=levels)
    phase = "revival of unused codes"
    device.during(phase, "residuals", vectors)
    device.during(phase, "codes", INT64 * rows * (depth + 1))
    narrow = 1 if max(levels) <= 256 else FLOAT
    phase = "semantic IDs (rank 0)"
    device.during(phase, "codes of this rank", INT64 * rows * depth)
    device.during(
        phase, "codes of all, and the parts they are joined from", 2 * scenario.items * depth * narrow
    )
    stored = code_dtype(levels).itemsize
    memory.host.during(phase, "codes of all, as stored", 3 * scenario.items * depth * stored)
    if quantizer.collisions != "none":
        memory.host.during(phase, "sorting IDs, about", _SORTED * INT64 * scenario.items)
    flops = quantizer_flops(
        rows,
        scenario.items,
        width,
        levels,
        sample=[drawn for drawn, _ in samples],
        iterations=quantizer.iterations,
        full_passes=quantizer.full_passes,
        refine_epochs=quantizer.refine_epochs if quantizer.method == "rvq" else 0,
        refine_solves=quantizer.refine_solves if quantizer.method == "rvq" else 0,
        world=scenario.world,
    )
    hours = flops / (scenario.peak("float32") * scenario.mfu) / 3600
    return StagePlan("quantizer", memory, quantizer_disk(config, scenario, resolved), hours=hours)


def _refinement(
    device: Memory, config: QuantizerConfig, *, rows: int, width: int, levels: tuple[int, ...]
) -> None:
    phase = "least squares"
    device.during(phase, "codes", 2 * INT64 * rows * len(levels))
    # Counts of pairs of codes, as integers and as float64, and the columns they are counted from.
    pairs = sum(a * b for a, b in combinations(levels, 2))
    device.during(phase, "pairs of codes", 2 * INT64 * pairs + 2 * INT64 * rows)
    held = int(rows * (config.held_out or 1.0))
    phase = "held-out error"
    # Rows, what their codes say, the difference and its square, in float32 and then in float64.
    device.during(phase, "held-out rows", held * width * (3 * FLOAT + 2 * 8) + INT64 * held * len(levels))
