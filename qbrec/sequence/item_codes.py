"""A level below the semantic ID: what the encoder may learn of single items, beyond what their IDs say.

Items with enough interactions have a code of their own there; all others, and items that are appended later,
share one. An ID generalises, an item's own code remembers. It is a level like any other: masks,
losses, exact search and beams need to know nothing of it. (Ours, beyond the paper.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qbrec.storage.artifact import Artifact, ArtifactWriter

ITEM_CODES = "item_codes.npy"


@dataclass(frozen=True)
class ItemCodes:
    """Who has a code of its own.

    Attributes:
        rows: Item rows, ascending, int64 [M]: the i-th of them has code i, every other item code M.
    """

    rows: NDArray[np.int64]

    @classmethod
    def choose(cls, interactions: NDArray[np.int64], *, largest: int, least: int) -> ItemCodes | None:
        """The items that have enough interactions to learn from.

        Args:
            interactions: Of each item in the training part, [N].
            largest: Items of the largest catalogue in which anybody has a code.
            least: Interactions that an item must have.

        Returns:
            None where nobody is chosen.
        """
        rows = np.flatnonzero(interactions >= least)
        return cls(rows) if len(rows) and len(interactions) <= largest else None

    @property
    def size(self) -> int:
        """Codes of the level, the shared one included."""
        return len(self.rows) + 1

    def beside(self, codes: NDArray[Any]) -> NDArray[np.unsignedinteger[Any]]:
        """Codes of all items and, last, their item codes; the smallest unsigned type [N, L + 1].

        Args:
            codes: Unsigned [N, L]; rows beyond the catalogue of the training are items appended since.
        """
        kind = np.promote_types(codes.dtype, np.min_scalar_type(len(self.rows)))
        found = np.full((len(codes), codes.shape[1] + 1), len(self.rows), kind)
        found[:, :-1] = codes
        found[self.rows, -1] = np.arange(len(self.rows))
        return found

    def save(self, writer: ArtifactWriter) -> None:
        """Write `ITEM_CODES`, int64 [M]."""
        writer.save_npy(ITEM_CODES, self.rows)

    @classmethod
    def load(cls, artifact: Artifact) -> ItemCodes | None:
        """Of a `pretrain` or `finetune` artifact; None where its encoder knows no such level.

        Raises:
            DataError: The file is damaged.
        """
        return cls(np.asarray(artifact.load_npy(ITEM_CODES))) if artifact.has(ITEM_CODES) else None


def codes_read(artifact: Artifact, codes: NDArray[Any]) -> NDArray[Any]:
    """What the encoder of an artifact reads of every item, [N, L] or [N, L + 1].

    Args:
        artifact: Of kind `pretrain` or `finetune`, or its part of a bundle.
        codes: Of all items, [N, L], as `storage.token_table` gives them.

    Raises:
        DataError: A file is damaged.
    """
    own = ItemCodes.load(artifact)
    return codes if own is None else own.beside(codes)
