"""A catalogue and the generations appended to it, read as one: rows go on, the newest version wins.

What lies in earlier artifacts is never touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qbrec.errors import DataError
from qbrec.storage.artifact import Artifact
from qbrec.storage.blocks import BlockSet, RaggedField
from qbrec.storage.catalog_view import CatalogView, DomainRows, Rows
from qbrec.storage.gather import spans
from qbrec.storage.generation import Generation, Ints, StoredItems, places_of
from qbrec.storage.hashing import hash64, rows_of
from qbrec.storage.ragged import Ragged

if TYPE_CHECKING:
    import pyarrow as pa

_NONE: Ints = np.zeros(0, np.int64)


class GenerationsView(DomainRows):
    """What later work asks of a catalogue that has grown; N are the rows of all generations together.

    Args:
        catalog: The catalogue.
        generations: Its generations, oldest first.

    Raises:
        DataError: An artifact is of another kind, or the generations do not follow one another.
    """

    def __init__(self, catalog: Artifact, generations: Sequence[Artifact] = ()) -> None:
        self.base = CatalogView(catalog)
        self.generations = [Generation(artifact) for artifact in generations]
        before = {"catalog": catalog.fingerprint}
        ends = [self.base.num_items]
        self._parts = [
            StoredItems(catalog, "items")
        ]  # of generation g: 2 g - 1 its new items, 2 g the changed ones
        for number, generation in enumerate(self.generations, 1):
            artifact = generation.artifact
            if artifact.inputs != before or generation.first_row != ends[-1]:
                raise DataError(
                    f"generation {number} was not appended to what stands before it",
                    where=str(artifact.path),
                    fix="name the generations in the order in which they were appended, none left out",
                )
            before[f"generation-{number}"] = artifact.fingerprint
            ends.append(ends[-1] + generation.num_added)
            self._parts += [StoredItems(artifact, "items"), StoredItems(artifact, "changed")]
        self.inputs = before
        self.first_rows: Ints = np.array([0, *ends], np.int64)  # of every generation and, last, N

    @property
    def path(self) -> Path:
        """Folder of the catalogue."""
        return self.base.path

    @property
    def num_items(self) -> int:
        """Rows of the catalogue and all generations: N."""
        return int(self.first_rows[-1])

    @property
    def domains(self) -> list[str]:
        """Domain names, by number."""
        last = self.generations[-1].artifact if self.generations else self.base.artifact
        return list(last.meta["domains"])

    @cached_property
    def item_domain(self) -> NDArray[np.uint8]:
        """Domain number of each row, uint8 [N]."""
        return np.concatenate([self.base.item_domain, *(g.item_domain for g in self.generations)])

    @cached_property
    def retired(self) -> NDArray[np.bool_]:
        """Rows that are kept but not recommended, bool [N]."""
        mask = np.zeros(self.num_items, dtype=bool)
        for generation in self.generations:
            mask[generation.retired] = True
            mask[generation.restored] = False
        # Collapsed duplicates: their representative stands for them, whoever offers them again.
        mask[: self.base.num_items] |= np.asarray(self.base.retired)
        return mask

    def retired_later(self, rows: Rows) -> NDArray[np.bool_]:
        """Which rows a generation retired and none has restored since, bool [n]; collapsed ones not."""
        rows = np.asarray(rows, np.int64)
        gone = np.zeros(len(rows), dtype=bool)
        for generation in self.generations:
            gone |= places_of(generation.retired, rows) >= 0
            gone &= places_of(generation.restored, rows) < 0
        return gone

    def lookup(self, item_ids: Sequence[str], domain: str) -> Ints:
        """Rows of item ids of a domain, retired ones too, int64 [n]; -1 where an id is unknown."""
        self.domain_number(domain)
        return self.rows_of_hashes(hash64(domain, item_ids))

    def rows_of_hashes(self, hashes: NDArray[np.uint64]) -> Ints:
        """Rows of item hashes, int64 [n]; -1 where there is none."""
        rows = rows_of(self.base.artifact.load_npy("hashes.npy"), hashes)
        for generation in self.generations:
            left = np.flatnonzero(rows < 0)
            found = rows_of(generation.hashes, hashes[left])
            rows[left] = np.where(found < 0, -1, found + generation.first_row)
        return rows

    def representatives(self, rows: Rows) -> Ints:
        """For each row the one that histories hold in its place, int64 [n]; appended items keep theirs."""
        found = np.array(rows, np.int64)
        old = found < self.base.num_items
        found[old] = self.base.representatives(found[old])
        return found

    def owners(self, rows: Rows) -> Ints:
        """The generation that each row was added in, int64 [n]; 0: the catalogue."""
        rows = np.asarray(rows, np.int64)
        assert not len(rows) or (rows.min() >= 0 and rows.max() < self.num_items), "no such row"
        return np.searchsorted(self.first_rows, rows, side="right") - 1

    def item_ids(self, rows: Rows) -> list[str]:
        """Item ids of rows, in their order."""
        return self._column("item_id", rows)

    def titles(self, rows: Rows) -> list[str]:
        """Titles of rows as they are now; empty where an item has none."""
        return [title or "" for title in self._column("title", rows)]

    @cached_property
    def display_schema(self) -> pa.Schema:
        """All columns to show: those of the catalogue, then those that generations brought."""
        import pyarrow as pa

        schemas = [part.table.schema for part in self._parts if part.artifact.has(f"{part.prefix}.arrow")]
        return pa.unify_schemas(schemas, promote_options="permissive")

    def display(self, rows: Rows) -> pa.Table:
        """All display columns of rows as they are now; null where a row's version has no such column."""
        import pyarrow as pa

        pieces, order = [self._parts[0].table.slice(0, 0)], [_NONE]
        for part, places, samples in self._located(rows):
            pieces.append(part.table.take(samples))
            order.append(places)
        joined = pa.concat_tables([self._conform(piece) for piece in pieces])
        return joined.take(pa.array(np.argsort(np.concatenate(order))))

    def take(self, rows: Rows, fields: Sequence[str | RaggedField]) -> dict[str, NDArray[Any] | Ragged]:
        """The newest features of rows, in any order; see `BlockSet.take`."""
        rows = np.asarray(rows, np.int64)
        pieces = [
            (places, part.blocks.take(samples, fields)) for part, places, samples in self._located(rows)
        ] or [(_NONE, self._parts[0].blocks.take(_NONE, fields))]
        return {name: _merge([(p, found[name]) for p, found in pieces], len(rows)) for name in pieces[0][1]}

    def new_blocks(self, number: int) -> list[BlockSet]:
        """Blocks of the items whose features are new or changed in generation `number` (1, 2, …).

        Every block has the fields of the catalogue's items; its field `row` says which rows they are. An item
        that a later generation changed again is there too: `superseded` tells.
        """
        found = self._parts[2 * number - 1 : 2 * number + 1]
        return [part.blocks for part in found if part.artifact.has(f"blocks.{part.prefix}.npy")]

    def new_features(
        self, number: int, fields: Sequence[str] | None = None
    ) -> Iterator[dict[str, NDArray[Any]]]:
        """Those blocks one after the other, as read-only views."""
        for blocks in self.new_blocks(number):
            for block in range(blocks.num_blocks):
                yield blocks.read(block, fields)

    def superseded(self, rows: Rows, number: int) -> NDArray[np.bool_]:
        """Which rows a generation after `number` has newer versions of, bool [n]."""
        rows = np.asarray(rows, np.int64)
        found = np.zeros(len(rows), dtype=bool)
        for generation in self.generations[number:]:
            found |= places_of(generation.changed, rows) >= 0
        return found

    def _located(self, rows: Rows) -> Iterator[tuple[StoredItems, Ints, Ints]]:
        """Where the newest versions lie: part, places among `rows`, samples of the part."""
        rows = np.asarray(rows, np.int64)
        owner = self.owners(rows)
        part, sample = np.maximum(2 * owner - 1, 0), rows - self.first_rows[owner]
        for number, generation in enumerate(self.generations, 1):
            place = places_of(generation.changed, rows)
            hit = place >= 0
            part[hit], sample[hit] = 2 * number, place[hit]
        order = np.argsort(part, kind="stable")
        bounds = np.flatnonzero(np.diff(part[order], prepend=-1, append=len(self._parts)))
        for begin, end in pairwise(bounds.tolist()):
            places = order[begin:end]
            yield self._parts[part[places[0]]], places, sample[places]

    def _column(self, name: str, rows: Rows) -> list[Any]:
        values: list[Any] = [None] * len(rows)
        for part, places, samples in self._located(rows):
            found = part.table[name].take(samples).to_pylist()
            for place, value in zip(places.tolist(), found, strict=True):
                values[place] = value
        return values

    def _conform(self, table: pa.Table) -> pa.Table:
        import pyarrow as pa

        columns = [
            table[f.name].cast(f.type) if f.name in table.column_names else pa.nulls(table.num_rows, f.type)
            for f in self.display_schema
        ]
        return pa.table(columns, schema=self.display_schema)


def current_generations(catalog: Artifact, found: Sequence[Artifact]) -> list[Artifact]:
    """Those of a run's generations that belong to its catalogue: one built anew begins without any."""
    return [artifact for artifact in found if artifact.inputs.get("catalog") == catalog.fingerprint]


def _merge(pieces: list[tuple[Ints, NDArray[Any] | Ragged]], count: int) -> NDArray[Any] | Ragged:
    """One field out of several parts, in the order of the request."""
    first = pieces[0][1]
    if not isinstance(first, Ragged):
        out: NDArray[Any] = np.empty((count, *first.shape[1:]), first.dtype)
        for places, piece in pieces:
            out[places] = piece
        return out
    lengths = np.zeros(count, np.int64)
    for places, piece in pieces:
        assert isinstance(piece, Ragged)
        lengths[places] = piece.lengths
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    values: NDArray[Any] = np.empty((int(offsets[-1]), *first.values.shape[1:]), first.values.dtype)
    for places, piece in pieces:
        assert isinstance(piece, Ragged)
        values[spans(offsets[places], lengths[places])] = piece.values
    return Ragged(values, offsets)
