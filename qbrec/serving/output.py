"""The folder of a batch: whose it is, its parts, what is there already, and the summary at the end.

batch.json              first: what these recommendations are made of and for
part-00042.parquet      one row per user: user_id, item_id, score, semantic_id (lists, best first)
rejected-00042.parquet  users of that unit without a list, and why
_SUCCESS.json           last
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypedDict

import pyarrow as pa
import pyarrow.parquet as pq

from qbrec.catalog.sources import open_parquet
from qbrec.errors import ConfigError, DataError
from qbrec.storage.folder import Folder

IDENTITY, SUMMARY = "batch.json", "_SUCCESS.json"
SCHEMA = pa.schema(
    [
        ("user_id", pa.string()),
        ("item_id", pa.list_(pa.string())),
        ("score", pa.list_(pa.float32())),
        ("semantic_id", pa.list_(pa.string())),
    ]
)
_COUNTS = b"qbrec"
_PART = re.compile(r"part-(\d{5,})\.parquet")
_UNFINISHED = re.compile(r"(part|rejected)-\d{5,}\.parquet\..*tmp")
_READERS = 16  # footers read at once


class Counts(TypedDict):
    """What became of the users of a unit."""

    users: int
    rejected: int
    unknown_items: int


class BatchFolder:
    """Where a batch goes.

    Args:
        uri: A path, or `s3://…`, `gs://…`, `file:///…`.
    """

    def __init__(self, uri: str) -> None:
        self.folder = Folder(uri)

    def claim(self, identity: Mapping[str, Any]) -> None:
        """Make it the folder of this batch, unless it is.

        Args:
            identity: What the lists are made of and for; JSON-able, by topic.

        Raises:
            ConfigError: It belongs to another batch (says in what that one differs), or holds other parts.
            DataError: It cannot be read or written.
        """
        found = self.folder.read(IDENTITY)
        if found is None:
            if any(_PART.fullmatch(name) for name in self.folder.sizes()):
                raise ConfigError(
                    f"this folder has parts of something else: there is no {IDENTITY}",
                    where=self.folder.uri,
                    fix="choose another folder for --out, or empty it",
                )
            self.folder.write(IDENTITY, json.dumps(identity, indent=1, sort_keys=True).encode())
            return
        try:
            other = dict(json.loads(found))
        except ValueError:
            raise ConfigError(
                "its description is damaged", where=self.folder.place(IDENTITY), fix="empty the folder"
            ) from None
        differs = _differences(other, dict(identity))
        if differs:
            raise ConfigError(
                f"this folder holds another batch: {'; '.join(differs)}",
                where=self.folder.place(IDENTITY),
                fix="choose another folder for --out, or empty it",
            )

    def done(self) -> dict[int, Counts]:
        """Units whose part is there and whole, with their counts.

        Raises:
            DataError: The folder cannot be listed.
        """
        numbers = [int(found[1]) for name in self.folder.sizes() if (found := _PART.fullmatch(name))]
        with ThreadPoolExecutor(_READERS, thread_name_prefix="qbrec-parts") as pool:
            counts = pool.map(self._counts, numbers)
            return {number: one for number, one in zip(numbers, counts, strict=True) if one is not None}

    def write(self, number: int, lists: pa.Table, rejected: pa.Table, counts: Counts) -> None:
        """Write what a unit gave; its part, which says that the unit is done, last.

        Raises:
            DataError: There is no room, or the store refuses.
        """
        if rejected.num_rows:
            self.folder.write(f"rejected-{number:05d}.parquet", _parquet(rejected))
        told = lists.replace_schema_metadata({_COUNTS: json.dumps(counts).encode()})
        self.folder.write(f"part-{number:05d}.parquet", _parquet(told))

    def summary(self) -> dict[str, Any] | None:
        """What `finish` wrote, or None."""
        found = self.folder.read(SUMMARY)
        return None if found is None else dict(json.loads(found))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Remove what killed writers left, and say that everything is there."""
        if self.folder.local is not None:
            for path in self.folder.local.iterdir():
                if _UNFINISHED.fullmatch(path.name):
                    path.unlink(missing_ok=True)
        self.folder.write(SUMMARY, json.dumps(summary, indent=1).encode())

    def _counts(self, number: int) -> Counts | None:
        """What the footer of a part says; None where there is none: a store may keep half a file."""
        try:
            metadata = open_parquet(self.folder.place(f"part-{number:05d}.parquet")).schema_arrow.metadata
        except DataError:
            return None
        counts: Counts | None = json.loads(metadata[_COUNTS]) if metadata and _COUNTS in metadata else None
        return counts


def total(counts: Sequence[Counts]) -> Counts:
    """The sum over units."""
    return {
        "users": sum(one["users"] for one in counts),
        "rejected": sum(one["rejected"] for one in counts),
        "unknown_items": sum(one["unknown_items"] for one in counts),
    }


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return bytes(sink.getvalue().to_pybytes())


def _differences(other: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """In what two identities differ, with the values where they are short."""
    differs = []
    for name in sorted({*other, *ours}):
        before, now = other.get(name), ours.get(name)
        if before == now:
            continue
        if isinstance(before, dict) and isinstance(now, dict):
            differs += [f"{name}.{line}" for line in _differences(before, now)]
        elif isinstance(before, int | bool) and isinstance(now, int | bool):
            differs.append(f"{name} was {before}, is {now}")
        else:
            differs.append(f"{name} is another")
    return differs
