"""Items, the part of Ray tasks that writes the shards: one range of the item hash → one tar."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from qbrec.catalog.encoders.encode import DISPLAY, from_binary
from qbrec.catalog.parts import write_part
from qbrec.storage.block_format import BLOCKS_PER_SHARD
from qbrec.storage.blocks import BlockTarWriter

_OURS = ("row", "domain", "item_id", "title", "brand", "categories")


@dataclass(frozen=True)
class ShardJob:
    """What a task that writes one shard of items needs beside its rows.

    Attributes:
        directory: The artifact under construction (on storage that all workers see).
        widths: Width of every modality that some item has.
        domain_names: Name of every domain, by number.
        first_row: Row of the first item of every shard, int64 [shards + 1]. Items that have their rows
            already (a column `row`) keep them and are ordered by them; then it counts them only.
        block_bytes: About how large a block is.
        prefix: Of the tars and of the Arrow file.
    """

    directory: Path
    widths: dict[str, int]
    domain_names: tuple[str, ...]
    first_row: NDArray[np.int64]
    block_bytes: int
    prefix: str = "items"

    def write(self, shard: int, tables: list[pa.Table]) -> dict[str, Any] | None:
        """Write `<prefix>-<shard>.tar` and its part of `<prefix>.arrow`.

        Args:
            shard: Number of the shard.
            tables: Encoded items of the shard, as `ItemSplit` cut them, in any order.

        Returns:
            Records of the blocks; rows, hashes and domains of the items in the order of their rows; sums by
            modality; None for a shard without items.
        """
        table = pa.concat_tables(tables)
        first, n = int(self.first_row[shard]), table.num_rows
        assert n == self.first_row[shard + 1] - first, "a shard has all its rows"
        if n == 0:
            return None
        hashes = np.asarray(table["hash"], dtype=np.uint64)
        kept = np.asarray(table["row"], dtype=np.int64) if "row" in table.column_names else None
        key = hashes if kept is None else kept
        order = np.argsort(key, kind="stable")
        hashes = hashes[order]
        assert (np.diff(key[order]) > 0).all(), "the scan has refused equal hashes"
        rows = np.arange(first, first + n) if kept is None else kept[order]
        table = table.combine_chunks()
        content = np.asarray(table["content"], dtype=np.int64)[order]
        domains = np.asarray(table["domain"], dtype=np.uint8)[order]
        sums = {modality: np.zeros((2, width)) for modality, width in self.widths.items()}
        # Streams block by block: a shard in memory twice is enough.
        with BlockTarWriter(
            self.directory, prefix=self.prefix, first_shard=shard, shard_bytes=1 << 62
        ) as writer:
            for begin, end in self._blocks(table, order):
                part = table.take(pa.array(order[begin:end]))
                fields: dict[str, NDArray[Any]] = {
                    "row": rows[begin:end],
                    "domain": domains[begin:end],
                    "structure": _structure(part),
                    "content": content[begin:end],
                }
                for modality, width in self.widths.items():
                    values = from_binary(part[f"feature.{modality}"], width)
                    fields[f"feature.{modality}"] = values
                    fields[f"tokens.{modality}"] = np.asarray(part[f"tokens.{modality}"], dtype=np.uint8)
                    wide = values.astype(np.float64)
                    sums[modality] += np.stack([wide.sum(axis=0), np.square(wide).sum(axis=0)])
                writer.add(fields, end - begin)
            records = writer.close()
        light = table.drop_columns([c for c in table.column_names if c.startswith(("feature.", "tokens."))])
        display = display_table(light.take(pa.array(order)), rows, self.domain_names)
        write_part(display, self.directory / f"{self.prefix}.part-{shard:06d}.tmp")
        return {"records": records, "rows": rows, "hashes": hashes, "domains": domains, "sums": sums}

    def _blocks(self, table: pa.Table, order: NDArray[np.int64]) -> list[tuple[int, int]]:
        """Where blocks of about `block_bytes` begin and end."""
        slots = table["structure"].type.byte_width // 4
        size = np.full(len(order), 17 + 4 * slots, dtype=np.int64)
        for modality, width in self.widths.items():
            size += 1 + 2 * width * np.asarray(table[f"tokens.{modality}"], dtype=np.int64)
        ends = np.cumsum(size[order])
        # No more blocks than there are numbers reserved for a shard.
        block = (ends - 1) // max(self.block_bytes, -(-int(ends[-1]) // (BLOCKS_PER_SHARD - 1)))
        bounds = [0, *(np.flatnonzero(np.diff(block)) + 1).tolist(), len(order)]
        return list(pairwise(bounds))


def display_table(table: pa.Table, rows: NDArray[np.int64], domain_names: tuple[str, ...]) -> pa.Table:
    """What is kept to show of encoded items: row, domain, item_id, title, brand, categories, further columns.

    Args:
        table: n encoded items.
        rows: Their rows, int64 [n].
        domain_names: Name of every domain, by number.
    """
    kept = ("item_id", "title", "brand", "categories")
    domain = pa.array(domain_names).take(table["domain"].combine_chunks())
    columns: dict[str, Any] = {"row": rows, "domain": domain} | {name: table[name] for name in kept}
    columns |= {
        stored_name(name.removeprefix(DISPLAY)): table[name]
        for name in table.column_names
        if name.startswith(DISPLAY)
    }
    return pa.table(columns)


def stored_name(column: str) -> str:
    """Name under which a further column of the input is kept: one that bears one of ours would shadow it."""
    return f"input.{column}" if column in _OURS else column


def _structure(part: pa.Table) -> NDArray[np.int32]:
    array = part["structure"].combine_chunks()
    slots = array.type.byte_width // 4
    buffer = np.frombuffer(array.buffers()[1], dtype=np.int32).reshape(-1, slots)
    return buffer[array.offset : array.offset + len(array)]
