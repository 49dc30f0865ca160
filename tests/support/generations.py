"""Catalogues and generations written without Ray: by the very functions that the Ray tasks call."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from qbrec.catalog.append.classify import ClassifyJob
from qbrec.catalog.encoders.encode import as_binary
from qbrec.catalog.parts import join_parts
from qbrec.catalog.shards import ShardJob
from qbrec.storage.artifact import Artifact, ArtifactStore, ArtifactWriter
from qbrec.storage.blocks import write_block_index
from qbrec.storage.generations import GenerationsView
from qbrec.storage.hashing import hash64

WIDTH = 3
DOMAINS = ("pets", "games")
Item = tuple[str, str, int]  # domain, id, version


def feature(name: str, version: int) -> np.ndarray[Any, np.dtype[np.float16]]:
    """Tokens of an item's version: none of version 0, else one or two, float16 [t, WIDTH]."""
    tokens = min(version, 1 + len(name) % 2)
    return np.full((tokens, WIDTH), version * 10 + len(name), np.float16)


def shown(version: int) -> int:
    """What an item shows: versions 1 and 2 differ in their content alone, 3 and 4 in what they show."""
    return 1 if version == 2 else version


def title(name: str, version: int) -> str:
    return f"{name} {shown(version)}"


def encoded(items: Iterable[Item]) -> pa.Table:
    """What `EncodeJob` yields of items; version 0 has no features at all."""
    items = list(items)
    values = [feature(name, version) for _, name, version in items]
    tokens = np.array([len(v) for v in values], np.uint8)
    flat = np.concatenate([np.zeros((0, WIDTH), np.float16), *values])
    hashes = [hash64(domain, [name])[0] for domain, name, _ in items]
    return pa.table(
        {
            "hash": pa.array(hashes, pa.uint64()),
            "item_id": pa.array([name for _, name, _ in items], pa.string()),
            "domain": pa.array([DOMAINS.index(domain) for domain, _, _ in items], pa.int32()),
            "content": pa.array([min(version, 3) for _, _, version in items], pa.int64()),
            "structure": pa.array([bytes(8)] * len(items), pa.binary(8)),
            "feature.text": as_binary(flat, tokens),
            "tokens.text": tokens,
            "title": pa.array([title(name, version) for _, name, version in items], pa.string()),
            "brand": pa.nulls(len(items), pa.string()),
            "categories": pa.array([["a", name] for _, name, _ in items], pa.list_(pa.string())),
            "display.price": pa.array(
                [None if shown(v) % 2 else float("nan") for *_, v in items], pa.float64()
            ),
        }
    )


def write_catalog(store: ArtifactStore, items: Iterable[Item], *, collapsed: Iterable[int] = ()) -> Artifact:
    """A catalogue of both domains; some rows may be collapsed, into the first of the others."""
    writer = store.writer("catalog", "c" * 64)
    writer.prepare()
    table = encoded(items)
    n = _write(writer, table, prefix="items", first_row=0)
    gone = np.isin(np.arange(n), list(collapsed))
    writer.save_npy("retired.npy", gone)
    writer.save_npy("representatives.npy", np.where(gone, np.flatnonzero(~gone)[0], np.arange(n)))
    return writer.commit(meta={"num_items": n, "domains": list(DOMAINS)}, inputs={}, config={}, seed=0)


def append_generation(
    store: ArtifactStore, view: GenerationsView, items: Iterable[Item], *, retire: Iterable[int] = ()
) -> tuple[GenerationsView, dict[str, int]]:
    """Append items; rows listed in `retire` leave. Returns the view with the generation, and the tally."""
    paths = tuple(generation.artifact.path for generation in view.generations)
    job = ClassifyJob(store.root, view.base.artifact.path, paths, DOMAINS, ("text",), shards=1)
    parts, summary = job.split([encoded(items)])
    number = len(view.generations) + 1
    writer = store.writer("generation", f"{number:064x}"[::-1])
    writer.prepare()
    added = _write(writer, parts[0], prefix="items", first_row=view.num_items)
    changed = pa.concat_tables(parts[1:])
    if _write(writer, changed, prefix="changed", first_row=0):
        writer.save_npy("changed.npy", np.sort(np.asarray(changed["row"])))
    gone = np.array(sorted(retire), np.int64)
    writer.save_npy("retired.npy", gone[~view.retired_later(gone)])
    writer.save_npy("restored.npy", np.sort(summary["restored"]))
    meta = {"first_row": view.num_items, "num_added": added, "domains": list(DOMAINS)}
    artifact = writer.commit(meta=meta, inputs=view.inputs, config={}, seed=0)
    generations = [*(g.artifact for g in view.generations), artifact]
    tally = dict(zip(("added", "changed", "unchanged", "restored"), summary["tally"].tolist(), strict=True))
    return GenerationsView(view.base.artifact, generations), tally


def _write(writer: ArtifactWriter, table: pa.Table, *, prefix: str, first_row: int) -> int:
    directory: Path = writer.path
    n = int(table.num_rows)
    if n == 0:
        return 0
    job = ShardJob(directory, {"text": WIDTH}, DOMAINS, np.array([first_row, first_row + n]), 64, prefix)
    result = job.write(0, [table])
    assert result is not None
    write_block_index(directory / f"blocks.{prefix}.npy", [result["records"]])
    join_parts(directory, prefix)
    if prefix == "items":
        writer.save_npy("hashes.npy", result["hashes"])
        writer.save_npy("item_domain.npy", result["domains"])
    return n
