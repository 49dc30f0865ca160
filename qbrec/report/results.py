"""The chapters about what came out: metrics against baselines, slices, semantic IDs, recommendations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qbrec.config import RootConfig
from qbrec.evaluation.results import IDS_ALONE, MODEL
from qbrec.registry.metrics import Cells, cells_of, metric_names
from qbrec.registry.recommend import Recommender
from qbrec.report.blocks import Block, Card, Cell, Item, Part, Row, Section, Tile, cells
from qbrec.report.svg import Interval, interval_chart
from qbrec.storage.artifact import Artifact
from qbrec.storage.catalog_view import CatalogView

HEADLINE = "ndcg@10"
CHARTED = ("ndcg@10", "hr@10")
SAMPLE_IDS = 12
SAMPLE_USERS = 6
SAMPLE_K = 5
SAMPLE_HISTORY = 6


def tiles(artifacts: Mapping[str, Artifact]) -> list[Tile]:
    """The headline: ours, the best baseline, the difference."""
    if "evaluation" not in artifacts:
        return []
    document = artifacts["evaluation"].load_json("metrics.json")
    values = {name: cells[HEADLINE]["mean"] for name, cells in cells_of(document["models"]).items()}
    found = [Tile(f"{values[MODEL]:.4f}", f"{HEADLINE.upper()} of {MODEL}, full catalogue")]
    rivals = {name: value for name, value in values.items() if name not in (MODEL, IDS_ALONE)}
    if rivals:
        best = max(rivals, key=lambda name: rivals[name])
        found.append(Tile(f"{rivals[best]:.4f}", f"best baseline: {best}"))
        if rivals[best] > 0:
            found.append(Tile(f"{values[MODEL] / rivals[best] - 1:+.1%}", f"{MODEL} against it"))
    return [*found, Tile(f"{document['protocol']['num_users']:,}", "test users, each ranked exactly")]


def metrics(artifacts: Mapping[str, Artifact]) -> Section | None:
    """All models, all metrics, with intervals; paired differences; slices."""
    if "evaluation" not in artifacts:
        return None
    document = artifacts["evaluation"].load_json("metrics.json")
    models, protocol = cells_of(document["models"]), document["protocol"]
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
    coverage = [
        Row(cells((name, f"{share:.1%}")), strong=name == MODEL)
        for name, share in document["coverage"].items()
    ]
    blocks = [
        Block(charts=charts),
        _table("All metrics", models),
        _table(
            f"{MODEL} minus the baseline, user by user",
            cells_of(document["paired"]),
            first="against",
            sign="+",
        ),
        _slices(document["slices"]),
        Block(
            title="Coverage",
            text="Share of the candidates that are in anybody's top 10.",
            head=("model", "coverage"),
            rows=coverage,
            numeric=frozenset({1}),
        ),
    ]
    text = (
        f"The held-out item of each of {protocol['num_users']:,} users is ranked among all "
        f"{protocol['num_candidates']:,} items of {protocol['domain']}, never a sample; items seen before "
        f"are removed. Intervals: {protocol['confidence']:.0%}, {protocol['bootstrap']:,} bootstrap "
        "resamples over users."
    )
    return Section(
        "results", "Results", texts=(text,), blocks=[block for block in blocks if block.rows or block.charts]
    )


def _table(title: str, models: Mapping[str, Cells], *, first: str = "model", sign: str = "") -> Block:
    names = metric_names(models)
    rows = [
        Row((Cell(model), *(_cell(row[name], sign) for name in names)), strong=model == MODEL)
        for model, row in models.items()
    ]
    head = (first, *(name.upper() for name in names))
    return Block(title=title, head=head, rows=rows, numeric=frozenset(range(1, len(head))))


def _slices(slices: Mapping[str, Any]) -> Block:
    """One row per slice, one column per model, of the headline metric."""
    parts = {
        name: (part["num_users"], cells_of(part["models"])) for name, part in slices.items() if part["models"]
    }
    models = list(next(iter(parts.values()))[1]) if parts else []
    rows = [
        Row(
            (
                Cell(name.replace("_", " ")),
                Cell(f"{users:,}"),
                *(_cell(table[m][HEADLINE], "") for m in models),
            )
        )
        for name, (users, table) in parts.items()
    ]
    head = ("slice", "users", *models)
    title = f"{HEADLINE.upper()} by slice"
    return Block(title=title, head=head, rows=rows, numeric=frozenset(range(1, len(head))))


def _cell(cell: Mapping[str, float], sign: str) -> Cell:
    return Cell(f"{cell['mean']:{sign}.4f}", f"{cell['low']:{sign}.4f} … {cell['high']:{sign}.4f}")


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
