"""Collapse duplicates: what was done with an item is moved to the representative of its group.

Rows never move: the other items of a group stay in the catalogue and are retired, which means that nobody
interacts with them and nothing recommends them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from qbrec.storage.block_format import shard_name
from qbrec.storage.blocks import BlockSet, BlockTarWriter, write_block_index

REPRESENTATIVES = "representatives.npy"
_NEW = "collapsed"  # folder of the rewritten tars until all are written
_INDEX = "blocks.histories.npy"

Ints = NDArray[np.int64]


def representatives(groups: Ints, *, train_counts: Ints, item_domain: NDArray[np.uint8]) -> Ints:
    """The item that stands for each one: of its group and domain the most popular, then the lowest row.

    Args:
        groups: First row of the group of each item, [N].
        train_counts: Interactions in the training parts, [N].
        item_domain: Domain number, [N]: histories have one domain, so nothing is moved to another one.

    Returns:
        int64 [N]; an item's own row where it stands for itself.
    """
    chosen = np.arange(len(groups), dtype=np.int64)
    rows = np.flatnonzero(np.bincount(groups, minlength=len(groups))[groups] > 1)
    order = rows[np.lexsort((rows, -train_counts[rows], item_domain[rows], groups[rows]))]
    begins = np.ones(len(order), dtype=bool)
    begins[1:] = (np.diff(groups[order]) != 0) | (item_domain[order[1:]] != item_domain[order[:-1]])
    chosen[order] = order[np.flatnonzero(begins)[np.cumsum(begins) - 1]]
    return chosen


def collapse_block(
    block: Mapping[str, NDArray[Any]],
    *,
    representative: Ints,
    grouped: NDArray[np.bool_],
    split: Literal["leave_one_out", "global_time"],
) -> dict[str, NDArray[Any]]:
    """Histories of one block with every item replaced by its representative.

    Of the interactions of a user with the items of one group the first stays; with items that are in no group
    nothing happens. So no history becomes empty, and users keep their numbers. The cuts are made anew: for
    leave_one_out at the last two interactions left, for global_time at the same moments as before.

    Args:
        block: `user`, `domain`, `offset`, `row`, `time`, `cut` as stored.
        representative: Of each item, [N].
        grouped: Whether an item is in a group of several, bool [N].
        split: `catalog.split`.

    Returns:
        The same fields.
    """
    offset, before = np.asarray(block["offset"], np.int64), np.diff(block["offset"])
    row = representative[block["row"]]
    owner = np.repeat(np.arange(len(before)), before)
    member = np.flatnonzero(grouped[row])
    _, first = np.unique(owner[member] * len(representative) + row[member], return_index=True)
    keep = ~grouped[row]
    keep[member[first]] = True
    position = np.concatenate([[0], np.cumsum(keep)])  # of each old place among those that stay
    new = position[offset]
    lengths = np.diff(new)
    assert (lengths > 0).all() or (before == 0).any()
    if split == "leave_one_out":
        cut = lengths[:, None] - np.array([2, 1])
    else:
        cut = position[offset[:-1, None] + block["cut"]] - new[:-1, None]
    cut = np.where((lengths < 3)[:, None], lengths[:, None], cut)
    return {
        "user": block["user"],
        "domain": block["domain"],
        "offset": new,
        "row": row[keep],
        "time": block["time"][keep],
        "cut": cut.astype(np.int32),
    }


@dataclass(frozen=True)
class CollapseJob:
    """What a task that rewrites one shard of histories needs beside its number.

    Attributes:
        directory: The catalogue under construction, with `representatives.npy`.
        split: `catalog.split`.
        num_domains: Number of domains.
    """

    directory: Path
    split: Literal["leave_one_out", "global_time"]
    num_domains: int

    @cached_property
    def _index(self) -> NDArray[Any]:
        index: NDArray[Any] = np.load(self.directory / _INDEX, allow_pickle=False)
        return index

    @property
    def shards(self) -> list[int]:
        """Numbers of the shards."""
        return [int(shard) for shard in np.unique(self._index["shard"])]

    def rewrite(self, shard: int) -> dict[str, Any]:
        """Write one shard anew beside the old one, which stays: a task may run twice.

        Returns:
            Records of the blocks, rows and their counts in the training parts, totals.
        """
        records = self._index[self._index["shard"] == shard]
        blocks = BlockSet(
            records, prefix="histories", resolve=lambda tar: self.directory / tar, fingerprint=""
        )
        representative: Ints = np.load(self.directory / REPRESENTATIVES, mmap_mode="r", allow_pickle=False)
        grouped = np.bincount(representative, minlength=len(representative))[representative] > 1
        trained, kept, removed = [], 0, 0
        tested = np.zeros(self.num_domains, np.int64)
        with BlockTarWriter(
            self.directory / _NEW,
            prefix="histories",
            first_shard=shard,
            first_block=int(records["block"][0]),
            shard_bytes=1 << 62,
        ) as writer:
            for number in range(blocks.num_blocks):
                old = blocks.read(number)
                new = collapse_block(old, representative=representative, grouped=grouped, split=self.split)
                lengths = np.diff(new["offset"])
                place = np.arange(len(new["row"])) - np.repeat(new["offset"][:-1], lengths)
                trained.append(new["row"][place < np.repeat(new["cut"][:, 0], lengths)])
                has_test = new["cut"][:, 1] < lengths
                tested += np.bincount(new["domain"][has_test], minlength=self.num_domains)
                kept += len(new["row"])
                removed += len(old["row"]) - len(new["row"])
                writer.add(new, len(lengths))
            new_records = writer.close()
        rows, counts = np.unique(np.concatenate(trained), return_counts=True)
        return {
            "records": new_records,
            "rows": rows,
            "counts": counts,
            "kept": kept,
            "removed": removed,
            "eval_users": tested,
        }


def collapse_histories(
    job: CollapseJob,
    *,
    num_items: int,
    reduce: Callable[..., Iterator[Any]],
    update: Callable[[int], None],
) -> tuple[Ints, dict[str, Any]]:
    """Rewrite all histories, then put them in the place of the old ones.

    Args:
        job: The job.
        num_items: N.
        reduce: `exchange.reduce`.
        update: Called with the number of shards done, for progress.

    Returns:
        Interactions of each item in the training parts, int64 [N]; and `kept`, `removed` (interactions) and
        `eval_users` (int64 by domain).
    """
    shards = job.shards
    counts = np.zeros(num_items, np.int64)
    records, kept, removed = [], 0, 0
    tested = np.zeros(job.num_domains, np.int64)
    for result in reduce([[shard] for shard in shards], lambda _, mine: job.rewrite(mine[0])):
        counts[result["rows"]] += result["counts"]
        records.append(result["records"])
        kept += result["kept"]
        removed += result["removed"]
        tested += result["eval_users"]
        update(1)
    for shard in shards:
        name = shard_name("histories", shard)
        os.replace(job.directory / _NEW / name, job.directory / name)
    (job.directory / _NEW).rmdir()
    write_block_index(job.directory / _INDEX, records)
    return counts, {"kept": kept, "removed": removed, "eval_users": tested}
