"""Items given to a catalogue that knows some of them, the driver's side: encode and sort by what is new."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from qbrec.catalog.append.classify import TALLY, ClassifyJob
from qbrec.catalog.append.frozen import frozen_text
from qbrec.catalog.build_items import ItemSteps
from qbrec.catalog.exchange import Parts, exchange
from qbrec.engine.context import StageContext
from qbrec.storage.generations import GenerationsView

Ints = NDArray[np.int64]


@dataclass
class Compared:
    """Given items in Ray's object store by what is new about them, and what is known of all.

    Attributes:
        given: Rows that the input names, bool [N].
        parts: By part of `ClassifyJob.split`, a reference for each range of the hash.
        items: Of every part and range, int64 [parts, ranges].
        bytes: Likewise.
        tally: Items by `TALLY`.
        restored: Rows that come back, ascending.
        sizes: `token_sizes` of what is to be stored.
    """

    given: NDArray[np.bool_]
    parts: Parts[pa.Table]
    items: Ints
    bytes: Ints
    tally: Ints
    restored: Ints
    sizes: Ints

    @classmethod
    def nothing(cls, num_items: int, *, parts: int = 1, ranges: int = 0, modalities: int = 0) -> Compared:
        """Before anything was compared; N = `num_items` are known."""
        items, sizes = np.zeros((2, parts, ranges), np.int64)
        return cls(
            given=np.zeros(num_items, dtype=bool),
            parts=[],
            items=items,
            bytes=sizes,
            tally=np.zeros(len(TALLY), np.int64),
            restored=np.zeros(0, np.int64),
            sizes=np.zeros((modalities, 4), np.int64),
        )

    def packed(self, which: slice, shard_bytes: int) -> tuple[Parts[pa.Table], Ints]:
        """Small parts together in shards of about `shard_bytes`, in their order; lets go of the parts.

        Ranges of the hash follow one another within the items of one generation, so rows do across shards.

        Args:
            which: Parts to be packed, one after the other.
            shard_bytes: `catalog.shard_bytes`.

        Returns:
            References by shard, and the first item of every shard, int64 [shards + 1].
        """
        items, sizes = self.items[which].ravel(), self.bytes[which].ravel()
        refs = [ref for part in self.parts[which] for ref in part]
        for part in self.parts[which]:
            part.clear()
        filled = np.flatnonzero(items)
        shard = (np.cumsum(sizes[filled]) - sizes[filled]) // shard_bytes
        bounds = np.flatnonzero(np.diff(shard, prepend=-1, append=shard[-1:] + 1))
        packed = [[refs[i] for i in filled[begin:end]] for begin, end in pairwise(bounds.tolist())]
        first = np.concatenate([[0], np.cumsum(items[filled])])
        return packed, first[bounds]


def compare_items(ctx: StageContext, steps: ItemSteps, view: GenerationsView) -> Compared:
    """Encode the items and compare each with what is stored of it.

    Args:
        ctx: Of the driver.
        steps: Of the items, frozen as the catalogue is.
        view: The catalogue and its generations so far.

    Raises:
        ConfigError: The catalogue's encoder cannot be had.
        DataError: An id shares its hash with another one that is stored.
    """
    base = view.base.artifact
    encoded = steps.encode(frozen_text(base, steps.catalog) if "text" in steps.encoded else None)
    job = ClassifyJob(
        ctx.store.root.resolve(),
        base.path.resolve(),
        tuple(generation.artifact.path.resolve() for generation in view.generations),
        tuple(domain.name for domain in steps.domains),
        steps.modalities,
        steps.shards,
    )
    found = Compared.nothing(
        view.num_items, parts=job.parts, ranges=steps.shards, modalities=len(steps.modalities)
    )
    restored = [found.restored]
    with ctx.progress(int(encoded.counts.sum()), "comparing items") as progress:

        def add(summary: dict[str, Any]) -> None:
            if summary["shard"] < 0:
                return
            found.items[:, summary["shard"]] = summary["items"]
            found.bytes[:, summary["shard"]] = summary["bytes"]
            found.tally += summary["tally"]
            found.given[summary["known"]] = True
            found.sizes[:, :3] += summary["sizes"][:, :3]
            found.sizes[:, 3] = np.maximum(found.sizes[:, 3], summary["sizes"][:, 3])
            restored.append(summary["restored"])
            progress.update(int(summary["tally"].sum()))

        group = max(1, len(encoded.parts[0]))
        found.parts = exchange(_drain(encoded.parts), job.split, partitions=job.parts, group=group, add=add)
    found.restored = np.sort(np.concatenate(restored))
    return found


def _drain(parts: Parts[pa.Table]) -> Iterator[Any]:
    """The parts of one range after the other, let go of as they are handed out."""
    for number in range(len(parts)):
        mine, parts[number] = parts[number], []
        yield from mine
