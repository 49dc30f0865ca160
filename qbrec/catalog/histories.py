"""Histories, the part of Ray tasks: read, look up and split by user → sort, cut and write one tar.

A partition is a range of user hashes, so users come out numbered in the order of their hash, whatever the
number of workers; within a partition everything is sorting and run lengths, no Python runs per user.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from qbrec.catalog import rejected
from qbrec.catalog.contract import Domain
from qbrec.catalog.encoders.fields import strings
from qbrec.catalog.exchange import fetch, range_of, split_by
from qbrec.catalog.index import distinct_rows
from qbrec.catalog.parts import write_part
from qbrec.catalog.units import read_unit
from qbrec.config.sections import CatalogConfig
from qbrec.errors import DataError
from qbrec.storage.block_format import BLOCKS_PER_SHARD
from qbrec.storage.blocks import BlockTarWriter
from qbrec.storage.hashing import combine64, hash64

INTERACTION_BYTES = 16  # of a history tar: row and time
_BATCH_ROWS = 1 << 20  # a unit: the more rows at once, the fewer ids are hashed twice
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class ReadJob:
    """What a task that reads interactions needs beside its units.

    Attributes:
        directory: The artifact under construction, for the rejected rows.
        domains: All domains.
        partitions: Number of ranges of the user hash.
        hashes: Item hashes, sorted (or their reference in Ray's object store): the index is the item row.
        refused: Sorted hashes of the items that were brought and rejected.
    """

    directory: Path
    domains: list[Domain]
    partitions: int
    hashes: Any
    refused: NDArray[np.uint64]

    def split(self, units: list[dict[str, Any]]) -> tuple[list[pa.Table], dict[str, Any]]:
        """Good interactions of some units by partition, then their users by partition.

        Returns:
            `partitions` tables (user uint64, item int64 row, time int64) followed by `partitions` tables of
            distinct users (user uint64, user_id string, domain uint8), and the spans of time by domain.
        """
        hashes = fetch(self.hashes)
        parts = [self._read(unit, hashes) for unit in units]
        interactions, users = (pa.concat_tables([part[i] for part in parts]) for i in (0, 1))
        spans = [part[2] for part in parts]
        tables = []
        for table in (interactions, users):
            keys = np.asarray(table["user"], dtype=np.uint64)
            tables += split_by(table, range_of(keys, self.partitions), self.partitions)
        return tables, {"units": len(units), "spans": np.concatenate(spans)}

    def _read(self, unit: dict[str, Any], hashes: NDArray[np.uint64]) -> tuple[pa.Table, pa.Table, Ints]:
        domain = self.domains[unit["domain"]]
        bad = []
        good = []
        for first_row, table in read_unit(unit, ["user_id", "item_id", "timestamp"], batch_rows=_BATCH_ROWS):
            rows, times, reasons = self._look_up(table, domain, hashes)
            fine = reasons.is_null()
            if reasons.null_count < len(reasons):
                bad.append(rejected.interactions(table, reasons, domain.number, unit["file"], first_row))
            good.append(
                pa.table({"user_id": strings(table, "user_id"), "item": rows, "time": times}).filter(fine)
            )
        if bad:
            rejected.write_part(self.directory, "interactions", unit["number"], pa.concat_tables(bad))
        kept = pa.concat_tables(good).combine_chunks()
        encoded = pc.dictionary_encode(kept["user_id"].combine_chunks())
        names = encoded.dictionary
        distinct = hash64(domain.name, names.to_pylist())
        interactions = kept.select(["item", "time"]).append_column(
            "user", pa.array(distinct[encoded.indices.to_numpy(zero_copy_only=False)])
        )
        numbers = np.full(len(names), domain.number, np.uint8)
        users = pa.table({"user": distinct, "user_id": names, "domain": numbers})
        time = np.asarray(kept["time"], dtype=np.int64)
        spans = np.array([[domain.number, time.min(), time.max()]] if len(time) else [], np.int64)
        return interactions, users, spans.reshape(-1, 3)

    def _look_up(
        self, table: pa.Table, domain: Domain, hashes: NDArray[np.uint64]
    ) -> tuple[Ints, pa.Array, pa.Array]:
        """Row and time of every interaction, and why it is bad (null: it is not)."""
        users, items = strings(table, "user_id"), strings(table, "item_id")
        times = table["timestamp"].combine_chunks()
        if pa.types.is_timestamp(times.type):
            times = times.cast(pa.timestamp("us", tz=times.type.tz), safe=False)
        times = times.cast(pa.int64())
        ids = pc.fill_null(items, "")
        rows = distinct_rows(hashes, domain.name, ids)
        reasons = np.full(table.num_rows, None, dtype=object)
        missing = rows < 0
        if missing.any():
            reasons[missing] = "item_id: is not among the items"
            refused = distinct_rows(self.refused, domain.name, ids.filter(pa.array(missing))) >= 0
            reasons[np.flatnonzero(missing)[refused]] = "item_id: belongs to a rejected item"
        for name, column in (("timestamp", times), ("user_id", users), ("item_id", items)):
            if column.null_count:
                reasons[column.is_null().to_numpy(zero_copy_only=False)] = f"{name}: is null"
            if name != "timestamp":
                empty = pc.equal(pc.fill_null(column, "x"), "")
                reasons[empty.to_numpy(zero_copy_only=False)] = f"{name}: is empty"
        return rows, pc.fill_null(times, 0), pa.array(reasons, pa.string())


def count_users(_number: int, users: list[pa.Table]) -> int:
    """Distinct users of one partition."""
    return len(np.unique(np.concatenate([np.asarray(table["user"], dtype=np.uint64) for table in users])))


@dataclass(frozen=True)
class HistoryJob:
    """What a task that writes one partition of histories needs beside its rows.

    Attributes:
        directory: The artifact under construction (on storage that all workers see).
        first_user: Number of the first user of every partition, int64 [partitions + 1].
        starts: For split global_time: by domain, when validation and test begin, int64 [domains, 2].
        domain_names: Name of every domain, by number.
        hashes: Item hashes, sorted (or their reference in Ray's object store).
        block_bytes: About how large a block is.
    """

    directory: Path
    config: CatalogConfig
    first_user: Ints
    starts: Ints
    domain_names: tuple[str, ...]
    hashes: Any
    block_bytes: int

    def write(self, partition: int, tables: list[pa.Table]) -> dict[str, Any] | None:
        """Write `histories-<partition>.tar` and its part of users.arrow.

        Args:
            partition: Number of the partition.
            tables: What `ReadJob.split` made for it: all tables of interactions, then all tables of users.

        Returns:
            Records of the blocks; rows and their counts in the training parts; totals. None without a user.
        """
        if self.first_user[partition] == self.first_user[partition + 1]:
            return None
        half = len(tables) // 2
        events = pa.concat_tables(tables[:half])
        users = _distinct(pa.concat_tables(tables[half:]))
        item, time = (np.asarray(events[name], dtype=np.int64) for name in ("item", "time"))
        user = np.asarray(events["user"], dtype=np.uint64)
        order = _history_order(user, time, fetch(self.hashes), item)
        user, item, time = user[order], item[order], time[order]
        begins = np.flatnonzero(np.concatenate([[True], user[1:] != user[:-1]]))
        lengths = np.diff(np.append(begins, len(user)))
        assert np.array_equal(user[begins], np.asarray(users["user"]))
        domain = np.asarray(users["domain"], dtype=np.int64)

        kept = np.minimum(lengths, self.config.max_history)
        offset = np.concatenate([[0], np.cumsum(kept)])
        index = np.arange(offset[-1]) + np.repeat(begins + lengths - kept - offset[:-1], kept)
        item, time = item[index], time[index]
        cut = self._cut(kept, offset, time, domain)
        number = self.first_user[partition] + np.arange(len(kept))
        assert number[-1] + 1 == self.first_user[partition + 1]
        records = self._write_blocks(partition, number, domain, offset, item, time, cut)
        columns = {
            "user": number,
            "domain": pa.array(self.domain_names).take(pa.array(domain)),
            "user_id": users["user_id"],
        }
        write_part(pa.table(columns), self.directory / f"users.part-{partition:06d}.tmp")
        local = np.arange(len(item)) - np.repeat(offset[:-1], kept)
        rows, counts = np.unique(item[local < np.repeat(cut[:, 0], kept)], return_counts=True)
        return {
            "records": records,
            "rows": rows,
            "counts": counts,
            "kept": int(kept.sum()),
            "truncated": int((lengths - kept).sum()),
            "eval_users": np.bincount(domain[cut[:, 1] < kept], minlength=len(self.domain_names)),
        }

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
        block = (size - 1) // max(self.block_bytes, -(-int(size[-1]) // (BLOCKS_PER_SHARD - 1)))
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


def _history_order(user: NDArray[np.uint64], time: Ints, hashes: NDArray[np.uint64], item: Ints) -> Ints:
    """Order by user hash, then time; equal timestamps by the hash of (user, item), int64 [n].

    Never by file order, which may know the future. Two unstable sorts and a stable one of the ties take a
    third of the time of one stable sort by three keys.
    """
    order = np.argsort(user)
    ordered = user[order]
    rank = np.cumsum(np.concatenate([[0], ordered[1:] != ordered[:-1]])).astype(np.uint64)
    with np.errstate(over="ignore"):
        since = (time - time.min()).view(np.uint64)  # right for any two times: it wraps to the true distance
    free = 64 - int(rank[-1]).bit_length()
    # Times that need more bits than the rank leaves are compared whole among the ties.
    drop = max(int(since.max()).bit_length() - free, 0)
    key = (rank << np.uint64(free)) | (since[order] >> np.uint64(drop)) if rank[-1] else since[order]
    second = np.argsort(key)
    order, key = order[second], key[second]
    equal = key[1:] == key[:-1]
    tied = np.flatnonzero(np.concatenate([[False], equal]) | np.concatenate([equal, [False]]))
    mine = order[tied]
    order[tied] = mine[np.lexsort((combine64(user[mine], hashes[item[mine]]), time[mine], key[tied]))]
    return order


def _distinct(users: pa.Table) -> pa.Table:
    """Every user once, in the order of the hash.

    Raises:
        DataError: Two users have the same hash.
    """
    keys = np.asarray(users["user"], dtype=np.uint64)
    order = np.argsort(keys, kind="stable")
    users, keys = users.take(pa.array(order)).combine_chunks(), keys[order]
    first = np.concatenate([[True], keys[1:] != keys[:-1]])
    heads = pa.array(np.flatnonzero(first)[np.cumsum(first) - 1])
    for name in ("user_id", "domain"):
        column = users[name].combine_chunks()
        differs = pc.not_equal(column, column.take(heads)).to_numpy(zero_copy_only=False)
        if differs.any():
            second = int(np.flatnonzero(differs)[0])
            ids = [users["user_id"][int(place)].as_py() for place in (heads[second].as_py(), second)]
            raise DataError(
                f"the user ids {ids[0]!r} and {ids[1]!r} share a 64-bit hash",
                where="interactions, column user_id",
                fix="change one of the two ids",
            )
    return users.filter(pa.array(first))
