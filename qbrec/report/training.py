"""The chapter about the training: loss, validation and speed of every trained stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from qbrec.report.blocks import Block, Row, Section, cells
from qbrec.report.run_log import read_curves
from qbrec.report.svg import Series, line_chart, number
from qbrec.storage.artifact import Artifact

TRAINED = {
    "fusion": "Fusion: cross-modal injection",
    "quantizer": "Quantizer",
    "pretrain": "Masked pretraining",
    "finetune": "Fine-tuning",
    "sasrec": "Baseline SASRec",
    "bert4rec": "Baseline BERT4Rec",
}
# Of the many that are logged, those that tell how a training went; one chart each. The rest is in the table.
_CHARTS: tuple[tuple[str, Callable[[str], bool]], ...] = (
    ("Loss", lambda name: name.split("/")[0] == "loss"),
    ("Validation, full catalogue", ("ndcg@10", "hr@10").__contains__),
    ("Validation: an item finds its own views", lambda name: name.split("/")[0] == "retrieval"),
    ("Seconds of a step, by phase", lambda name: name.startswith("time/")),
)
_LEFT_OUT = ("num_users",)

Points = Sequence[tuple[float, float]]


def training(run_dir: Path, artifacts: Mapping[str, Artifact]) -> Section | None:
    """Curves of every stage that this run trained, and all that it logged."""
    curves = read_curves(run_dir)
    blocks: list[Block] = []
    for stage, title in TRAINED.items():
        found = {name: points for name, points in curves.get(stage, {}).items() if name not in _LEFT_OUT}
        if found:
            blocks += (Block(title=title, charts=_charts(found)), _logged(found))
    elsewhere = [stage for stage in TRAINED if stage in artifacts and stage not in curves]
    text = f"Reused, and so in the report of the run that trained them: {', '.join(elsewhere)}."
    if not blocks and not elsewhere:
        return None
    return Section("training", "Training", texts=(text,) if elsewhere else (), blocks=blocks)


def _charts(curves: Mapping[str, Points]) -> list[str]:
    charts = []
    for title, belongs in _CHARTS:
        series = [
            Series(name.removeprefix("time/"), points) for name, points in curves.items() if belongs(name)
        ]
        charts.append(line_chart(series, title=title, x_label="step"))
    return [chart for chart in charts if chart]


def _logged(curves: Mapping[str, Points]) -> Block:
    rows = [
        Row(cells((name, len(points), *map(number, (points[0][1], min(y), max(y), points[-1][1])))))
        for name, points in curves.items()
        for y in [[value for _, value in points]]
    ]
    return Block(
        summary="All that was logged",
        head=("metric", "times", "first", "least", "most", "last"),
        rows=rows,
        numeric=frozenset(range(1, 6)),
    )
