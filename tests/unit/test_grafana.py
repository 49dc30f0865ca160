"""cluster/grafana: a dashboard asks for what is exported, and for all of it."""

from __future__ import annotations

import json
import re
from typing import Any

from qbrec.engine.ray_metrics import PREFIX
from qbrec.tracking.export import GAUGES, samples_of
from qbrec.tracking.lines import Line
from tests.support.cli import ROOT

DASHBOARD: dict[str, Any] = json.loads((ROOT / "cluster" / "grafana" / "qbrec.json").read_text())
FUNCTIONS = {"max", "by", "time", "label_values"}


def queries() -> list[str]:
    """Every PromQL expression, those of the variables included."""
    found = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    variables = [v for v in DASHBOARD["templating"]["list"] if v["type"] == "query"]
    return found + [variable["query"]["query"] for variable in variables]


def words(query: str) -> set[str]:
    """Names in a query: metrics, labels, functions. Quoted values and Grafana's variables are none."""
    bare = re.sub(r'"[^"]*"', "", query)
    return set(re.findall(r"(?<![$\w])[A-Za-z_]\w*", bare))


def test_its_metrics_are_exactly_those_exported() -> None:
    asked = {word for query in queries() for word in words(query) if word.startswith(PREFIX)}
    assert asked == {PREFIX + name for name in GAUGES}


def test_its_labels_are_those_of_the_metric() -> None:
    line = Line("s", 1, 1, {"loss": 1.0, "learning_rate": 1.0, "time/data": 1.0, "step_seconds": 1.0} | {
        "data_wait": 0.5, "mfu": 0.5, "ndcg@10": 0.5,
    })  # fmt: skip
    labels = {PREFIX + s.name: {key for key, _ in s.labels} for s in samples_of(line, run="r")}
    assert set(labels) == {PREFIX + name for name in GAUGES}
    for query in queries():
        used = words(query)
        (metric,) = used & set(labels)
        assert used - FUNCTIONS - {metric} <= labels[metric], query


def test_grafana_can_import_it() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    names = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    mentioned = set(re.findall(r"\$\{?([a-z]+)", json.dumps(DASHBOARD)))
    assert mentioned == names
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells), "panels overlap"
    assert max(x for x, _ in cells) < 24
