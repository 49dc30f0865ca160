"""What is new about the items given to a catalogue that knows some of them: the part of Ray tasks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from qbrec.catalog.exchange import range_of
from qbrec.catalog.items import token_sizes
from qbrec.catalog.shards import display_table
from qbrec.errors import DataError
from qbrec.storage.artifact import ArtifactStore
from qbrec.storage.generations import GenerationsView

Bools = NDArray[np.bool_]
TALLY = ("added", "changed", "unchanged", "restored")


@dataclass(frozen=True)
class ClassifyJob:
    """Compares given items with what is stored of them.

    Attributes:
        storage: Root of the artifacts.
        catalog: Directory of the catalogue.
        generations: Directories of its generations, oldest first.
        domain_names: Name of every domain, by number, a new one too.
        modalities: Names of all modalities.
        shards: Ranges of the item hash.
    """

    storage: Path
    catalog: Path
    generations: tuple[Path, ...]
    domain_names: tuple[str, ...]
    modalities: tuple[str, ...]
    shards: int

    @property
    def parts(self) -> int:
        """Tables that `split` returns: new items, then changed ones by the generation they were added in."""
        return 2 + len(self.generations)

    def split(self, tables: list[pa.Table]) -> tuple[list[pa.Table], dict[str, Any]]:
        """Take one range of the hash (`ItemSplit.split`), of which every id occurs once.

        Returns:
            `parts` tables; of those already known `row` tells where they are. And a summary: `shard` (-1: the
            range is empty), `items` and `bytes` int64 [parts], `tally` int64 [4] in the order of `TALLY`,
            `known` and `restored` rows int64, `sizes` int64 [modalities, 4] of what is stored.

        Raises:
            DataError: Another id with the same hash is stored.
        """
        table = pa.concat_tables(tables).combine_chunks()
        hashes = np.asarray(table["hash"], dtype=np.uint64)
        view = _open(self.storage, self.catalog, self.generations)
        rows = view.rows_of_hashes(hashes)
        old = np.flatnonzero(rows >= 0)
        same = np.zeros(len(rows), dtype=bool)
        gone = np.zeros(len(rows), dtype=bool)
        if len(old):
            heavy = [c for c in table.column_names if c.startswith(("feature.", "tokens."))]
            same[old] = self._same(view, table.drop_columns(heavy).take(pa.array(old)), rows[old])
            gone[old] = view.retired_later(rows[old])
        fresh, kept = rows < 0, ~same & (rows >= 0)
        owner = np.where(kept, view.owners(np.maximum(rows, 0)), -1)
        stored = table.append_column("row", pa.array(rows))
        out = [table.filter(pa.array(fresh))]
        out += [stored.filter(pa.array(owner == number)) for number in range(self.parts - 1)]
        summary = {
            "shard": int(range_of(hashes[:1], self.shards)[0]) if len(hashes) else -1,
            "items": np.array([part.num_rows for part in out], np.int64),
            "bytes": np.array([part.nbytes for part in out], np.int64),
            "tally": np.array(
                [fresh.sum(), (kept & ~gone).sum(), (same & ~gone).sum(), gone.sum()], np.int64
            ),
            "known": rows[old],
            "restored": rows[gone],
            "sizes": token_sizes(table.filter(pa.array(fresh | kept)), self.modalities),
        }
        return out, summary

    def _same(self, view: GenerationsView, given: pa.Table, rows: NDArray[np.int64]) -> Bools:
        """Whether content and display of known items are as they are stored, bool [n]."""
        stored, shown = view.display(rows), display_table(given, rows, self.domain_names)
        for column in ("domain", "item_id"):
            differs = pc.not_equal(stored[column], shown[column]).to_numpy()
            if differs.any():
                place = int(np.flatnonzero(differs)[0])
                first, second = (
                    f"{t['item_id'][place].as_py()!r} of {t['domain'][place].as_py()!r}"
                    for t in (stored, shown)
                )
                raise DataError(
                    f"the ids {first} and {second} have the same 64-bit hash",
                    where=f"row {int(rows[place])} of the catalogue and the items given",
                    fix="change the id of the new item: this happens once in a billion catalogues",
                )
        content = view.take(rows, ["content"])["content"]
        same: Bools = np.asarray(given["content"], dtype=np.int64) == content
        for column in {*stored.column_names, *shown.column_names} - {"row", "domain", "item_id"}:
            there = stored[column] if column in stored.column_names else pa.nulls(len(rows))
            now = shown[column] if column in shown.column_names else pa.nulls(len(rows))
            same &= equal_values(there, now)
        return same


def equal_values(first: Any, second: Any) -> Bools:
    """Whether two columns of n values of one kind are equal value by value, null and NaN to themselves."""
    a, b = (c.combine_chunks() if isinstance(c, pa.ChunkedArray) else c for c in (first, second))
    a, b = (c.cast(c.type.value_type) if pa.types.is_dictionary(c.type) else c for c in (a, b))
    no_a, no_b = (np.asarray(c.is_null().to_numpy(zero_copy_only=False), dtype=bool) for c in (a, b))
    nulls: Bools = no_a & no_b
    one: Bools = no_a ^ no_b
    if (nulls | one).all():
        return nulls
    if pa.types.is_nested(a.type):
        # Arrow compares no lists; their texts tell them apart, and NaN equals itself there.
        pairs = zip(a.to_pylist(), b.to_pylist(), strict=True)
        found: Bools = np.array([repr(x) == repr(y) for x, y in pairs], dtype=bool)
        return found | nulls
    equal = pc.equal(a, b.cast(a.type))
    if pa.types.is_floating(a.type):
        equal = pc.or_(equal, pc.and_(pc.is_nan(a), pc.is_nan(b)))
    found = pc.fill_null(equal, False).to_numpy(zero_copy_only=False)
    return found | nulls


@lru_cache(maxsize=4)
def _open(storage: Path, catalog: Path, generations: tuple[Path, ...]) -> GenerationsView:
    store = ArtifactStore(storage)
    return GenerationsView(store.open(catalog), [store.open(path) for path in generations])
