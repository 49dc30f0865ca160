"""What can be ranked: the protocols, and the exact factorised score of items by their semantic IDs."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from qbrec.errors import DataError
from qbrec.storage.ragged import Ragged

Domain = NDArray[Any] | int

# Below this batch the item-contiguous gather wins: a bag over rows of one or two floats is all overhead.
SMALL_BATCH = 4


class Scorer(Protocol):
    """Scores every item of the catalogue for every history."""

    @property
    def name(self) -> str:
        """Short name for tables and files (`qbrec`, `itemknn`)."""
        ...

    def scores(self, histories: Ragged, domain: Domain) -> torch.Tensor:
        """Higher is better; no NaN.

        Args:
            histories: `B` rows of item rows, most recent last.
            domain: Domain code of every history, [B] or one for all.

        Returns:
            float32 [B, N].
        """
        ...


class CodeScorer(Protocol):
    """Predicts the next item's code at every level in one forward."""

    @property
    def name(self) -> str:
        """Short name for tables and files."""
        ...

    def code_log_probs(self, histories: Ragged, domain: Domain) -> torch.Tensor:
        """Log-probabilities of the codes of the next item, level by level.

        Returns:
            float32 [B, L, Kmax]; entries above a level's own K are never read.
        """
        ...


class PrefixScorer(Protocol):
    """Predicts the next code of items whose first codes are known."""

    @property
    def name(self) -> str:
        """Short name for tables and files."""
        ...

    def next_code_log_probs(
        self, histories: Ragged, domain: Domain, prefixes: NDArray[np.int64]
    ) -> torch.Tensor:
        """Log-probabilities of the code after each prefix of the next item.

        Args:
            histories: B rows of item rows, most recent last.
            domain: Domain code of every history, [B] or one for all.
            prefixes: First l < L codes of `P` possible next items of each history, int64 [B, P, l].

        Returns:
            float32 [B, P, K_l].
        """
        ...


class CodeTable:
    """Dense factorised scores: every item's codes looked up and added, from the first level to the last.

    Items that share a semantic ID get the very same float, whatever the batch, so that ties are real ties.

    Args:
        semantic_ids: Codes of all items, any integer type [N, L].
        chunk_items: Items scored at once; bounds the temporary to `B × chunk_items` floats.
    """

    def __init__(self, semantic_ids: NDArray[Any], *, chunk_items: int = 65_536) -> None:
        assert semantic_ids.ndim == 2
        assert chunk_items >= 1
        self.semantic_ids, self.chunk_items = semantic_ids, chunk_items
        self.num_items, self.levels = semantic_ids.shape
        # int32 [N, L], codes shifted into one table of L × Kmax rows; made for the first model that asks
        self._flat: torch.Tensor | None = None
        self._stride = 0

    @cached_property
    def _codes(self) -> NDArray[np.int32]:
        return np.ascontiguousarray(self.semantic_ids.T.astype(np.int32))  # [L, N]

    @cached_property
    def _largest(self) -> int:
        return int(self.semantic_ids.max(initial=0))

    @torch.no_grad()
    def scores_of(self, log_probs: torch.Tensor) -> torch.Tensor:
        """Scores float32 [B, N] from log-probabilities [B, L, Kmax], on their device.

        Raises:
            DataError: The semantic IDs hold a code the model has no output for (they are another model's).
        """
        batch, levels, codes = log_probs.shape
        check_fit(levels, codes, id_levels=self.levels, widest=self._largest + 1)
        if batch <= SMALL_BATCH and log_probs.device.type == "cpu":
            return self._gather(log_probs.float())
        return self._bags(log_probs.float())

    def _bags(self, log_probs: torch.Tensor) -> torch.Tensor:
        # Each item is a bag of L rows of the table [L * Kmax, B]: one fused gather-and-add over contiguous
        # rows of B floats, no [B, N, L] temporary. The levels are always added in the same order.
        batch, levels, codes = log_probs.shape
        table = log_probs.reshape(batch, levels * codes).t().contiguous()
        flat = self._indices(codes, log_probs.device)
        out = torch.empty(batch, self.num_items, device=log_probs.device)
        for begin in range(0, self.num_items, self.chunk_items):
            chunk = flat[begin : begin + self.chunk_items]
            out[:, begin : begin + len(chunk)] = F.embedding_bag(chunk, table, mode="sum").t()
        return out

    def _gather(self, log_probs: torch.Tensor) -> torch.Tensor:
        batch = len(log_probs)
        out = torch.empty(batch, self.num_items)
        for begin in range(0, self.num_items, self.chunk_items):
            end = min(begin + self.chunk_items, self.num_items)
            for row in range(batch):
                total = torch.zeros(end - begin)
                for level in range(self.levels):
                    codes = torch.from_numpy(self._codes[level, begin:end])
                    total += log_probs[row, level].index_select(0, codes)
                out[row, begin:end] = total
        return out

    def _indices(self, codes: int, device: torch.device) -> torch.Tensor:
        if self._flat is None or self._flat.device != device or self._stride != codes:
            assert self.levels * codes < 2**31
            shift = np.arange(self.levels, dtype=np.int32)[:, None] * np.int32(codes)
            flat = np.ascontiguousarray((self._codes + shift).T)
            self._flat, self._stride = torch.from_numpy(flat).to(device), codes
        return self._flat


class FactorisedScorer:
    """`score(i) = Σ_l log p_l(c_{i,l})`: one forward over history and L masks, then a look-up per level.

    Args:
        code_scorer: The model.
        semantic_ids: Codes of all items, any integer type [N, L].
        chunk_items: Items scored at once; bounds the temporary to `B × chunk_items` floats.
    """

    def __init__(
        self, code_scorer: CodeScorer, *, semantic_ids: NDArray[Any], chunk_items: int = 65_536
    ) -> None:
        self.code_scorer = code_scorer
        self.table = CodeTable(semantic_ids, chunk_items=chunk_items)

    @property
    def name(self) -> str:
        """The name of the model behind it."""
        return self.code_scorer.name

    def scores(self, histories: Ragged, domain: Domain) -> torch.Tensor:
        """Scores of the whole catalogue, float32 [B, N] on the model's device.

        Raises:
            DataError: The semantic IDs hold a code the model has no output for (they are another model's).
        """
        return self.table.scores_of(self.code_scorer.code_log_probs(histories, domain))


def check_fit(levels: int, codes: int, *, id_levels: int, widest: int) -> None:
    """Refuse semantic IDs that a model of `levels` levels × `codes` codes did not learn.

    Raises:
        DataError: They have `id_levels` levels, or codes up to `widest` - 1 that the model has no output for.
    """
    if levels != id_levels or codes < widest:
        raise DataError(
            f"semantic IDs of {id_levels} levels with codes up to {widest - 1} do not fit a model "
            f"of {levels} levels x {codes} codes",
            where="factorised scorer",
            fix="score with the quantizer artifact the model was trained on",
        )
