"""One generation: what was appended to a catalogue at a time, an artifact of the kind `generation`.

    items-*.tar, blocks.items.npy, items.arrow        items added: rows first_row … first_row + num_added - 1
    hashes.npy uint64, item_domain.npy uint8          of the items added, in the order of their rows
    changed-*.tar, blocks.changed.npy, changed.arrow  new versions of items of earlier rows
    changed.npy int64 [C]                             their rows, ascending, in the order of those samples
    retired.npy, restored.npy int64                   rows that left the shop and that came back, ascending
    unknown.parquet                                   ids that were to be retired and are not there
    rejected/items.parquet                            bad rows of the input

Files about nothing are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qbrec.errors import DataError
from qbrec.storage.artifact import Artifact
from qbrec.storage.blocks import BlockSet

if TYPE_CHECKING:
    import pyarrow as pa

KIND = "generation"
Ints = NDArray[np.int64]
_NONE: Ints = np.zeros(0, np.int64)


class Generation:
    """One generation by itself.

    Args:
        artifact: A finished artifact of the kind `generation`.
    """

    def __init__(self, artifact: Artifact) -> None:
        if artifact.kind != KIND:
            raise DataError(f"this is a {artifact.kind} artifact, not a generation", where=str(artifact.path))
        self.artifact = artifact

    @property
    def first_row(self) -> int:
        """Row of its first new item."""
        return int(self.artifact.meta["first_row"])

    @property
    def num_added(self) -> int:
        """Number of its new items."""
        return int(self.artifact.meta["num_added"])

    @cached_property
    def hashes(self) -> NDArray[np.uint64]:
        """Hashes of the new items, sorted; uint64 [num_added]."""
        return self._array("hashes", np.zeros(0, np.uint64))

    @cached_property
    def item_domain(self) -> NDArray[np.uint8]:
        """Domain numbers of the new items, uint8 [num_added]."""
        return self._array("item_domain", np.zeros(0, np.uint8))

    @cached_property
    def changed(self) -> Ints:
        """Earlier rows that it has new versions of, ascending, int64 [C]."""
        return self._array("changed", _NONE)

    @cached_property
    def retired(self) -> Ints:
        """Rows that it retires, ascending, int64."""
        return self._array("retired", _NONE)

    @cached_property
    def restored(self) -> Ints:
        """Rows retired before that it brings back, ascending, int64."""
        return self._array("restored", _NONE)

    def _array(self, name: str, empty: NDArray[Any]) -> NDArray[Any]:
        return self.artifact.load_npy(f"{name}.npy") if self.artifact.has(f"{name}.npy") else empty


@dataclass(frozen=True)
class StoredItems:
    """Items stored together: the tars and the Arrow file of one prefix of an artifact."""

    artifact: Artifact
    prefix: str

    @cached_property
    def blocks(self) -> BlockSet:
        """Their features."""
        return BlockSet.open(self.artifact, self.prefix)

    @cached_property
    def table(self) -> pa.Table:
        """Their display columns."""
        return self.artifact.load_table(f"{self.prefix}.arrow")


def places_of(ordered: Ints, rows: Ints) -> Ints:
    """Place of each row in an ascending array without repetitions, -1 where it is not in it; int64 [n]."""
    if not len(ordered):
        return np.full(len(rows), -1, np.int64)
    place = np.minimum(np.searchsorted(ordered, rows), len(ordered) - 1)
    return np.where(ordered[place] == rows, place, -1).astype(np.int64)
