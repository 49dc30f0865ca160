"""Interactions on Ray Data: validate and look up → shuffle by hash range of the user → one tar per Ray task.

A partition is a range of user hashes, so users come out numbered in the order of their hash, whatever the
number of workers; within a partition everything is sorting and run lengths, no Python runs per user.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from qbrec.catalog.contract import Domain
from qbrec.catalog.encode import strings
from qbrec.catalog.index import distinct_rows
from qbrec.catalog.rejected import INTERACTIONS, pack
from qbrec.catalog.units import read_unit, write_part
from qbrec.config.sections import CatalogConfig
from qbrec.errors import DataError
from qbrec.storage.block_format import BLOCKS_PER_SHARD
from qbrec.storage.blocks import BlockTarWriter
from qbrec.storage.hashing import combine64, hash64

INTERACTIONS_PER_PARTITION = 1 << 22  # about 70 MB of tar
_BATCH_ROWS = 1 << 18
Ints = NDArray[np.int64]


def partition_of(users: NDArray[np.uint64], partitions: int) -> NDArray[np.int32]:
    """Partition of each user hash: equal ranges of the hash, in its order."""
    return ((users >> np.uint64(32)) * np.uint64(partitions) >> np.uint64(32)).astype(np.int32)


def read_interactions(
    unit: dict[str, Any],
    domains: list[Domain],
    *,
    partitions: int,
    hashes: NDArray[np.uint64],
    known: NDArray[np.uint64],
) -> Iterator[pa.Table]:
    """Interactions of a unit with ids turned into hashes and rows; bad ones keep their ids and say why.

    Args:
        unit: What to read.
        domains: All domains.
        partitions: Number of partitions of users.
        hashes: Item hashes, sorted: the index is the item row.
        known: Sorted hashes of all items that were brought, good or rejected.
    """
    domain = domains[unit["domain"]]
    for first_row, table in read_unit(unit, ["user_id", "item_id", "timestamp"], batch_rows=_BATCH_ROWS):
        n = table.num_rows
        users, items = strings(table, "user_id"), strings(table, "item_id")
        times = table["timestamp"].combine_chunks()
        if pa.types.is_timestamp(times.type):
            times = times.cast(pa.timestamp("us", tz=times.type.tz), safe=False)
        times = times.cast(pa.int64())
        ids = pc.fill_null(items, "")
        rows = distinct_rows(hashes, domain.name, ids)
        reasons = np.full(n, None, dtype=object)
        missing = rows < 0
        if missing.any():
            reasons[missing] = "item_id: is not among the items"
            brought = distinct_rows(known, domain.name, ids.filter(pa.array(missing))) >= 0
            reasons[np.flatnonzero(missing)[brought]] = "item_id: belongs to a rejected item"
        for name, column in (("timestamp", times), ("user_id", users), ("item_id", items)):
            reasons[column.is_null().to_numpy(zero_copy_only=False)] = f"{name}: is null"
            if name != "timestamp":
                empty = pc.equal(pc.fill_null(column, "x"), "")
                reasons[empty.to_numpy(zero_copy_only=False)] = f"{name}: is empty"
        encoded = pc.dictionary_encode(pc.fill_null(users, ""))
        distinct = hash64(domain.name, encoded.dictionary.to_pylist())
        user = distinct[encoded.indices.to_numpy(zero_copy_only=False)]
        bad = pa.array(reasons != None)  # noqa: E711 - element-wise on an object array
        yield pa.table(
            {
                "partition": partition_of(user, partitions),
                "user": user,
                "user_id": users,
                "item": rows,
                "time": pc.fill_null(times, 0),
                "domain": np.full(n, domain.number, dtype=np.int32),
                # What only a rejected row is asked for stays empty otherwise: it costs nothing to shuffle.
                "item_id": pc.if_else(bad, items, pa.scalar(None, pa.string())),
                "file": np.full(n, unit["file"], dtype=np.int32),
                "row": np.arange(first_row, first_row + n, dtype=np.int64),
                "reason": pa.array(reasons, pa.string()),
            }
        )


def summarise(table: pa.Table) -> dict[str, Any]:
    """What the driver must know: users, bad rows, and first and last time by domain."""
    good = table.filter(table["reason"].is_null())
    bad = table.filter(table["reason"].is_valid())
    domain, time = np.asarray(good["domain"]), np.asarray(good["time"])
    spans = [
        [number, time[domain == number].min(), time[domain == number].max(), (domain == number).sum()]
        for number in np.unique(domain)
    ]
    return {
        "users": np.unique(np.asarray(good["user"], dtype=np.uint64)).tobytes(),
        "rejected": pack(bad.select(INTERACTIONS.names).cast(INTERACTIONS)),
        "spans": np.array(spans, dtype=np.int64).reshape(-1, 4).tobytes(),
    }


@dataclass(frozen=True)
class HistoryJob:
    """What a task that writes one partition of histories needs beside its rows.

    Attributes:
        directory: The artifact under construction (on storage that all workers see).
        first_user: Number of the first user of every partition.
        starts: For split global_time: by domain, when validation and test begin, int64 [domains, 2].
        domain_names: Name of every domain, by number.
    """

    directory: Path
    config: CatalogConfig
    first_user: Ints
    starts: Ints
    domain_names: tuple[str, ...]

    def write(self, group: pa.Table, hashes: NDArray[np.uint64]) -> dict[str, Any]:
        """Write `histories-<partition>.tar` and its part of users.arrow; returns records and counts."""
        partition = int(group["partition"][0].as_py())
        item, time = (np.asarray(group[name], dtype=np.int64) for name in ("item", "time"))
        user = np.asarray(group["user"], dtype=np.uint64)
        # Equal timestamps: by the hash of (user, item), never by file order, which may know the future.
        order = np.lexsort((combine64(user, hashes[item]), time, user))
        user, item, time = user[order], item[order], time[order]
        begins = np.flatnonzero(np.concatenate([[True], user[1:] != user[:-1]]))
        lengths = np.diff(np.append(begins, len(user)))
        names = group["user_id"].combine_chunks().take(pa.array(order))
        self._check_collision(names, begins, lengths)
        heads = pa.array(begins)
        domain = np.asarray(group["domain"], dtype=np.int64)[order][begins]

        kept = np.minimum(lengths, self.config.max_history)
        offset = np.concatenate([[0], np.cumsum(kept)])
        index = np.arange(offset[-1]) + np.repeat(begins + lengths - kept - offset[:-1], kept)
        item, time = item[index], time[index]
        cut = self._cut(kept, offset, time, domain)
        number = self.first_user[partition] + np.arange(len(kept))
        records = self._write_blocks(partition, number, domain, offset, item, time, cut)
        users = {
            "user": number,
            "domain": pa.array(self.domain_names).take(pa.array(domain)),
            "user_id": names.take(heads),
        }
        part = pa.table(users)
        write_part(part, self.directory / f"users.part-{partition:06d}.tmp")
        local = np.arange(len(item)) - np.repeat(offset[:-1], kept)
        rows, counts = np.unique(item[local < np.repeat(cut[:, 0], kept)], return_counts=True)
        return {
            "records": np.ascontiguousarray(records).tobytes(),
            "rows": rows.tobytes(),
            "counts": counts.tobytes(),
            "kept": int(kept.sum()),
            "truncated": int((lengths - kept).sum()),
            "users": len(kept),
            "eval_users": np.bincount(domain[cut[:, 1] < kept], minlength=len(self.domain_names)).tobytes(),
        }

    def _check_collision(self, names: pa.Array, begins: Ints, lengths: Ints) -> None:
        differs = pc.not_equal(names, names.take(pa.array(np.repeat(begins, lengths))))
        if pc.any(differs).as_py():
            second = int(np.flatnonzero(differs.to_numpy(zero_copy_only=False))[0])
            first = int(begins[np.searchsorted(begins, second, side="right") - 1])
            raise DataError(
                f"the user ids {names[first].as_py()!r} and {names[second].as_py()!r} share a 64-bit hash",
                where="interactions, column user_id",
                fix="change one of the two ids",
            )

    def _cut(self, kept: Ints, offset: Ints, time: Ints, domain: Ints) -> NDArray[np.int32]:
        """History-relative start of validation and test, int32 [b, 2]; short histories train only."""
        if self.config.split == "leave_one_out":
            cut = np.stack([kept - 2, kept - 1], axis=1)
        else:
            owner = np.repeat(np.arange(len(kept)), kept)
            early = time[:, None] < self.starts[domain][owner]
            total = np.concatenate([np.zeros((1, 2), np.int64), np.cumsum(early, axis=0)])
            cut = total[offset[1:]] - total[offset[:-1]]
        return np.where((kept < 3)[:, None], kept[:, None], cut).astype(np.int32)

    def _write_blocks(
        self,
        shard: int,
        number: Ints,
        domain: Ints,
        offset: Ints,
        item: Ints,
        time: Ints,
        cut: NDArray[np.int32],
    ) -> NDArray[Any]:
        size = np.cumsum(np.diff(offset) * 16 + 25)  # bytes of all users up to this one
        # No more blocks than there are numbers reserved for a shard.
        block = (size - 1) // max(self.config.block_bytes, -(-int(size[-1]) // (BLOCKS_PER_SHARD - 1)))
        bounds = np.concatenate([[0], np.flatnonzero(np.diff(block)) + 1, [len(number)]])
        writer = BlockTarWriter(self.directory, prefix="histories", first_shard=shard, shard_bytes=1 << 62)
        with writer:
            for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
                span = slice(offset[begin], offset[end])
                writer.add(
                    {
                        "user": number[begin:end],
                        "domain": domain[begin:end].astype(np.uint8),
                        "offset": offset[begin : end + 1] - offset[begin],
                        "row": item[span],
                        "time": time[span],
                        "cut": cut[begin:end],
                    },
                    end - begin,
                )
            return writer.close()
