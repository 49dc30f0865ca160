"""The whole plan: all stages, what is assumed, and what does not fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from qbrec.config import RootConfig
from qbrec.plan.baselines import baseline_plan
from qbrec.plan.disk import DISPLAY, USER, catalog_disk
from qbrec.plan.memory import CPU_BASE, GPU_BASE, GPU_HOST_BASE
from qbrec.plan.neighbours import neighbours_plan
from qbrec.plan.quantizing import quantizer_plan
from qbrec.plan.scenario import GIB, Resolved, Scenario, resolve, sequence_lengths
from qbrec.plan.stages import StagePlan, evaluation_plan, fusion_plan, sequence_plan
from qbrec.stages import BASELINES, CATALOG, stages_of

_PLANS: dict[str, Callable[[RootConfig, Scenario, Resolved], StagePlan]] = {
    CATALOG: lambda config, scenario, resolved: StagePlan(CATALOG, disk=catalog_disk(scenario)),
    "fusion": fusion_plan,
    "quantizer": quantizer_plan,
    "neighbours": neighbours_plan,
    "pretrain": partial(sequence_plan, "pretrain"),
    "finetune": partial(sequence_plan, "finetune"),
    **{name: partial(baseline_plan, name) for name in BASELINES},
    "evaluation": evaluation_plan,
}


@dataclass(frozen=True)
class Plan:
    """What a run needs.

    Attributes:
        scenario: What it was made for.
        resolved: What `auto` became.
        stages: In the order of the road.
        warnings: What does not fit, and the key that mends it.
        assumptions: What the figures rest on.
    """

    scenario: Scenario
    resolved: Resolved
    stages: tuple[StagePlan, ...]
    warnings: tuple[str, ...]
    assumptions: tuple[str, ...]

    def stage(self, name: str) -> StagePlan:
        """One stage by name."""
        return next(stage for stage in self.stages if stage.name == name)


def make_plan(config: RootConfig, scenario: Scenario) -> Plan:
    """Plan a run; nothing is read.

    Raises:
        ConfigError: Configuration and size do not fit together.
    """
    resolved = resolve(config, scenario)
    stages = tuple(_PLANS[stage.name](config, scenario, resolved) for stage in stages_of(config))
    warnings = [text for stage in stages for text in _warnings(stage, config, scenario)]
    return Plan(scenario, resolved, stages, tuple(warnings), _assumptions(config, scenario, resolved))


def _warnings(stage: StagePlan, config: RootConfig, scenario: Scenario) -> list[str]:
    found = []
    memory = stage.memory
    ranks = min(scenario.per_machine, scenario.world)
    if memory is not None:
        if scenario.gpu and memory.device.peak > scenario.gpu.memory_bytes:
            part, mend = _mend(stage.name, memory.device.parts(), config)
            found.append(
                f"{stage.name}: {memory.device.peak / GIB:,.1f} GiB do not fit into the "
                f"{scenario.gpu.memory_bytes / GIB:,.1f} GiB of a {scenario.gpu.name}; most of it: {part}; "
                f"{mend}"
            )
        if memory.host.peak * ranks > scenario.host_bytes:
            part, mend = _mend(stage.name, memory.host.parts(), config)
            found.append(
                f"{stage.name}: {ranks} x {memory.host.peak / GIB:,.1f} GiB do not fit into the "
                f"{scenario.host_bytes / GIB:,.1f} GiB of a machine; most of it: {part}; {mend}"
            )
    if stage.busy is not None and stage.busy < scenario.world:
        key = _keys(stage.name)[0]
        found.append(
            f"{stage.name}: a batch has micro-batches for {stage.busy} of {scenario.world} ranks, the others "
            f"wait; raise {key}.batch_size or lower {key}.micro_batch"
        )
    if stage.read_rate is not None and stage.read_rate * ranks > scenario.disk_rate:
        found.append(
            f"{stage.name}: a machine has to read {stage.read_rate * ranks / 1e9:,.2f} GB/s until its memory "
            f"holds the data, its disk gives {scenario.disk_rate / 1e9:,.2f}; faster disks, or more memory "
            "than data"
        )
    return found


# What to do about the largest part of a stage, by the name it bears; where the stage matters, by both.
_MENDS = {
    "activations": "lower {train}.micro_batch{beside}",
    "ID rows": "set fusion.id_embedding=shared, or use more ranks",
    "histories of all users": "no key changes that: fewer ranks or more memory per machine, or fewer users",
    "their parts, before they are joined": "no key changes that: fewer ranks or more memory per machine, or "
    "fewer users",
    "histories of validation users": "lower {drawn}.validation_users (0: all of them)",
    "item graphs, at most": "lower ranking.neighbours or ranking.alike (0: none)",
    "singular vectors": "lower fusion.behaviour_dim (0: no behaviour view)",
    "co-occurrence, at most": "lower fusion.behaviour_interactions or fusion.behaviour_window",
    "occurrences of items": "use more ranks",
    "arrows counted, at most": "lower ranking.neighbours (0: no bonus)",
    "optimiser moments": "raise compute.zero_stage, or set compute.offload_optimizer=true",
    "master weights": "raise compute.zero_stage, or set compute.offload_optimizer=true",
    "parameters": "set compute.zero_stage=3",
    "reduce bucket": "lower compute.bucket_elements",
    "gradients": "set compute.zero_stage=2",
    "weights and moments, whole": "lower {width}: rank 0 writes checkpoints from whole tensors",
    "moments as a file": "lower {width}: rank 0 writes checkpoints from whole tensors",
    "batches read ahead": "lower {train}.batch_size",
    "batch": "lower {train}.batch_size",
    "scores": "lower evaluation.batch_users",
    "residuals": "use more ranks, or lower fusion.width",
    "fused vectors": "use more ranks, or lower fusion.width",
    "kernel": "use more ranks, or lower fusion.width",
    "sample, on every rank": "lower quantizer.sample",
    "held-out rows": "lower quantizer.held_out",
    "sorting IDs, about": "set quantizer.collisions=none, or give rank 0's machine more memory",
}


def _mend(stage: str, parts: dict[str, int], config: RootConfig) -> tuple[str, str]:
    """The largest part that something can be done about, with its size; and what."""
    names = [name for name in parts if name in _MENDS]
    if not names:
        largest = next(iter(parts))
        return f"{largest} {parts[largest] / GIB:,.1f} GiB", "use more machines, or larger ones"
    name = names[0]
    train, width = _keys(stage)
    beside = ""
    if stage == "fusion":
        beside = " and fusion.group"
    elif stage in BASELINES:
        beside = f" or baselines.{stage}.candidates"
    elif config.sequence.item_weight > 0:
        beside = " or sequence.candidates"
    drawn = f"baselines.{stage}" if stage in BASELINES else "sequence"
    mend = _MENDS[name].format(train=train, width=width, beside=beside, drawn=drawn)
    if stage in BASELINES:
        mend += f"; or leave {stage} out of evaluation.baselines"
    return f"{name} {parts[name] / GIB:,.1f} GiB", mend


def _keys(stage: str) -> tuple[str, str]:
    """Where a stage's training and the width of its network are set."""
    if stage == "fusion":
        return "fusion.train", "fusion.width"
    if stage in BASELINES:
        return f"baselines.{stage}.train", f"baselines.{stage}.width"
    return f"sequence.{stage}", "sequence.width"


def _assumptions(config: RootConfig, scenario: Scenario, resolved: Resolved) -> tuple[str, ...]:
    sequence = config.sequence
    lengths = sequence_lengths(scenario, longest=sequence.max_items + 1, prefix=sequence.pretrain_prefix)
    per_item = ", ".join(
        f"{m.name} {m.tokens:g} (at most {m.longest}) x {m.dim}"
        for m in scenario.modalities
        if m.kind == "dense"
    )
    base = (
        f"{GPU_BASE / GIB:.1f} GiB of a GPU and {GPU_HOST_BASE / GIB:.1f} GiB of the host are CUDA's"
        if scenario.gpu
        else f"{CPU_BASE / GIB:.2f} GiB are Python, torch and DeepSpeed (measured)"
    )
    peak = scenario.peak(resolved.precision)
    return (
        f"matrix products reach {scenario.mfu:.0%} of {peak / 1e12:,.3g} TFLOP/s a rank (--mfu), and a "
        f"micro-batch takes {1000 * scenario.overhead:g} ms besides (--overhead); a run logs its own `mfu` "
        "and `step_seconds`",
        f"feature tokens of an item: {per_item} (--modality)",
        f"{scenario.interactions:g} interactions a user (--interactions), exponentially distributed, so that "
        f"sequences of pretraining have {lengths.mean:.1f} +- {lengths.deviation:.1f} items (--history)",
        "memory is that of rank 0 in the largest micro-batch of a long training; files mapped by the loader "
        "are not in it, since the system gives them up when memory is short",
        f"{base}; GPU memory lost between the allocator's blocks is not counted",
        f"{scenario.per_machine} ranks and {scenario.host_bytes / GIB:,.0f} GiB a machine (--per-machine, "
        f"--host-memory); a disk reads {scenario.disk_rate / 1e9:g} GB/s (--disk)",
        f"{DISPLAY} bytes to show an item and {USER} for a user's id",
        "hours count no waiting for data or other ranks and no validation; those of evaluation are what its "
        "scores take to move through memory, at least",
        "all items and users are of one domain; every epoch is run, none saved by early stopping",
    )
