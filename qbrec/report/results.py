"""The chapter about what came out: metrics beside the champion and all baselines, slices, coverage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, TypeVar

from qbrec.evaluation.results import IDS_ALONE, MODEL
from qbrec.registry.metrics import HEADLINE, Cells, cells_of, metric_names, qbrec_cells
from qbrec.registry.standing import Rival, Standing
from qbrec.report.blocks import Block, Cell, Row, Section, Tile, cells
from qbrec.report.decision import comparable, rival_name
from qbrec.report.svg import Interval, interval_chart
from qbrec.storage.artifact import Artifact

CHARTED = ("ndcg@10", "hr@10")
_SLICES = (
    "By the item sought: cold was never bought in training, head is among the most popular fifth, tail is "
    "not. By the user: short has at most five items before it, long has more; non duplicate has no "
    "near-duplicate of it there."
)
_Value = TypeVar("_Value")


def tiles(artifacts: Mapping[str, Artifact], standing: Standing | None) -> list[Tile]:
    """The headline: ours, and what it gains over the champion and the best baseline."""
    if "evaluation" not in artifacts:
        return []
    document = artifacts["evaluation"].load_json("metrics.json")
    values = {name: cells[HEADLINE]["mean"] for name, cells in cells_of(document["models"]).items()}
    found = [Tile(f"{values[MODEL]:.4f}", f"{HEADLINE.upper()} of {MODEL}, full catalogue")]
    rival = comparable(standing)
    if rival is not None:
        found.append(_gain(asdict(rival.paired[HEADLINE]), f"the {rival_name(rival)}"))
    baselines = {name: value for name, value in values.items() if name not in (MODEL, IDS_ALONE)}
    if baselines:
        best = max(baselines, key=lambda name: baselines[name])
        found.append(_gain(cells_of(document["paired"])[best][HEADLINE], f"{best}, the best baseline"))
    return [*found, Tile(f"{document['protocol']['num_users']:,}", "test users, each ranked exactly")]


def metrics(artifacts: Mapping[str, Artifact], standing: Standing | None) -> Section | None:
    """All models, all metrics, with intervals; paired differences; slices."""
    if "evaluation" not in artifacts:
        return None
    document = artifacts["evaluation"].load_json("metrics.json")
    protocol, rival = document["protocol"], comparable(standing)
    models, paired = cells_of(document["models"]), cells_of(document["paired"])
    coverage = {MODEL: document["coverage"][MODEL], **document["coverage"]}
    if rival is not None:
        name = rival_name(rival)
        models = _second(models, name, qbrec_cells(rival.metrics))
        paired = _second(paired, name, {k: asdict(v) for k, v in rival.paired.items() if k in models[MODEL]})
        coverage = _second(coverage, name, rival.metrics["coverage"][MODEL])
    charts = [
        interval_chart(
            [
                Interval(model, c[name]["mean"], c[name]["low"], c[name]["high"], strong=model == MODEL)
                for model, c in models.items()
            ],
            title=f"{name.upper()}, {protocol['confidence']:.0%} intervals",
            x_label=name.upper(),
        )
        for name in CHARTED
    ]
    blocks = [
        Block(charts=charts),
        _table("All metrics", models),
        _table(f"{MODEL} minus the others, user by user", paired, first="against", sign="+"),
        _slices({name: part for name, part in document["slices"].items() if part["models"]}, rival),
        Block(
            title="Coverage",
            text="Share of the candidates that are in anybody's top 10.",
            head=("model", "coverage"),
            rows=[
                Row(cells((name, f"{share:.1%}")), strong=name == MODEL) for name, share in coverage.items()
            ],
            numeric=frozenset({1}),
        ),
    ]
    text = (
        f"The held-out item of each of {protocol['num_users']:,} users is ranked among all "
        f"{protocol['num_candidates']:,} items of {protocol['domain']}, never a sample; items seen before "
        f"are removed. Intervals: {protocol['confidence']:.0%}, {protocol['bootstrap']:,} bootstrap "
        "resamples over users."
    )
    texts = [text]
    if IDS_ALONE in models:
        texts.append(f"{IDS_ALONE} is {MODEL} without the bonus of item graphs: its semantic IDs alone.")
    return Section(
        "results", "Results", texts=texts, blocks=[block for block in blocks if block.rows or block.charts]
    )


def _second(found: Mapping[str, _Value], name: str, value: _Value) -> dict[str, _Value]:
    """With one more entry, behind our own where there is that."""
    first = {MODEL: found[MODEL]} if MODEL in found else {}
    return {**first, name: value, **found}


def _gain(cell: Mapping[str, float], against: str) -> Tile:
    shown = _cell(cell, "+")
    return Tile(shown.text, f"{HEADLINE.upper()} against {against} ({shown.note})")


def _table(title: str, models: Mapping[str, Cells], *, first: str = "model", sign: str = "") -> Block:
    names = metric_names(models)
    rows = [
        Row((Cell(model), *(_cell(row[name], sign) for name in names)), strong=model == MODEL)
        for model, row in models.items()
    ]
    head = (first, *(name.upper() for name in names))
    return Block(title=title, head=head, rows=rows, numeric=frozenset(range(1, len(head))))


def _slices(slices: Mapping[str, Any], rival: Rival | None) -> Block:
    """One row per slice, one column per model, of the headline metric."""
    rows: list[Row] = []
    head: tuple[str, ...] = ()
    for name, part in slices.items():
        models = {model: _cell(c[HEADLINE], "") for model, c in cells_of(part["models"]).items()}
        if rival is not None:
            theirs = qbrec_cells(rival.metrics["slices"].get(name, {})).get(HEADLINE)
            gain = rival.paired.get(HEADLINE if name == "all" else f"{name}/{HEADLINE}")
            models = _second(models, "difference", _cell(asdict(gain), "+") if gain else Cell("–"))
            models = _second(models, rival_name(rival), _cell(theirs, "") if theirs else Cell("–"))
        rows.append(Row((Cell(name.replace("_", " ")), Cell(f"{part['num_users']:,}"), *models.values())))
        head = ("slice", "users", *models)
    title = f"{HEADLINE.upper()} by slice"
    return Block(title=title, text=_SLICES, head=head, rows=rows, numeric=frozenset(range(1, len(head))))


def _cell(cell: Mapping[str, float], sign: str) -> Cell:
    mean, low, high = (f"{_rounded(cell[key]):{sign}.4f}" for key in ("mean", "low", "high"))
    return Cell(mean, f"{low} … {high}")


def _rounded(value: float) -> float:
    """To four decimals, and never -0."""
    return round(value, 4) + 0.0
