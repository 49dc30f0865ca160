"""The chapter about the flow: what was trained on what, how long it took and at what cost."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qbrec.config import RootConfig
from qbrec.report.blocks import Block, Cell, Row, Section, Stage
from qbrec.report.run_log import duration, read_seconds
from qbrec.report.svg import number
from qbrec.stages import BASELINES, stages_of
from qbrec.stages import Stage as Step
from qbrec.storage.artifact import Artifact


@dataclass(frozen=True)
class _Spent:
    """What a stage took: seconds, by whom, and worker-hours (NaN: nobody noted by how many)."""

    seconds: float
    by: str
    worker_hours: float


def flow(config: RootConfig, run_dir: Path, artifacts: Mapping[str, Artifact]) -> Section:
    """Every stage with its time and what came out."""
    seconds = read_seconds(run_dir)
    steps = stages_of(config)
    stages = []
    for name in (step.name for step in steps):
        artifact = artifacts.get(name)
        if artifact is None:
            stages.append(Stage(name=name, time="not run", fact="", fingerprint=""))
            continue
        fact = _fact(name, artifact, config)
        time = _time(seconds.get(name, 0.0))
        stages.append(Stage(name=name, time=time, fact=fact, fingerprint=artifact.fingerprint[:12]))
    text = f"Seed {config.run.seed}. A stage whose inputs and configuration have not changed is reused."
    spent = {
        step.name: _spent(step, artifacts[step.name], seconds.get(step.name, 0.0))
        for step in steps
        if step.name in artifacts
    }
    blocks = [_costs(config, spent, artifacts["catalog"])] if "catalog" in artifacts else []
    return Section("flow", "The flow", texts=(text,), flow=stages, blocks=blocks)


def _spent(step: Step, artifact: Artifact, seconds: float) -> _Spent:
    if not step.distributed:
        return _Spent(seconds, "driver, Ray tasks", 0.0)
    made_by = artifact.manifest.get("made_by")
    if not made_by:  # by a version of qbrec that did not note it
        return _Spent(seconds, "–", math.nan if seconds else 0.0)
    device = "GPU" if made_by["device"] == "cuda" else "CPU"
    return _Spent(seconds, f"{made_by['workers']} × {device}", seconds / 3600 * made_by["workers"])


def _costs(config: RootConfig, spent: Mapping[str, _Spent], catalog: Artifact) -> Block:
    """Time, worker-hours and money, stage by stage and together."""
    price = config.compute.cost_per_hour
    seconds = sum(one.seconds for one in spent.values())
    hours = sum(one.worker_hours for one in spent.values())

    def row(texts: Sequence[str], seconds: float, hours: float) -> list[Cell]:
        money = [f"{seconds / 3600 * price:,.2f}"] if price else []
        return [Cell(text) for text in (*texts, number(hours) if hours else "–", *money)]

    rows = [
        Row(
            row(
                (name, _trained_on(name, catalog, config), _time(one.seconds), one.by),
                one.seconds,
                one.worker_hours,
            )
        )
        for name, one in spent.items()
    ]
    rows.append(Row(row(("together", "", duration(seconds), ""), seconds, hours), strong=True))
    head = ("stage", "on what", "time", "workers", "worker-hours", *(("cost",) if price else ()))
    return Block(
        title="What was trained on what, and at what cost",
        text=" ".join(_explained(config)),
        head=head,
        rows=rows,
        numeric=frozenset(range(2, len(head))),
    )


def _explained(config: RootConfig) -> Iterator[str]:
    least, most = config.compute.worker_range
    yield "Worker-hours: time × workers, for stages that are trained by a group of them."
    if least < most:
        yield "The number of workers is the one at the end of a stage; it may have been another before."
    yield "The time of attempts that were cut off counts, unless their driver was killed outright."
    if config.compute.cost_per_hour:
        yield f"Cost: time × {config.compute.cost_per_hour:,.2f} an hour for all machines together."
    else:
        yield "With compute.cost_per_hour set there is a column for money."


def _time(seconds: float) -> str:
    # The pipeline notes 0 where the artifact of another run was found.
    return duration(seconds) if seconds else "reused"


def _trained_on(name: str, catalog: Artifact, config: RootConfig) -> str:
    meta = catalog.meta
    domains, target = ", ".join(meta["domains"]), meta["target_domain"]
    items = f"all {meta['num_items']:,} items of {domains}"
    if name == "catalog":
        return f"items and interactions of {domains}"
    if name == "fusion":
        return f"{items}: {', '.join(meta['modalities'])}, categories and brands where there are any"
    if name == "quantizer":
        return f"the fused vectors of {items}"
    if name == "neighbours":
        return f"training part of the histories of {target}, content of its items"
    if name == "pretrain":
        return f"training part of the histories of {domains}"
    if name == "finetune":
        return f"training part of the histories of {target}; weights chosen on its validation part"
    if name in BASELINES:
        return "as fine-tuning, with item ids in place of semantic IDs"
    return f"test part of the histories of {target}"


def _fact(name: str, artifact: Artifact, config: RootConfig) -> str:
    meta = artifact.meta
    if name == "catalog":
        return f"{meta['num_items']:,} items, {meta['num_interactions']:,} interactions"
    if name == "fusion":
        return f"width {config.fusion.width}, depth {config.fusion.depth}"
    if name == "quantizer":
        return f"{' × '.join(str(k) for k in meta['levels'])} codes, {config.quantizer.method}"
    if name == "neighbours":
        return f"{sum(meta['arrows'].values()):,} arrows: {', '.join(meta['arrows'])}"
    if name in ("pretrain", "finetune"):
        return f"layers: {config.sequence.layers}, width {config.sequence.width}"
    if name in BASELINES:
        return f"best of {meta['epochs']} epochs: {meta['best']['epoch']}"
    return f"{len(config.evaluation.baselines)} baselines, {config.evaluation.bootstrap:,} resamples"
