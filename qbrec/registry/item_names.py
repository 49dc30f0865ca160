"""From item ids to the rows that models know, and from rows to what people read."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from qbrec.errors import DataError
from qbrec.storage.ragged import Ragged

if TYPE_CHECKING:
    from qbrec.storage.generations import GenerationsView

SUGGEST_FROM = 20_000  # ids compared letter by letter for a suggestion


class Recommendation(TypedDict):
    """One recommended item; `label` reads its semantic ID in words."""

    item_id: str
    title: str
    score: float
    semantic_id: str
    label: str


class ItemNames:
    """Ids, titles, semantic IDs and labels of the items of one domain.

    Args:
        catalog: The catalogue and its generations.
        domain: The domain.
        semantic_ids: Codes of the items that have an ID, unsigned [N, L].
        labels: Words per code prefix (`"12"`, `"12.7"`, …), most telling first.
        offered: Items that may be recommended, bool [N]; suggestions for unknown ids are among them.
    """

    def __init__(
        self,
        catalog: GenerationsView,
        *,
        domain: str,
        semantic_ids: NDArray[np.unsignedinteger[Any]],
        labels: Mapping[str, Sequence[str]],
        offered: NDArray[np.bool_],
    ) -> None:
        self._catalog, self._domain, self._offered = catalog, domain, offered
        self._ids, self._labels = semantic_ids, labels

    def resolve(self, histories: Sequence[Sequence[str]], *, suggest_from: int = SUGGEST_FROM) -> Ragged:
        """Item rows of histories.

        Args:
            histories: Item ids, most recent last.
            suggest_from: Ids that an unknown one is compared with, at most, to suggest another.

        Raises:
            DataError: A history is empty or names an item that the catalogue does not have.
        """
        found = [self._rows(h, position=i, suggest_from=suggest_from) for i, h in enumerate(histories)]
        return Ragged.from_lists([rows.tolist() for rows in found])

    def lookup(self, item_ids: Sequence[str]) -> NDArray[np.int64]:
        """Rows of item ids, int64 [n]; of near-duplicates one stands for all, -1: unknown."""
        rows = np.array(self._catalog.lookup(item_ids, self._domain), np.int64)
        known = rows >= 0
        rows[known] = self._catalog.representatives(rows[known])
        return rows

    def item_ids(self, rows: NDArray[np.int64]) -> list[str]:
        """Item ids of rows, in their order."""
        return self._catalog.item_ids(rows)

    def semantic_id(self, row: int) -> str:
        """`<a_12><b_7>…` of one item row."""
        from qbrec.sequence.vocabulary import format_semantic_id

        return format_semantic_id([int(code) for code in self._ids[row]])

    def label(self, row: int) -> str:
        """`[Art] [Paint] [Set]`: the item's semantic ID in words."""
        from qbrec.quantizer.labels import describe

        return describe(self._labels, [int(code) for code in self._ids[row]])

    def describe(self, rows: NDArray[np.int64], scores: NDArray[np.float32]) -> list[list[Recommendation]]:
        """Ranked rows (-1: none) and their scores, [B, k] each, in words: B lists."""
        pairs = zip(rows, scores, strict=True)
        return [self._describe(found[found >= 0], score[found >= 0]) for found, score in pairs]

    def _describe(self, rows: NDArray[np.int64], scores: NDArray[np.float32]) -> list[Recommendation]:
        ids, titles = self._catalog.item_ids(rows), self._catalog.titles(rows)
        return [
            {
                "item_id": item_id,
                "title": title,
                "score": float(score),
                "semantic_id": self.semantic_id(int(row)),
                "label": self.label(int(row)),
            }
            for item_id, title, score, row in zip(ids, titles, scores, rows, strict=True)
        ]

    def _rows(self, history: Sequence[str], *, position: int, suggest_from: int) -> NDArray[np.int64]:
        if len(history) == 0:
            raise DataError(
                "a history is empty: there is nothing to continue",
                where=f"history {position}",
                fix="give at least one item id; for users without a past, recommend what is popular",
            )
        wrong = next((item for item in history if not isinstance(item, str)), None)
        if wrong is not None:
            raise DataError(
                f"an item id is {wrong!r}, not a text",
                where=f"history {position}",
                fix="write item ids as texts",
            )
        rows = self.lookup(list(history))
        if (rows < 0).any():
            unknown = history[int(np.flatnonzero(rows < 0)[0])]
            near = self._nearest(unknown, suggest_from)
            raise DataError(
                f"unknown item id {unknown!r} in domain {self._domain!r}",
                where=f"history {position}",
                fix=f"did you mean {', '.join(near)}?"
                if near
                else "use item ids of the catalogue that was trained on, or appended to it",
            )
        return rows

    def _nearest(self, unknown: str, most: int) -> list[str]:
        """Up to three known ids that look like it; in large catalogues among those of the same beginning."""
        known = self._suggestions
        for length in (0, 2, 4, 6):
            if len(known) <= most:
                break
            start = unknown[:length].lower()
            known = [item for item in known if item.lower().startswith(start)]
        return difflib.get_close_matches(unknown, known[:most], n=3, cutoff=0.6)

    @cached_property
    def _suggestions(self) -> list[str]:
        """Ids that may be meant where an unknown one stands; none where there are millions."""
        rows = np.flatnonzero(self._offered)
        return self._catalog.item_ids(rows) if len(rows) <= 50 * SUGGEST_FROM else []
