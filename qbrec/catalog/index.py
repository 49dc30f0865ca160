"""The item index while a catalogue is built: which row an id has, and that no two items share one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from qbrec.catalog.contract import Domain
from qbrec.catalog.encode import strings
from qbrec.catalog.units import read_unit
from qbrec.errors import DataError
from qbrec.storage.hashing import hash64, rows_of


@dataclass(frozen=True)
class Locations:
    """Where every item with an id stands in the input: parallel arrays [n], and the units they count in."""

    hashes: NDArray[np.uint64]
    unit: NDArray[np.int32]
    place: NDArray[np.int32]  # from the beginning of the unit


def check_unique(found: Locations, units: list[dict[str, Any]], domains: list[Domain]) -> NDArray[np.uint64]:
    """All hashes, sorted, after it is certain that they differ.

    Raises:
        DataError: An id occurs twice (names both rows), or two ids have the same hash.
    """
    order = np.argsort(found.hashes, kind="stable")
    hashes = found.hashes[order]
    equal = np.flatnonzero(hashes[1:] == hashes[:-1])
    if len(equal):
        first, second = (_describe(found, int(order[equal[0] + i]), units, domains) for i in (0, 1))
        if first[0] == second[0]:
            raise DataError(
                f"the item_id {first[0]!r} occurs twice ({len(equal)} repeated rows in all)",
                where=f"{first[1]} and {second[1]}",
                fix="keep one row per item_id in a domain",
            )
        raise DataError(
            f"the ids {first[0]!r} and {second[0]!r} have the same 64-bit hash",
            where=f"{first[1]} and {second[1]}",
            fix="change one of the two ids: this happens once in a billion catalogues",
        )
    return hashes


def _describe(
    found: Locations, index: int, units: list[dict[str, Any]], domains: list[Domain]
) -> tuple[str, str]:
    unit = units[found.unit[index]]
    row = int(unit["first_row"]) + int(unit["begin"]) + int(found.place[index])
    for start, table in read_unit(unit, ["item_id"], batch_rows=8192):
        if start <= row < start + table.num_rows:
            return strings(table, "item_id")[row - start].as_py(), f"{unit['path']}, row {row} (from 0)"
    raise AssertionError("the row was there a moment ago")


def distinct_rows(hashes: NDArray[np.uint64], domain: str, ids: pa.Array) -> NDArray[np.int64]:
    """Rows of n ids (no nulls among them), hashing each distinct one once; -1 unknown."""
    encoded = pc.dictionary_encode(ids)
    known = rows_of(hashes, hash64(domain, encoded.dictionary.to_pylist()))
    rows: NDArray[np.int64] = known[encoded.indices.to_numpy(zero_copy_only=False)]
    return rows
