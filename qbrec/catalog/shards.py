"""Items, the part of Ray tasks that writes the shards: one range of the item hash → one tar."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from qbrec.catalog.encode import DISPLAY, from_binary
from qbrec.catalog.parts import write_part
from qbrec.storage.block_format import BLOCKS_PER_SHARD
from qbrec.storage.blocks import BlockTarWriter


@dataclass(frozen=True)
class ShardJob:
    """What a task that writes one shard of items needs beside its rows.

    Attributes:
        directory: The artifact under construction (on storage that all workers see).
        widths: Width of every modality that some item has.
        domain_names: Name of every domain, by number.
        first_row: Row of the first item of every shard, int64 [shards + 1].
        block_bytes: About how large a block is.
        first_shard: Number of shard 0: a later generation goes on where its parent ended.
    """

    directory: Path
    widths: dict[str, int]
    domain_names: tuple[str, ...]
    first_row: NDArray[np.int64]
    block_bytes: int
    first_shard: int = 0

    def write(self, shard: int, tables: list[pa.Table]) -> dict[str, Any] | None:
        """Write `items-<shard>.tar` and its part of items.arrow.

        Args:
            shard: Number of the shard.
            tables: Encoded items of the shard, as `ItemSplit` cut them, in any order.

        Returns:
            Records of the blocks, hashes and domains of the items in the order of their rows, sums by
            modality; None for a shard without items.
        """
        table = pa.concat_tables(tables)
        first, n = int(self.first_row[shard]), table.num_rows
        assert n == self.first_row[shard + 1] - first, "a shard has all its rows"
        if n == 0:
            return None
        hashes = np.asarray(table["hash"], dtype=np.uint64)
        order = np.argsort(hashes, kind="stable")
        hashes = hashes[order]
        assert (hashes[1:] > hashes[:-1]).all(), "the scan has refused equal hashes"
        table = table.combine_chunks()
        content = np.asarray(table["content"], dtype=np.int64)[order]
        domains = np.asarray(table["domain"], dtype=np.uint8)[order]
        sums = {modality: np.zeros((2, width)) for modality, width in self.widths.items()}
        number = self.first_shard + shard
        # Streams block by block: a shard in memory twice is enough.
        with BlockTarWriter(
            self.directory, prefix="items", first_shard=number, shard_bytes=1 << 62
        ) as writer:
            for begin, end in self._blocks(table, order):
                part = table.take(pa.array(order[begin:end]))
                fields: dict[str, NDArray[Any]] = {
                    "row": np.arange(first + begin, first + end),
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
        self._write_display(table, order, first, number)
        return {"records": records, "hashes": hashes, "domains": domains, "sums": sums}

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

    def _write_display(self, table: pa.Table, order: NDArray[np.int64], first: int, number: int) -> None:
        kept = ["domain", "item_id", "title", "brand", "categories"]
        table = table.select([*kept, *(c for c in table.column_names if c.startswith(DISPLAY))])
        table = table.take(pa.array(order))
        domain = pa.array(self.domain_names).take(table["domain"].combine_chunks())
        columns: dict[str, Any] = {"row": np.arange(first, first + len(order)), "domain": domain}
        columns |= {name: table[name] for name in kept[1:]}
        # A column of the input that bears one of our names would shadow it.
        for name in table.column_names:
            if name.startswith(DISPLAY):
                own = name.removeprefix(DISPLAY)
                columns[own if own not in columns else f"input.{own}"] = table[name]
        write_part(pa.table(columns), self.directory / f"items.part-{number:06d}.tmp")


def _structure(part: pa.Table) -> NDArray[np.int32]:
    array = part["structure"].combine_chunks()
    slots = array.type.byte_width // 4
    buffer = np.frombuffer(array.buffers()[1], dtype=np.int32).reshape(-1, slots)
    return buffer[array.offset : array.offset + len(array)]
