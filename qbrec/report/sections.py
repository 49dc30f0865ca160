"""The chapters that describe the run: flow, data, training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qbrec.config import RootConfig
from qbrec.report.blocks import Block, Cell, Row, Section, Stage, cells
from qbrec.report.run_log import duration, read_curves, read_seconds
from qbrec.report.svg import Series, line_chart, number
from qbrec.stages import BASELINES, stages_of
from qbrec.storage.artifact import Artifact

TRAINED = {
    "fusion": "Fusion: cross-modal injection",
    "quantizer": "Quantizer",
    "pretrain": "Masked pretraining",
    "finetune": "Fine-tuning",
    "sasrec": "Baseline SASRec",
    "bert4rec": "Baseline BERT4Rec",
}
_HIDDEN = ("learning_rate",)


def flow(config: RootConfig, run_dir: Path, artifacts: Mapping[str, Artifact]) -> Section:
    """Every stage with its time and what came out."""
    seconds = read_seconds(run_dir)
    stages = []
    for name in (stage.name for stage in stages_of(config)):
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
