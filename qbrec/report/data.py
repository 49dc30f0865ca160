"""The chapter about the data: how much of what, and where it came from."""

from __future__ import annotations

from collections.abc import Mapping

from qbrec.config import RootConfig
from qbrec.report.blocks import Block, Cell, Row, Section, cells
from qbrec.storage.artifact import Artifact


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
