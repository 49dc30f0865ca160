"""Reading the ID table of a catalogue that has grown: `SemanticIds`, and the items appended since."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qbrec.errors import DataError
from qbrec.quantizer.ids import SemanticIds, ShownId, id_text, parse_prefix
from qbrec.quantizer.labels import describe
from qbrec.quantizer.packing import pack
from qbrec.storage.artifact import Artifact
from qbrec.storage.id_table import IdTable


class GrownIds:
    """Semantic IDs of a quantizer and of the generations appended since.

    The catalogue's table stays on disk, sorted; the appended items, which are few beside it, are compared one
    by one.

    Args:
        quantizer: Artifact of kind `quantizer`.
        generations: IDs of the generations, oldest first.

    Raises:
        DataError: The IDs do not follow one another.
    """

    def __init__(self, quantizer: Artifact, generations: Sequence[Artifact] = ()) -> None:
        self._base, self._where = SemanticIds(quantizer), str(quantizer.path)
        table = IdTable(quantizer, generations)
        self.sizes, self.num_items = table.sizes, table.num_items
        self._appended = table.appended
        self._first = self.num_items - len(self._appended)

    def show(self, rows: Sequence[int]) -> list[ShownId]:
        """Codes, text and label of items; buckets count all items, whenever they came.

        Args:
            rows: Item rows.

        Raises:
            DataError: A row is not in the table.
        """
        return [self._show(int(row)) for row in rows]

    def find(self, prefix: str | Sequence[int]) -> NDArray[np.int64]:
        """Rows of the items whose ID starts with a prefix, by ID; appended ones come last within one.

        Args:
            prefix: Codes, or text as `parse_prefix` reads it.

        Returns:
            int64 [n], empty when no item has it.

        Raises:
            ConfigError: Not a prefix, longer than an ID, or a code that its level does not have.
        """
        codes = parse_prefix(prefix) if isinstance(prefix, str) else tuple(int(c) for c in prefix)
        old = self._base.find(codes)
        new = self._starting_with(codes)
        if not len(new):
            return old
        ids = np.concatenate([self._base.ids[old], self._appended[new]])
        order = np.argsort(pack(ids, self.sizes), kind="stable")
        return np.asarray(np.concatenate([old, new + self._first])[order])

    def _show(self, row: int) -> ShownId:
        if 0 <= row < self._first:
            (shown,) = self._base.show([row])
            return replace(shown, bucket=shown.bucket + len(self._starting_with(shown.codes)))
        if not 0 <= row < self.num_items:
            raise DataError(
                f"there is no semantic ID of item row {row}",
                where=self._where,
                fix="an appended item gets its ID when the run's quantizer is finished: `qbrec run`",
            )
        codes = tuple(int(code) for code in self._appended[row - self._first])
        bucket = len(self._base.find(codes)) + len(self._starting_with(codes))
        return ShownId(row, codes, id_text(codes), describe(self._base.labels, codes), bucket)

    def _starting_with(self, codes: Sequence[int]) -> NDArray[Any]:
        """Places of appended items whose ID starts with these codes."""
        return np.flatnonzero((self._appended[:, : len(codes)] == np.array(codes, np.int64)).all(1))
