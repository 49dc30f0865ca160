"""The chapters that describe the run: flow, data, training, codebooks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qbrec.config import RootConfig
from qbrec.report.blocks import Block, Cell, Row, Section, Stage, cells
from qbrec.report.run_log import duration, read_curves, read_seconds
from qbrec.report.svg import Series, bar_chart, line_chart, number
from qbrec.storage.artifact import Artifact

STAGES = ("catalog", "fusion", "quantizer", "pretrain", "finetune", "evaluation")
TRAINED = {
    "fusion": "Fusion: cross-modal injection",
    "quantizer": "Quantizer",
    "pretrain": "Masked pretraining",
    "finetune": "Fine-tuning",
}
_HIDDEN = ("learning_rate",)
_MAX_BUCKETS = 5_000_000  # items up to which the sizes of the ID buckets are counted here


def flow(config: RootConfig, run_dir: Path, artifacts: Mapping[str, Artifact]) -> Section:
    """Every stage with its time and what came out."""
    seconds = read_seconds(run_dir)
    stages = []
    for name in STAGES:
        artifact = artifacts.get(name)
        if artifact is None:
            stages.append(Stage(name=name, time="not run", fact="", fingerprint=""))
            continue
        # The pipeline notes 0 where the artifact of another run was found.
        took = duration(seconds[name]) if seconds.get(name) else "reused"
        fact = _fact(name, artifact, config)
        stages.append(Stage(name=name, time=took, fact=fact, fingerprint=artifact.fingerprint[:12]))
    text = f"Seed {config.run.seed}. A stage whose inputs and configuration have not changed is reused."
    return Section("flow", "The flow", texts=(text,), flow=stages)


def data(artifacts: Mapping[str, Artifact], config: RootConfig) -> Section | None:
    """What it was trained on."""
    if "catalog" not in artifacts:
        return None
    meta = artifacts["catalog"].meta
    counts = [
        ("items", meta["num_items"]),
        ("users", meta["num_users"]),
        ("interactions", meta["num_interactions"]),
        ("test users", meta.get("eval_users", "–")),
    ]
    rows = [Row(cells(pair)) for pair in counts]
    rows += [
        Row((Cell(f"rejected: {why}"), Cell(f"{n:,}")))
        for why, n in sorted(meta.get("rejected", {}).items())
        if n
    ]
    modalities = [
        Row(
            cells(
                (
                    name,
                    entry["dim"],
                    entry["max_tokens"],
                    entry["present"],
                    f"{entry['present'] / max(1, meta['num_items']):.1%}",
                )
            )
        )
        for name, entry in meta["modalities"].items()
    ]
    sources = [Row(cells((name, d.items, d.interactions))) for name, d in config.data.domains.items()]
    split = config.catalog.split.replace("_", " ")
    target = f"Fine-tuned and evaluated on {meta['target_domain']!r}; split: {split}."
    return Section(
        "data",
        "The data",
        texts=(target,),
        blocks=(
            Block(head=("what", "count"), rows=rows, numeric=frozenset({1})),
            Block(
                title="Modalities",
                head=("modality", "width", "tokens", "items that have it", "share"),
                rows=modalities,
                numeric=frozenset({1, 2, 3, 4}),
            ),
            Block(
                title="Sources",
                head=("domain", "items", "interactions"),
                rows=sources,
                code=frozenset({1, 2}),
            ),
        ),
    )


def training(run_dir: Path) -> Section | None:
    """Loss and validation curves of every trained stage."""
    curves = read_curves(run_dir)
    blocks = []
    for stage in [*TRAINED, *sorted(set(curves) - set(TRAINED))]:
        charts = [
            line_chart([Series(name, points)], title=name, x_label="step")
            for name, points in curves.get(stage, {}).items()
            if name not in _HIDDEN and len(points) > 1
        ]
        single = [
            Row(cells((name, number(points[0][1]))))
            for name, points in curves.get(stage, {}).items()
            if name not in _HIDDEN and len(points) == 1
        ]
        charts = [chart for chart in charts if chart]
        if charts or single:
            head = ("metric", "value") if single else ()
            title = TRAINED.get(stage, stage)
            blocks.append(Block(title=title, charts=charts, head=head, rows=single, numeric=frozenset({1})))
    return Section("training", "Training", blocks=blocks) if blocks else None


def codebooks(artifacts: Mapping[str, Artifact]) -> Section | None:
    """Usage of the codes, sizes of the buckets, and what the quality check found."""
    if "quantizer" not in artifacts:
        return None
    artifact = artifacts["quantizer"]
    quality: dict[str, Any] = artifact.load_json("quality.json")
    ids = artifact.load_npy("semantic_ids.npy")
    levels = quality["levels"]
    names = [f"level {chr(97 + i)}" for i in range(len(levels))]
    rows = [
        Row(
            cells(
                (n, e["codes"], e["used"], e["dead"], f"{e['perplexity']:.1f}", f"{e['largest_share']:.2%}")
            )
        )
        for n, e in zip(names, levels, strict=True)
    ]
    usage = [
        Series(name, _frequencies(np.asarray(ids[:, level]), int(entry["codes"])))
        for level, (name, entry) in enumerate(zip(names, levels, strict=True))
    ]
    charts = [
        line_chart(usage, title="Items per code, most used first", x_label="code, by rank"),
        bar_chart(
            names,
            [e["perplexity"] / e["codes"] for e in levels],
            title="Perplexity as a share of the codes",
            x_label="level",
        ),
    ]
    if len(ids) <= _MAX_BUCKETS:
        labels, values = _bucket_sizes(np.asarray(ids))
        charts.append(
            bar_chart(
                labels, values, title="Items by how many share their ID", x_label="items on the same ID"
            )
        )
    others = [Row((Cell(name), Cell(value))) for name, value in _facts(quality)]
    return Section(
        "codebooks",
        "Codebooks and semantic IDs",
        texts=(
            "A good codebook uses its codes evenly; an ID should be shared only by items of equal content.",
        ),
        blocks=(
            Block(charts=charts),
            Block(
                head=("level", "codes", "used", "dead", "perplexity", "largest code"),
                rows=rows,
                numeric=frozenset({1, 2, 3, 4, 5}),
            ),
            Block(title="Quality", head=("figure", "value"), rows=others, numeric=frozenset({1})),
        ),
    )


def _fact(name: str, artifact: Artifact, config: RootConfig) -> str:
    meta = artifact.meta
    if name == "catalog":
        return f"{meta['num_items']:,} items, {meta['num_interactions']:,} interactions"
    if name == "fusion":
        return f"width {config.fusion.width}, depth {config.fusion.depth}"
    if name == "quantizer":
        return f"{' × '.join(str(k) for k in meta['levels'])} codes, {config.quantizer.method}"
    if name in ("pretrain", "finetune"):
        return f"layers: {config.sequence.layers}, width {config.sequence.width}"
    return f"{len(config.evaluation.baselines)} baselines, {config.evaluation.bootstrap:,} resamples"


def _frequencies(codes: NDArray[Any], size: int) -> list[tuple[float, float]]:
    counts = np.sort(np.bincount(codes, minlength=size))[::-1]
    return [(float(rank + 1), float(count)) for rank, count in enumerate(counts)]


def _bucket_sizes(ids: NDArray[Any]) -> tuple[list[str], list[float]]:
    """Number of items whose ID is shared by 1, 2, 3-4, 5-8, … items."""
    _, sizes = np.unique(ids, axis=0, return_counts=True)
    edges = [1]
    while edges[-1] < sizes.max():
        edges.append(edges[-1] * 2)
    labels, values, below = [], [], 0
    for edge in edges:
        inside = (sizes > below) & (sizes <= edge)
        labels.append(str(edge) if edge <= below + 1 else f"{below + 1}–{edge}")
        values.append(float(sizes[inside].sum()))
        below = edge
    return labels, values


def _facts(quality: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Everything else in quality.json, flat and readable."""
    found: list[tuple[str, str]] = []
    for key, value in quality.items():
        name = f"{prefix} {key}".strip().replace("_", " ")
        if key == "levels" and not prefix:
            continue
        if isinstance(value, Mapping):
            found += _facts(value, name)
        elif isinstance(value, list):
            for index, entry in enumerate(value):
                if isinstance(entry, Mapping):
                    found += _facts(entry, f"{name} {index + 1}")
                elif isinstance(entry, int | float):
                    found.append((f"{name} {index + 1}", _figure(entry)))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append((name, _figure(value)))
    return found


def _figure(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
