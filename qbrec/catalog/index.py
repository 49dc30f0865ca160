"""The item index while a catalogue is built: which row an id has, and that no two items share one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from qbrec.catalog.contract import Domain
from qbrec.catalog.encoders.fields import strings
from qbrec.catalog.units import read_unit
from qbrec.errors import DataError
from qbrec.storage.hashing import hash64, rows_of


@dataclass(frozen=True)
class Uniqueness:
    """Checks that no two items share a hash.

    Attributes:
        units: All units of items, by number.
        domains: All domains.
    """

    units: list[dict[str, Any]]
    domains: list[Domain]

    def check(self, _range: int, tables: list[pa.Table]) -> int:
        """Check one range of the hash (`ScanJob.split`); returns its number of items.

        Raises:
            DataError: An id occurs twice (names both rows), or two ids have the same hash.
        """
        found = pa.concat_tables(tables)
        hashes = np.asarray(found["hash"], dtype=np.uint64)
        ordered = np.sort(hashes)
        equal = np.flatnonzero(ordered[1:] == ordered[:-1])
        if len(equal):
            both = found.filter(pa.array(hashes == ordered[equal[0]])).slice(0, 2)
            both = both.sort_by([("unit", "ascending"), ("place", "ascending")])
            first, second = (
                self._describe(*row) for row in zip(*(both[c].to_pylist() for c in _PLACE), strict=True)
            )
            if first[0] == second[0]:
                raise DataError(
                    f"the item_id {first[0]!r} occurs twice",
                    where=f"{first[1]} and {second[1]}",
                    fix="keep one row per item_id in a domain",
                )
            raise DataError(
                f"the ids {first[0]!r} and {second[0]!r} have the same 64-bit hash",
                where=f"{first[1]} and {second[1]}",
                fix="change one of the two ids: this happens once in a billion catalogues",
            )
        return len(hashes)

    def _describe(self, number: int, place: int) -> tuple[str, str]:
        unit = self.units[number]
        row = int(unit["first_row"]) + int(unit["begin"]) + place
        for start, table in read_unit(unit, ["item_id"], batch_rows=8192):
            if start <= row < start + table.num_rows:
                return strings(table, "item_id")[row - start].as_py(), f"{unit['path']}, row {row} (from 0)"
        raise AssertionError("the row was there a moment ago")


_PLACE = ("unit", "place")


def distinct_rows(hashes: NDArray[np.uint64], domain: str, ids: pa.Array) -> NDArray[np.int64]:
    """Rows of n ids (no nulls among them), hashing each distinct one once; -1 unknown."""
    encoded = pc.dictionary_encode(ids)
    known = rows_of(hashes, hash64(domain, encoded.dictionary.to_pylist()))
    rows: NDArray[np.int64] = known[encoded.indices.to_numpy(zero_copy_only=False)]
    return rows
