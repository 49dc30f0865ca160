"""The import itself, the same for all formats: check, filter, join with metadata, write, account."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from qbrec import __version__
from qbrec.catalog.importers.check import Checker
from qbrec.catalog.importers.dataset import Dataset, Part, Tally
from qbrec.catalog.importers.filters import Spool, drop_repeats, keep_core, new_mask
from qbrec.catalog.importers.ids import HashSet, hash_ids
from qbrec.catalog.importers.items import ItemWriter
from qbrec.catalog.importers.source import Moved
from qbrec.catalog.importers.staging import INTERACTIONS, ITEMS, RowGroups, Staging, staged
from qbrec.engine.progress import Progress
from qbrec.errors import DataError

SCHEMA = pa.schema(
    [("user_id", pa.string()), ("item_id", pa.string()), ("timestamp", pa.timestamp("us", tz="UTC"))]
)
_BATCH_ROWS = 1 << 17


@dataclass(frozen=True)
class ImportOptions:
    """What every format is asked for.

    Attributes:
        min_rating: Least rating an interaction needs; None: any, or none at all.
        core: Interactions every user and item needs, in the end; 1: no such filter.
        repeats: `all` interactions of a user with an item, or the `earliest` only.
        all_items: Whether items that no one interacted with are kept too.
    """

    min_rating: float | None = None
    core: int = 1
    repeats: str = "all"
    all_items: bool = False


@dataclass(frozen=True)
class Summary:
    """What came of an import; the same as in `import.json`."""

    record: dict[str, Any]
    items: Path
    interactions: Path


def import_dataset(
    dataset: Dataset, *, out: str | Path, options: ImportOptions, force: bool = False, silent: bool = False
) -> Summary:
    """Write items.parquet, interactions.parquet and import.json into a folder.

    Nothing is there before all is: files get their names at the end, import.json last. Memory is that of some
    blocks of text and of 8 bytes for each distinct user and item (about 40 while the k-core is sought).

    Args:
        dataset: What to read.
        out: Folder to write to; made where it is missing.
        options: What to keep.
        force: Replace what lies in `out`.
        silent: Show no progress.

    Raises:
        ConfigError: `out` holds an import already, and `force` is not given.
        DataError: A source cannot be read, nothing is left, or there is no room to write.
    """
    assert options.repeats in ("all", "earliest")
    assert options.core >= 1
    begun = time.time()
    tally = Tally()
    with staged(Path(out), force=force) as staging:
        users, items, rows = _write_interactions(dataset, staging, options, tally, silent=silent)
        if rows == 0:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in tally.left_out.most_common(4))
            raise DataError(
                "not one interaction is left" + (f": {reasons}" if reasons else ""),
                where=", ".join(source.place for source in dataset.interactions.sources),
                fix="check the format, and the options that leave rows out",
            )
        writer = ItemWriter(staging.folder / ITEMS, dataset.item_schema, items, all_items=options.all_items)
        with writer:
            if dataset.items is not None:
                with _progress(dataset.items, "read metadata", silent=silent) as moved:
                    for table in dataset.items.tables(tally, moved):
                        tally.saw("metadata", table.num_rows)
                        writer.write(table, tally)
            writer.write_unknown(staging.folder / INTERACTIONS, tally)
        record = {
            "format": dataset.name,
            "qbrec": __version__,
            "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(begun)),
            "seconds": round(time.time() - begun, 1),
            "sources": [
                {"what": what, "place": source.place, "bytes": source.size}
                for what, part in (("interactions", dataset.interactions), ("metadata", dataset.items))
                for source in (part.sources if part else ())
            ],
            "options": {**dict(dataset.options), **options.__dict__},
            "read": dict(tally.read),
            "left_out": dict(tally.left_out.most_common()),
            "noted": dict(tally.noted.most_common()),
            "written": {"users": len(users), "items": writer.rows, "interactions": rows},
            "image_hosts": writer.image_hosts(),
        }
        staging.commit(record)
    return Summary(record, staging.out / ITEMS, staging.out / INTERACTIONS)


def _write_interactions(
    dataset: Dataset, staging: Staging, options: ImportOptions, tally: Tally, *, silent: bool
) -> tuple[HashSet, HashSet, int]:
    """Users, items and number of the interactions that lie in the staging folder afterwards."""
    users, items = HashSet(), HashSet()
    checker = Checker(dataset.ticks_per_second, options.min_rating, tally)
    filtered = options.core > 1 or options.repeats == "earliest"
    spool = Spool(staging.folder) if filtered else None
    path = staging.folder / ("unfiltered.parquet" if filtered else INTERACTIONS)
    with (
        RowGroups(path, SCHEMA) as writer,
        _progress(dataset.interactions, "read interactions", silent=silent) as moved,
    ):
        for table in dataset.interactions.tables(tally, moved):
            tally.saw("interactions", table.num_rows)
            fine = checker.check(table)
            user, item = hash_ids(fine["user_id"]), hash_ids(fine["item_id"])
            if spool is None:
                users.update(user)
                items.update(item)
            else:
                spool.append(user=user, item=item, time=fine["timestamp"].cast(pa.int64()).to_numpy())
            writer.write(fine)
    if spool is None:
        return users, items, writer.rows
    spool.close()
    keep = new_mask(spool)
    if options.repeats == "earliest":
        tally.leave_out("interactions", "repeat of user and item", drop_repeats(spool, keep))
    if options.core > 1:
        dropped = keep_core(spool, keep, k=options.core)
        tally.leave_out("interactions", f"below the {options.core}-core", dropped)
    for rows, user, item, _ in spool.chunks():
        users.update(user[keep[rows]])
        items.update(item[keep[rows]])
    return users, items, _write_kept(path, staging.folder / INTERACTIONS, keep)


def _write_kept(source: Path, target: Path, keep: NDArray[np.bool_]) -> int:
    begin = 0
    with pq.ParquetFile(source) as file, RowGroups(target, SCHEMA) as writer:
        for batch in file.iter_batches(batch_size=_BATCH_ROWS):
            mask = pa.array(np.array(keep[begin : begin + batch.num_rows]))
            begin += batch.num_rows
            writer.write(pa.Table.from_batches([pc.filter(batch, mask)], schema=SCHEMA))
    source.unlink()
    return writer.rows


@contextmanager
def _progress(part: Part, label: str, *, silent: bool) -> Iterator[Moved]:
    """Progress by bytes of the sources read."""
    total = sum(source.size for source in part.sources)
    with Progress(total, label, silent=silent) as progress:

        def moved(count: int) -> None:
            said = f"{total / 1e6:,.1f} MB" if total else "?"
            progress.update(count, read=f"{(progress.done + count) / 1e6:,.1f} of {said}")

        yield moved
