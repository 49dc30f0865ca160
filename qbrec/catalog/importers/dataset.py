"""What a format hands to the import, and the counts of everything on the way."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from qbrec.catalog.importers.source import Moved, Source

# As the formats deliver them; the import checks the values.  `time` counts ticks since 1970, UTC.
INTERACTIONS = pa.schema(
    [("user_id", pa.string()), ("item_id", pa.string()), ("time", pa.int64()), ("rating", pa.float64())]
)


@dataclass
class Tally:
    """Rows read, rows left out and rows worth a remark, by reason.

    For interactions and for metadata, rows read = rows written + rows left out.

    Attributes:
        read: Rows by what they are, `interactions` or `metadata`.
        left_out: Rows by `what: reason`.
        noted: Rows that are written although something is odd about them.
    """

    read: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    noted: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)  # parsers count in threads of their own

    def saw(self, what: str, count: int) -> None:
        """Count rows that were read."""
        with self._lock:
            self.read[what] += count

    def leave_out(self, what: str, reason: str, count: int) -> None:
        """Count rows that are not written."""
        if count:
            with self._lock:
                self.left_out[f"{what}: {reason}"] += count

    def bad(self, what: str, reason: str) -> None:
        """Count a row that could not even be read into a table."""
        self.saw(what, 1)
        self.leave_out(what, reason, 1)


Tables = Callable[[Tally, Moved], Iterator[pa.Table]]


@dataclass(frozen=True)
class Part:
    """One of the two tables of a data set, as a stream.

    Attributes:
        sources: Files it is read from.
        tables: Streams tables; bad rows are counted, the others are the caller's to count.
    """

    sources: tuple[Source, ...]
    tables: Tables


@dataclass(frozen=True)
class Dataset:
    """A data set somewhere, in a format we know.

    Attributes:
        name: The format, such as `amazon-2018`.
        interactions: Streams tables of `INTERACTIONS`.
        ticks_per_second: What `time` counts.
        items: Streams tables of `item_schema`, or None where nothing is known about items.
        item_schema: `item_id` first, then columns of the input contract and others.
        options: What the user asked of the format, for `import.json`.
    """

    name: str
    interactions: Part
    ticks_per_second: int
    items: Part | None
    item_schema: pa.Schema
    options: Mapping[str, Any]
