"""The chapter about the codebooks: usage, what they explain, how items share IDs, the tree of IDs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qbrec.report.blocks import Block, Cell, Row, Section, cells
from qbrec.report.id_tree import count_codes, id_tree
from qbrec.report.svg import Series, bar_chart, grouped_bar_chart, line_chart
from qbrec.storage.artifact import Artifact
from qbrec.storage.catalog_view import CatalogView

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
# Figures of IDs in the order in which they are read; both as encoded and as published.
_FIGURES = {
    "unique_ids": "different IDs",
    "no_collision_rate": "items alone on their ID",
    "collision_rate": "items that share an ID with other content",
    "duplicate_rate": "items with an equal one in the catalogue",
    "largest_bucket": "items on the fullest ID",
    "largest_bucket_contents": "different contents on the fullest ID",
    "contents_alone_rate": "different contents alone on their ID",
    "split_contents": "equal contents on several IDs",
    "gini": "Gini of the items per ID",
}


def codebooks(artifacts: Mapping[str, Artifact]) -> Section | None:
    """Pictures and figures of quality.json, the tree of IDs; figures an older run lacks are left out."""
    if "quantizer" not in artifacts:
        return None
    artifact = artifacts["quantizer"]
    quality: dict[str, Any] = artifact.load_json("quality.json")
    ids = artifact.load_npy("semantic_ids.npy")
    charts = [chart for chart in _charts(quality, ids) if chart]
    blocks = [Block(charts=charts), _levels(quality), _ids(quality)]
    if "catalog" in artifacts:
        catalog = CatalogView(artifacts["catalog"])
        blocks.append(_tree(ids, artifact.load_json("labels.json"), catalog))
    text = (
        "A good codebook uses its codes evenly, explains items that no fit has seen, and puts like beside "
        "like. An ID should be shared only by items of equal content."
    )
    return Section("codebooks", "Codebooks and semantic IDs", texts=(text,), blocks=blocks)


def _charts(quality: Mapping[str, Any], ids: NDArray[Any]) -> list[str]:
    levels = quality["levels"]
    names = _names(levels)
    usage = [
        Series(name, _frequencies(count_codes(ids, level, int(entry["codes"]))))
        for level, (name, entry) in enumerate(zip(names, levels, strict=True))
    ]
    energy = [
        Series(name, [(0.0, 1.0), *((float(n), e[key]) for n, e in enumerate(levels, start=1))])
        for name, key in (("held-out items", "residual_energy_held_out"), ("all items", "residual_energy"))
        if all(key in entry for entry in levels)
    ]
    tables = {"as encoded": quality.get("raw", {}), "published": quality}
    sizes = {name: part["bucket_contents"] for name, part in tables.items() if "bucket_contents" in part}
    longest: list[dict[str, int]] = max(sizes.values(), key=len, default=[])
    prefixes = {name: part["prefixes"] for name, part in tables.items() if "prefixes" in part}
    near = quality.get("cohesion", ())
    return [
        line_chart(usage, title="Items per code, most used first", x_label="code, by rank", from_zero=True),
        bar_chart(
            names,
            [entry["perplexity"] / entry["codes"] for entry in levels],
            title="Perplexity as a share of the codes",
            x_label="1: all codes equally often",
        ),
        line_chart(
            energy, title="Variance left after each level", x_label="levels of the ID", from_zero=True
        ),
        grouped_bar_chart(
            [f"{entry['prefix']} code{'s' if entry['prefix'] > 1 else ''}" for entry in near],
            {
                "same prefix": [entry["cohesion"] for entry in near],
                "shuffled IDs": [entry["shuffled"] for entry in near],
            },
            title="Mean cosine of two items",
            x_label="shared prefix",
        ),
        grouped_bar_chart(
            [_range(bin["up_to"]) for bin in longest],
            {
                name: [float(bin["items"]) for bin in bins] + [0.0] * (len(longest) - len(bins))
                for name, bins in sizes.items()
            },
            title="Items by contents on their ID",
            x_label="different contents on one ID",
        ),
        line_chart(
            [
                Series(name, [(float(n), float(count)) for n, count in enumerate(counts, start=1)])
                for name, counts in prefixes.items()
            ],
            title="Different prefixes",
            x_label="codes of the prefix",
            from_zero=True,
        ),
    ]


def _levels(quality: Mapping[str, Any]) -> Block:
    levels = quality["levels"]
    explained = all("r2_held_out" in entry for entry in levels)
    rows = [
        Row(
            cells(
                (
                    name,
                    entry["codes"],
                    entry["used"],
                    entry["dead"],
                    f"{entry['perplexity']:.1f}",
                    f"{entry['largest_share']:.2%}",
                    *((f"{entry['r2_held_out']:.3f}",) if explained else ()),
                )
            )
        )
        for name, entry in zip(_names(levels), levels, strict=True)
    ]
    head = ("level", "codes", "used", "dead", "perplexity", "largest code", *(("R², held out",) * explained))
    return Block(title="Levels, as encoded", head=head, rows=rows, numeric=frozenset(range(1, len(head))))


def _ids(quality: Mapping[str, Any]) -> Block:
    raw = quality.get("raw", {})
    rows = [
        Row((Cell(name), *(Cell(_figure(key, part[key])) for part in (raw, quality) if part)))
        for key, name in _FIGURES.items()
        if key in quality and (not raw or key in raw)
    ]
    moved = quality.get("moved")
    text = (
        f"Collisions: {moved:,} items moved to another ID, {quality['unresolved']:,} found no room."
        if moved is not None
        else ""
    )
    head = ("figure", *(("as encoded",) if raw else ()), "published")
    numeric = frozenset(range(1, len(head)))
    return Block(title="How items share IDs", text=text, head=head, rows=rows, numeric=numeric)


def _tree(ids: NDArray[Any], labels: Mapping[str, list[str]], catalog: CatalogView) -> Block:
    def names_of(rows: NDArray[np.int64]) -> list[str]:
        pairs = zip(catalog.titles(rows), catalog.item_ids(rows), strict=True)
        return [title or item_id for title, item_id in pairs]

    tree = id_tree(ids, labels, popularity=np.asarray(catalog.train_counts), names_of=names_of)
    text = (
        "Open a code to see what is below it. Each line: the words that set a prefix apart, how many items it"
        " has, and some of the most popular; the largest codes come first. "
        f"{tree.shown:,} prefixes are here; of level a, {tree.left_out}."
    )
    return Block(title="The tree of IDs", text=text, tree=tree.branches)


def _names(levels: list[Any]) -> list[str]:
    return [f"level {_LETTERS[number]}" for number in range(len(levels))]


def _frequencies(counts: NDArray[np.int64]) -> list[tuple[float, float]]:
    return [(float(rank), float(count)) for rank, count in enumerate(np.sort(counts)[::-1], start=1)]


def _range(up_to: int) -> str:
    return str(up_to) if up_to <= 2 else f"{up_to // 2 + 1}–{up_to}"


def _figure(name: str, value: float) -> str:
    if name.endswith("_rate"):
        return f"{value:.2%}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
