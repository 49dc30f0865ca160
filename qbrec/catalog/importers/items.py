"""Items: metadata of the items that occur, once each, and a row for those that have none."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Self

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qbrec.catalog.importers.dataset import Tally
from qbrec.catalog.importers.ids import HashSet, hash_ids
from qbrec.catalog.importers.staging import RowGroups

_BATCH_ROWS = 1 << 17
_MOST_HOSTS = 16


class ItemWriter:
    """Writes items.parquet.

    Args:
        path: The file.
        schema: `item_id`, then whatever the format knows.
        wanted: Hashes of the items that occur in interactions.
        all_items: Whether others are written too.

    Attributes:
        rows: Items written.
    """

    def __init__(self, path: Path, schema: pa.Schema, wanted: HashSet, *, all_items: bool) -> None:
        assert schema.names[0] == "item_id"
        self._schema, self._wanted, self._all = schema, wanted, all_items
        self._known = HashSet()
        self._file = RowGroups(path, schema)
        self._hosts: Counter[str] = Counter()

    @property
    def rows(self) -> int:
        """Items written."""
        return self._file.rows

    def image_hosts(self) -> list[str]:
        """Hosts of the pictures, the most frequent first, up to 16."""
        return [host for host, _ in self._hosts.most_common(_MOST_HOSTS)]

    def write(self, table: pa.Table, tally: Tally) -> None:
        """Add metadata; rows that are not written are counted."""
        ids = table["item_id"]
        named = pc.and_kleene(pc.is_valid(ids), pc.greater(pc.binary_length(ids), 0))
        tally.leave_out("metadata", "no item", table.num_rows - (pc.sum(named).as_py() or 0))
        table = table.filter(named)
        hashes = hash_ids(table["item_id"])
        if not self._all:
            used = self._wanted.contains(hashes)
            tally.leave_out("metadata", "no one interacted with the item", int((~used).sum()))
            table, hashes = table.filter(pa.array(used)), hashes[used]
        fresh = self._known.add(hashes)
        tally.leave_out("metadata", "repeat of the item", int((~fresh).sum()))
        table = table.filter(pa.array(fresh))
        self._count_hosts(table)
        self._file.write(table)

    def write_unknown(self, interactions: Path, tally: Tally) -> None:
        """Add the items that occur in interactions but not in the metadata, with nothing but their id."""
        known = self._known.sorted()
        if self._wanted.contains(known).sum() == len(self._wanted):
            return
        with pq.ParquetFile(interactions) as file:
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=["item_id"]):
                ids = pc.unique(batch.column(0))
                ids = ids.filter(pa.array(self._known.add(hash_ids(ids))))
                tally.noted["items without metadata"] += len(ids)
                nothing = [pa.nulls(len(ids), kind) for kind in self._schema.types[1:]]
                self._file.write(pa.Table.from_arrays([ids, *nothing], schema=self._schema))

    def _count_hosts(self, table: pa.Table) -> None:
        if "image_path" not in table.column_names:
            return
        found = pc.extract_regex(table["image_path"], r"^https?://(?:[^/@]*@)?(?P<host>[^/:?#]+)")
        for entry in pc.value_counts(pc.struct_field(found, "host").drop_null()):
            self._hosts[entry["values"].as_py().lower()] += entry["counts"].as_py()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(*error)
