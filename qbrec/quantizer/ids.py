"""Reading the ID table: which semantic ID an item has, which items stand behind a prefix."""

from __future__ import annotations

import bisect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from qbrec.errors import ConfigError, DataError
from qbrec.quantizer.labels import describe
from qbrec.storage.artifact import Artifact

LEVELS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class ShownId:
    """One item: its row, codes, token text `<a_12><b_7>…`, label, and the number of items on the same ID."""

    row: int
    codes: tuple[int, ...]
    text: str
    label: str
    bucket: int


class SemanticIds:
    """The table of semantic IDs of one quantizer artifact, mapped from disk.

    Attributes:
        ids: Codes [N, L], the smallest unsigned type.
        order: Rows sorted by (ID, popularity descending, row), int64 [N].
        sizes: Codes per level.
    """

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact
        self.ids: np.ndarray[Any, Any] = artifact.load_npy("semantic_ids.npy")
        self.order: np.ndarray[Any, Any] = artifact.load_npy("bucket_order.npy")
        self.sizes: tuple[int, ...] = tuple(artifact.meta["levels"])

    @cached_property
    def labels(self) -> dict[str, list[str]]:
        """Words per prefix; read when first wanted."""
        labels: dict[str, list[str]] = self._artifact.load_json("labels.json")
        return labels

    def show(self, rows: Sequence[int]) -> list[ShownId]:
        """Codes, text and label of items.

        Args:
            rows: Item rows.

        Raises:
            DataError: A row is not in the table.
        """
        out = []
        for row in rows:
            if not 0 <= row < len(self.ids):
                where = str(self._artifact.path)
                raise DataError(f"there is no item row {row}", where=where, fix="look the item up first")
            codes = tuple(int(c) for c in self.ids[row])
            start, stop = self._span(codes)
            out.append(ShownId(int(row), codes, id_text(codes), describe(self.labels, codes), stop - start))
        return out

    def find(self, prefix: str | Sequence[int]) -> np.ndarray[Any, Any]:
        """Rows of the items whose ID starts with a prefix, by ID, the most popular first within one.

        Args:
            prefix: Codes, or text as `parse_prefix` reads it.

        Returns:
            int64 [n], empty when no item has it.

        Raises:
            ConfigError: Not a prefix, longer than an ID, or a code that its level does not have.
        """
        codes = parse_prefix(prefix) if isinstance(prefix, str) else tuple(int(c) for c in prefix)
        if len(codes) > len(self.sizes):
            raise ConfigError(
                f"the prefix has {len(codes)} codes, an ID has {len(self.sizes)}",
                where=str(prefix),
                fix="shorten it",
            )
        for level, (code, size) in enumerate(zip(codes, self.sizes, strict=False)):
            if not 0 <= code < size:
                raise ConfigError(f"level {level} has codes 0 to {size - 1}, not {code}", where=str(prefix))
        start, stop = self._span(codes)
        return np.asarray(self.order[start:stop], dtype=np.int64)

    def _span(self, codes: tuple[int, ...]) -> tuple[int, int]:
        # Bisection over the mapped table: a look-up touches a few pages, whatever the size of the catalogue.
        def key(place: int) -> tuple[int, ...]:
            return tuple(int(c) for c in self.ids[self.order[place], : len(codes)])

        places = range(len(self.order))
        return bisect.bisect_left(places, codes, key=key), bisect.bisect_right(places, codes, key=key)


def id_text(codes: Sequence[int]) -> str:
    """An ID as the tokens of the vocabulary: `<a_12><b_7><c_251><d_3>`."""
    return "".join(f"<{LEVELS[level]}_{int(code)}>" for level, code in enumerate(codes))


def parse_prefix(text: str) -> tuple[int, ...]:
    """Read `12.7`, `12 7`, `12,7` or `<a_12><b_7>`.

    Raises:
        ConfigError: It is none of these.
    """
    text = text.strip()
    tokens = re.findall(r"<([a-z])_(\d+)>", text)
    if tokens and "".join(f"<{a}_{n}>" for a, n in tokens) == text.replace(" ", ""):
        if [a for a, _ in tokens] == list(LEVELS[: len(tokens)]):
            return tuple(int(n) for _, n in tokens)
    elif re.fullmatch(r"\d+([.,\s]+\d+)*", text):
        return tuple(int(n) for n in re.findall(r"\d+", text))
    fix = "write 12.7 or '<a_12><b_7>'"
    raise ConfigError(f"{text!r} is no prefix of a semantic ID", where="prefix", fix=fix)
