"""Items taken out of a catalogue before anything is trained, to be appended when everything is.

items/part-*.parquet         the items of the target domain that stay, as they were brought
held_out/part-*.parquet      those held out, as they were brought
interactions.parquet         user_id, item_id, timestamp: what the catalogue's histories leave
held_out.json                what it was made of; written last
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from qbrec.catalog.encoders.fields import strings
from qbrec.catalog.sources import list_files, open_parquet
from qbrec.engine.context import sub_seed
from qbrec.errors import ConfigError
from qbrec.storage.artifact import Artifact, write_atomic
from qbrec.storage.catalog_view import CatalogView, Histories
from qbrec.storage.ragged import Ragged

ITEMS, HELD_OUT, INTERACTIONS, NOTE = "items", "held_out", "interactions.parquet", "held_out.json"
_ITEMS_AT_ONCE = 4096  # of the input: they may have pictures in them
_USERS_AT_ONCE = 65_536


@dataclass(frozen=True)
class HeldOut:
    """Items held out of a catalogue, and where they stand in the histories of their domain.

    Attributes:
        catalog: The whole catalogue.
        histories: Of the domain, whole.
        rows: Rows of the items held out, ascending.
        first: Place of the first of them in each history, its length where there is none; int64 [U].
    """

    catalog: CatalogView
    histories: Histories
    rows: NDArray[np.int64]
    first: NDArray[np.int64]

    @classmethod
    def draw(cls, catalog: Artifact, *, share: float, seed: int) -> HeldOut:
        """Draw a share of the target domain's items on offer that occur in histories.

        Args:
            catalog: The whole catalogue.
            share: Of these items; one at least.
            seed: The run's.

        Raises:
            ConfigError: No item would be left to learn from.
        """
        view = CatalogView(catalog)
        domain = str(catalog.meta["target_domain"])
        histories = view.load_histories(domain)
        known = np.unique(histories.rows.values)
        known = known[view.candidates(domain)[known]]
        count = max(1, round(share * len(known)))
        if count >= len(known):
            raise ConfigError(
                f"{count} of {len(known)} items in the histories of {domain!r} would be held out",
                where="--share",
                fix="hold out a smaller share",
            )
        generator = np.random.default_rng(sub_seed(seed, "coldstart"))
        rows = np.sort(generator.choice(known, count, replace=False)).astype(np.int64)
        return cls(
            view, histories, rows, first_places(histories.rows, np.isin(np.arange(view.num_items), rows))
        )

    @property
    def users(self) -> NDArray[np.int64]:
        """Histories that have an item held out, and one before it at least; ascending."""
        found: NDArray[np.int64] = np.flatnonzero(
            (self.first > 0) & (self.first < self.histories.rows.lengths)
        )
        return found

    def tests(self, users: NDArray[np.int64]) -> tuple[Ragged, NDArray[np.int64]]:
        """What stands before the first item held out, and that item, as rows of the whole catalogue."""
        rows, first = self.histories.rows.take(users), self.first[users]
        return rows.prefix(first), np.asarray(rows.values[rows.offsets[:-1] + first], np.int64)

    def kept(self) -> NDArray[np.bool_]:
        """Which of all interactions may be learnt from, bool [Σ].

        A history is cut at its first item held out, since what it is tested on lies there. One that begins
        with such an item is tested on nothing: it only loses the items held out.
        """
        rows = self.histories.rows
        place = np.arange(len(rows.values)) - np.repeat(rows.offsets[:-1], rows.lengths)
        before: NDArray[np.bool_] = place < np.repeat(self.first, rows.lengths)
        untested = np.repeat(self.first == 0, rows.lengths)
        return before | (untested & ~np.isin(rows.values, self.rows))


def first_places(rows: Ragged, wanted: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Place of the first wanted item in each row, the row's length where there is none; int64 [B]."""
    hits = np.flatnonzero(wanted[rows.values])
    owners, first = np.unique(rows.row_ids[hits], return_index=True)
    out = rows.lengths.copy()
    out[owners] = hits[first] - rows.offsets[owners]
    return out


def write_input(folder: Path, held: HeldOut, *, items: str, share: float, seed: int) -> bool:
    """Write the input without the items held out, and these by themselves.

    Args:
        folder: Where to; what is there of another catalogue, share or seed is replaced.
        held: What is held out.
        items: Where the domain's items lie, as the configuration says.
        share: Drawn.
        seed: Of the draw.

    Returns:
        Whether it was written now: what is there of the same is left alone, so that stages find it unchanged.

    Raises:
        DataError: The items cannot be read.
    """
    note = {"catalog": held.catalog.artifact.fingerprint, "share": share, "seed": seed}
    if (folder / NOTE).is_file() and json.loads((folder / NOTE).read_text(encoding="utf-8")) == note:
        return False
    shutil.rmtree(folder, ignore_errors=True)
    for name in (ITEMS, HELD_OUT):
        (folder / name).mkdir(parents=True)
    # With a listing go those that were collapsed into it: one of them would take its place.
    every = np.arange(held.catalog.num_items)
    gone = every[np.isin(held.catalog.representatives(every), held.rows)]
    _split_items(folder, items, gone=_ids(held.catalog, gone), held_out=_ids(held.catalog, held.rows))
    _write_interactions(folder / INTERACTIONS, held)
    write_atomic(folder / NOTE, json.dumps(note).encode())
    return True


def _split_items(folder: Path, place: str, *, gone: pa.Array, held_out: pa.Array) -> None:
    for number, file in enumerate(list_files(place, where="items")):
        parquet = open_parquet(file.path)
        part = f"part-{number:05d}.parquet"
        with (
            pq.ParquetWriter(folder / ITEMS / part, parquet.schema_arrow) as left,
            pq.ParquetWriter(folder / HELD_OUT / part, parquet.schema_arrow) as out,
        ):
            for batch in parquet.iter_batches(batch_size=_ITEMS_AT_ONCE):
                table = pa.Table.from_batches([batch])
                ids = strings(table, "item_id")
                left.write_table(table.filter(pc.invert(pc.is_in(ids, value_set=gone))))
                out.write_table(table.filter(pc.is_in(ids, value_set=held_out)))


def _write_interactions(path: Path, held: HeldOut) -> None:
    schema = pa.schema([("user_id", pa.string()), ("item_id", pa.string()), ("timestamp", pa.int64())])
    with pq.ParquetWriter(path, schema) as writer:
        for table in _interactions(held, schema):
            writer.write_table(table)


def _interactions(held: HeldOut, schema: pa.Schema) -> Iterator[pa.Table]:
    kept, histories = held.kept(), held.histories
    for begin in range(0, len(histories), _USERS_AT_ONCE):
        end = min(begin + _USERS_AT_ONCE, len(histories))
        span = slice(histories.rows.offsets[begin], histories.rows.offsets[end])
        mine = kept[span]
        rows, at = np.unique(histories.rows.values[span][mine], return_inverse=True)
        users = pa.array(held.catalog.user_ids(histories.user[begin:end]), pa.string())
        columns: list[Any] = [
            users.take(histories.rows.slice(begin, end).row_ids[mine]),
            _ids(held.catalog, rows).take(at),
            pa.array(histories.times.values[span][mine], pa.int64()),
        ]
        yield pa.table(columns, schema=schema)


def _ids(catalog: CatalogView, rows: NDArray[np.int64]) -> pa.Array:
    return pa.array(catalog.item_ids(rows), pa.string())
