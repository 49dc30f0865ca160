"""Near-duplicates: items of equal content, and items that the same users bought (copied reviews of variants).

`build_near_duplicates` runs after the histories are written. It writes

    overlap_pairs.npy      int64 [P, 2], a < b, sorted: pairs whose training users overlap
    overlap_jaccard.npy    float32 [P]
    near_duplicates.npy    int64 [N]: first row of each item's group, joined by equal content or overlap
    near_duplicates.parquet    the pairs to look through

and, where `catalog.duplicates.collapse` asks for it, moves all interactions to one item of each group:

    representatives.npy    int64 [N]: the item to which interactions were moved (its own row: none were)
    retired.npy            bool [N]: the others
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from qbrec.catalog.duplicates.collapse import (
    REPRESENTATIVES,
    CollapseJob,
    collapse_histories,
    representatives,
)
from qbrec.catalog.duplicates.overlap import OVERLAPS, OverlapJob
from qbrec.config.root import RootConfig
from qbrec.engine.context import StageContext
from qbrec.errors import DataError
from qbrec.storage.artifact import ArtifactWriter
from qbrec.storage.blocks import BlockSet

INTERACTIONS_PER_PARTITION = 1 << 22  # some 100 bytes each in a task
MAX_PARTITIONS = 400  # a round makes their square of parts
MAX_LISTED = 100_000  # pairs in the report

Ints = NDArray[np.int64]


def build_near_duplicates(
    ctx: StageContext,
    config: RootConfig,
    writer: ArtifactWriter,
    *,
    domains: Sequence[str],
    num_interactions: int,
) -> dict[str, Any]:
    """Find near-duplicates, report them, and collapse them if that is asked for.

    Args:
        ctx: Of the driver.
        config: Root configuration.
        writer: The catalogue under construction: items, histories, counts and content groups are written.
        domains: Domain names by number.
        num_interactions: Interactions in all histories.

    Returns:
        Facts for the manifest: `duplicates`, and where histories were collapsed what that changed.

    Raises:
        DataError: Nobody can be tested on any more.
    """
    from qbrec.catalog.exchange import exchange, reduce

    directory, settings = writer.path, config.catalog.duplicates
    content, item_domain, counts = (
        np.load(directory / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        for name in ("duplicates", "item_domain", "train_counts")
    )
    num_items = len(content)
    partitions = max(1, min(-(-num_interactions // INTERACTIONS_PER_PARTITION), MAX_PARTITIONS, num_items))
    job = OverlapJob(directory, num_items, partitions, settings.min_overlap, settings.min_users)
    with ctx.progress(4 * partitions, "comparing items by user") as progress:
        found = find_overlaps(job, exchange=exchange, reduce=reduce, update=progress.update)
    pairs = np.stack([np.asarray(found[name], np.int64) for name in ("a", "b")], axis=1)
    writer.save_npy("overlap_pairs.npy", pairs)
    writer.save_npy("overlap_jaccard.npy", np.asarray(found["jaccard"]).astype(np.float32))
    groups = components(num_items, pairs, content)
    writer.save_npy("near_duplicates.npy", groups)
    sizes = np.bincount(groups)
    facts: dict[str, Any] = {
        "overlap_pairs": len(pairs),
        "groups": int((sizes > 1).sum()),
        "items": int(sizes[sizes > 1].sum()),
        "largest_group": int(sizes.max()),
    }
    meta: dict[str, Any] = {"duplicates": facts}
    chosen = np.arange(num_items)
    if settings.collapse != "none":
        if settings.collapse == "both":
            kind = groups
        else:
            kind = content if settings.collapse == "content" else components(num_items, pairs)
        chosen = representatives(
            np.asarray(kind), train_counts=np.asarray(counts), item_domain=np.asarray(item_domain)
        )
        meta |= _collapse(ctx, config, writer, chosen, domains)
        facts |= {"retired": int((chosen != np.arange(num_items)).sum())}
        facts |= {"removed_interactions": meta.pop("removed")}
    table, total = listing(directory, found, content=np.asarray(content), chosen=chosen)
    facts |= {"pairs": total, "listed_pairs": table.num_rows}
    writer.write_bytes("near_duplicates.parquet", _parquet(table, total))
    return meta


def find_overlaps(
    job: OverlapJob,
    *,
    exchange: Callable[..., list[list[Any]]],
    reduce: Callable[..., Iterator[Any]],
    update: Callable[[int], None],
) -> pa.Table:
    """All pairs of items whose training users overlap (`overlap.OVERLAPS`), sorted by a, b.

    Args:
        job: The rounds.
        exchange: `exchange.exchange`, or the same in one process.
        reduce: `exchange.reduce`, likewise.
        update: Called with the number of tasks done, for progress; 4 × partitions in all, those of the first
            round not counted.
    """
    num = job.partitions
    blocks = BlockSet.open(job.directory, "histories").num_blocks
    bounds = np.linspace(0, blocks, min(num, blocks) + 1).astype(int).tolist()

    def done(_: Any) -> None:
        update(1)

    parts = exchange(list(pairwise(bounds)), job.read, partitions=num)
    group = len(parts[0])
    parts = exchange(
        _drain(parts), lambda mine: (job.prefixes(mine), None), partitions=num + 1, group=group, add=done
    )
    sets = parts.pop()
    group = len(parts[0])
    parts = exchange(
        _drain(parts), lambda mine: (job.join(mine), None), partitions=num, group=group, add=done
    )
    group = 1 + len(parts[0])
    parts = exchange(
        _drain([[mine, *others] for mine, others in zip(sets, parts, strict=True)]),
        lambda mine: (job.probe(mine[0], mine[1:]), None),
        partitions=num,
        group=group,
        add=done,
    )
    parts = [[mine, *others] for mine, others in zip(sets, parts, strict=True)]
    del sets
    results = [OVERLAPS.empty_table()]
    for table in reduce(parts, lambda _, mine: job.verify(mine[0], mine[1:])):
        results.append(table)
        update(1)
    return pa.concat_tables(results).sort_by([("a", "ascending"), ("b", "ascending")])


def components(num_items: int, pairs: Ints, groups: Ints | None = None) -> Ints:
    """First row of each item's group: items joined by pairs, and by groups they are in already.

    Args:
        num_items: N.
        pairs: int64 [P, 2].
        groups: First row of each item's known group, [N].
    """
    rows = np.arange(num_items, dtype=np.int64)
    if groups is not None:
        again = np.flatnonzero(groups != rows)
        pairs = np.concatenate([pairs, np.stack([groups[again], again], axis=1)])
    # Only items in a pair take part: the graph is small in a large catalogue.
    members, ends = np.unique(pairs, return_inverse=True)
    if len(members):
        ends = ends.reshape(-1, 2)
        size = len(members)
        graph = coo_array((np.ones(len(ends), np.int8), (ends[:, 0], ends[:, 1])), shape=(size, size))
        _, label = connected_components(graph, directed=False)
        _, first, inverse = np.unique(label, return_index=True, return_inverse=True)
        rows[members] = members[first[inverse]]
    return rows


def listing(
    directory: Path, found: pa.Table, *, content: Ints, chosen: Ints, limit: int = MAX_LISTED
) -> tuple[pa.Table, int]:
    """Pairs for a person to look through: the most users in common first, then equal content alone.

    Args:
        directory: The catalogue, with items.arrow.
        found: Overlapping pairs (`overlap.OVERLAPS`).
        content: First row of equal content, [N].
        chosen: Representative of each item, [N].
        limit: Most pairs in the table.

    Returns:
        domain, item_id, title, duplicate_item_id, duplicate_title, reason (content, overlap or both), jaccard
        and users_in_common (null for equal content alone), collapsed_into (item id; null where interactions
        were not moved to one of the two or a third); and the number of pairs there are.
    """
    a, b, common = (np.asarray(found[name], np.int64) for name in ("a", "b", "common"))
    again = np.flatnonzero(content != np.arange(len(content)))
    copies = np.stack([content[again], again], axis=1)
    listed = np.isin(copies[:, 0] * len(content) + again, a * len(content) + b)
    copies = copies[~listed]
    total = len(a) + len(copies)
    order = np.argsort(-common, kind="stable")[:limit]
    copies = copies[: limit - len(order)]
    same = content[a[order]] == content[b[order]]
    first, second = (
        np.concatenate([ends[order], copies[:, i]]).astype(np.int64) for i, ends in enumerate((a, b))
    )
    reasons = [*np.where(same, "content, overlap", "overlap"), *["content"] * len(copies)]
    none = pa.nulls(len(copies))
    moved = (chosen[first] == chosen[second]).tolist()
    with pa.memory_map(str(directory / "items.arrow")) as source:
        items = pa.ipc.open_file(source).read_all()

        def names(column: str, rows: Ints) -> pa.Array:
            return pc.cast(items[column].take(pa.array(rows)).combine_chunks(), pa.string())

        table = pa.table(
            {
                "domain": names("domain", first),
                "item_id": names("item_id", first),
                "title": names("title", first),
                "duplicate_item_id": names("item_id", second),
                "duplicate_title": names("title", second),
                "reason": pa.array(reasons, pa.string()),
                "jaccard": pa.concat_arrays(
                    [pa.array(np.asarray(found["jaccard"])[order]), none.cast(pa.float64())]
                ),
                "users_in_common": pa.concat_arrays([pa.array(common[order]), none.cast(pa.int64())]),
                "collapsed_into": pc.if_else(
                    pa.array(moved, pa.bool_()), names("item_id", chosen[first]), None
                ),
            }
        )
    return table, total


def _collapse(
    ctx: StageContext, config: RootConfig, writer: ArtifactWriter, chosen: Ints, domains: Sequence[str]
) -> dict[str, Any]:
    """Write who stands for whom, rewrite the histories and counts; returns facts."""
    from qbrec.catalog.exchange import reduce

    writer.save_npy(REPRESENTATIVES, chosen)
    writer.save_npy("retired.npy", chosen != np.arange(len(chosen)))
    job = CollapseJob(writer.path, config.catalog.split, len(domains))
    with ctx.progress(len(job.shards), "collapsing duplicates") as progress:
        counts, facts = collapse_histories(job, num_items=len(chosen), reduce=reduce, update=progress.update)
    writer.save_npy("train_counts.npy", counts)
    target = config.data.target_domain
    eval_users = int(facts["eval_users"][list(domains).index(target)])
    if not eval_users:
        raise DataError(
            f"with duplicates collapsed no user of the target domain {target!r} can be tested on",
            where="catalog.duplicates.collapse",
            fix="look through near_duplicates.parquet of a run without it, or raise "
            "catalog.duplicates.min_overlap",
        )
    return {
        "num_interactions": facts["kept"],
        "eval_users": eval_users,
        "removed": facts["removed"],
    }


def _drain(parts: list[list[Any]]) -> Iterator[Any]:
    """The parts of one partition after the other, let go of as they are handed out."""
    for number in range(len(parts)):
        mine, parts[number] = parts[number], []
        yield from mine


def _parquet(table: pa.Table, total: int) -> bytes:
    """The report as Parquet; its metadata says how much of it there is."""
    said = f"{table.num_rows} of {total} pairs, the most users in common first"
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({"listed": said}), buffer, compression="zstd")
    return buffer.getvalue()
