"""The chapters about what came out: metrics against baselines, slices, semantic IDs, recommendations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qbrec.config import RootConfig
from qbrec.registry.metrics import MODEL, SEEN, metric_rows
from qbrec.registry.recommend import Recommender
from qbrec.report.blocks import Block, Card, Cell, Item, Part, Row, Section, Tile
from qbrec.report.svg import Interval, interval_chart
from qbrec.storage.artifact import Artifact
from qbrec.storage.catalog_view import CatalogView

HEADLINE = "ndcg@10"
CHARTED = ("ndcg@10", "hr@10")
SAMPLE_IDS = 12
SAMPLE_USERS = 4
SAMPLE_K = 5
SAMPLE_HISTORY = 6


def tiles(artifacts: Mapping[str, Artifact]) -> list[Tile]:
    """The headline: ours, the best baseline, the difference."""
    if "evaluation" not in artifacts:
        return []
    metrics = artifacts["evaluation"].load_json("metrics.json")
    values = {name: entry[SEEN][HEADLINE]["mean"] for name, entry in metrics["models"].items()}
    found = [Tile(f"{values[MODEL]:.4f}", f"{HEADLINE.upper()} of {MODEL}, full catalogue")]
    rivals = {name: value for name, value in values.items() if name != MODEL}
    if rivals:
        best = max(rivals, key=lambda name: rivals[name])
        found.append(Tile(f"{rivals[best]:.4f}", f"best baseline: {best}"))
        if rivals[best] > 0:
            found.append(Tile(f"{values[MODEL] / rivals[best] - 1:+.1%}", "against it"))
    return found


def metrics(artifacts: Mapping[str, Artifact]) -> Section | None:
    """All models, all metrics, with intervals; then the slices."""
    if "evaluation" not in artifacts:
        return None
    document = artifacts["evaluation"].load_json("metrics.json")
    names, rows = metric_rows(document)
    charts = []
    for metric in CHARTED:
        if metric in names:
            column = names.index(metric)
            intervals = [
                Interval(model, cell["mean"], cell["low"], cell["high"], strong=model == MODEL)
                for model, row in rows
                if (cell := row[column]) is not None
            ]
            charts.append(
                interval_chart(intervals, title=f"{metric.upper()}, 95 % intervals", x_label=metric.upper())
            )
    blocks = [Block(charts=charts), _table("Seen items removed", names, rows)]
    return Section(
        "results",
        "Results",
        texts=(
            "Every test user's held-out item is ranked among the whole catalogue, never a sample. "
            "Intervals are bootstrap intervals over users.",
        ),
        blocks=blocks,
    )


def _table(title: str, names: list[str], rows: list[tuple[str, list[dict[str, float] | None]]]) -> Block:
    lines = [
        Row(
            (
                Cell(model),
                *(
                    Cell(f"{c['mean']:.4f}", f"{c['low']:.4f}–{c['high']:.4f}") if c else Cell("")
                    for c in row
                ),
            ),
            strong=model == MODEL,
        )
        for model, row in rows
    ]
    head = ("model", *(name.upper() for name in names))
    return Block(title=title, head=head, rows=lines, numeric=frozenset(range(1, len(head))))


def examples(config: RootConfig, artifacts: Mapping[str, Artifact]) -> list[Section]:
    """Semantic IDs with their words, and what the model recommends to some real users."""
    if not {"catalog", "quantizer"} <= set(artifacts):
        return []
    catalog = CatalogView(artifacts["catalog"])
    found = [_semantic_ids(catalog, artifacts["quantizer"])]
    if "finetune" in artifacts:
        section = _recommendations(config, catalog, artifacts)
        if section is not None:
            found.append(section)
    return found


def _semantic_ids(catalog: CatalogView, quantizer: Artifact) -> Section:
    from qbrec.quantizer.labels import describe
    from qbrec.sequence.vocabulary import format_semantic_id

    ids: NDArray[Any] = quantizer.load_npy("semantic_ids.npy")
    labels = quantizer.load_json("labels.json")
    counts = np.asarray(catalog.train_counts)
    rows = np.argsort(-counts, kind="stable")[:SAMPLE_IDS]
    # Neighbours in the order of IDs show what a shared prefix means.
    rows = rows[np.lexsort(np.asarray(ids[rows]).T[::-1])]
    lines = []
    for row, title in zip(rows, catalog.titles(rows), strict=True):
        codes = [int(code) for code in ids[row]]
        lines.append(Row((Cell(title), Cell(format_semantic_id(codes)), Cell(describe(labels, codes)))))
    block = Block(head=("item", "semantic ID", "in words"), rows=lines, code=frozenset({1}))
    text = (
        "The most popular items, sorted by ID. The words are those that set a prefix apart from its siblings."
    )
    return Section("ids", "Semantic IDs read aloud", texts=(text,), blocks=(block,))


def _recommendations(
    config: RootConfig, catalog: CatalogView, artifacts: Mapping[str, Artifact]
) -> Section | None:
    recommender = Recommender.from_artifacts(artifacts, ranking=config.ranking)
    histories = catalog.load_histories(recommender.domain)
    cut = np.asarray(histories.cut)[:, 1]
    lengths = histories.rows.lengths
    users = np.flatnonzero((cut < lengths) & (cut > 0))
    if not len(users):
        return None
    # Spread over all users, the same for the same data: no cherry-picking.
    users = users[np.linspace(0, len(users) - 1, min(SAMPLE_USERS, len(users))).astype(np.int64)]
    past = [np.asarray(histories.rows.row(int(u)))[: cut[u]] for u in users]
    target = [int(histories.rows.row(int(u))[cut[u]]) for u in users]
    k = min(SAMPLE_K, recommender.num_candidates)
    lists = recommender.recommend([catalog.item_ids(rows) for rows in past], k=k)
    target_ids = catalog.item_ids(np.asarray(target))
    cards = []
    for number, (rows, bought, items) in enumerate(zip(past, target_ids, lists, strict=True)):
        recent = [Item(title) for title in catalog.titles(rows[-SAMPLE_HISTORY:])]
        answers = [
            Item(i["title"], i["label"], note="← what came next" if i["item_id"] == bought else "")
            for i in items
        ]
        truth = [Item(catalog.titles(np.asarray([target[number]]))[0])]
        cards.append(
            Card(
                f"Test user {number + 1}",
                (
                    Part("history, most recent last", recent),
                    Part("recommended", answers),
                    Part("what came next", truth),
                ),
            )
        )
    text = "Users are taken at even distances through the test set, not chosen by how well they are served."
    return Section("examples", "Recommendations", texts=(text,), blocks=(Block(cards=cards),))
