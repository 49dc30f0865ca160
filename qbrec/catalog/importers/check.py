"""Interactions row by row: which may be written, and why the others may not."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from qbrec.catalog.importers.dataset import INTERACTIONS, Tally

# The years 1 to 9999, which is what dates can be written for.
_FIRST, _LAST = -62_135_596_800, 253_402_300_799  # seconds


class Checker:
    """Takes bad interactions out of tables and counts them, each under the first reason that holds.

    Args:
        ticks_per_second: Of the column `time`.
        min_rating: Least rating, or None.
        tally: Where they are counted.
    """

    def __init__(self, ticks_per_second: int, min_rating: float | None, tally: Tally) -> None:
        assert 1_000_000 % ticks_per_second == 0
        self._ticks, self._min_rating, self._tally = ticks_per_second, min_rating, tally

    def check(self, table: pa.Table) -> pa.Table:
        """The good rows of a table of `INTERACTIONS`: user_id, item_id, timestamp in microseconds."""
        assert table.schema.names == INTERACTIONS.names
        time, rating = table["time"], table["rating"]
        reasons: list[tuple[str, Any]] = [
            ("no user", _missing(table["user_id"])),
            ("no item", _missing(table["item_id"])),
            ("no timestamp", pc.is_null(time)),
            (
                "timestamp beyond the years 1 to 9999",
                pc.or_(pc.less(time, _FIRST * self._ticks), pc.greater(time, _LAST * self._ticks)),
            ),
        ]
        if self._min_rating is not None:
            reasons.append(("no rating", pc.is_null(rating, nan_is_null=True)))
            reasons.append((f"rating below {self._min_rating:g}", pc.less(rating, self._min_rating)))
        bad = None
        for reason, mask in reasons:
            mask = pc.fill_null(mask, False)
            if bad is not None:
                mask = pc.and_not(mask, bad)
            self._tally.leave_out("interactions", reason, pc.sum(mask).as_py() or 0)
            bad = mask if bad is None else pc.or_(bad, mask)
        fine = table.filter(pc.invert(bad))
        stamp = pc.multiply(fine["time"], 1_000_000 // self._ticks).cast(pa.timestamp("us", tz="UTC"))
        return pa.table({"user_id": fine["user_id"], "item_id": fine["item_id"], "timestamp": stamp})


def _missing(column: pa.ChunkedArray) -> Any:
    return pc.or_kleene(pc.is_null(column), pc.equal(pc.binary_length(column), 0))
