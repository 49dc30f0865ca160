"""A batch of users as the searches over the trie take it: tables of log-probabilities, seen rows, threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qbrec.ranking.code_index import CodeIndex
from qbrec.ranking.scorer import check_fit
from qbrec.ranking.topk import not_a_number
from qbrec.storage.ragged import Ragged

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]

LANES = 8  # users of one pass


@dataclass(frozen=True)
class Tables:
    """Log-probabilities of a batch as the searches need them.

    Attributes:
        log_probs: float32 [B, D, K], contiguous; constant levels in front are 0.
        best: Largest of the codes that occur, float32 [B, D].
        index: What is searched.
    """

    log_probs: Floats
    best: Floats
    index: CodeIndex

    @classmethod
    def of(cls, log_probs: torch.Tensor, index: CodeIndex) -> Tables:
        """From log-probabilities [B, L, Kmax] of a model.

        Raises:
            DataError: The index holds a code the model has no output for, or one of its codes has NaN or
                +inf.
        """
        batch, levels, codes = log_probs.shape
        check_fit(levels, codes, id_levels=index.levels, widest=index.widest)
        found: Floats = log_probs.detach().float().cpu().contiguous().numpy()
        if index.depth > levels:
            padded = np.zeros((batch, index.depth, codes), np.float32)
            padded[:, index.depth - levels :] = found
            found = padded
        best = extreme(found, index, np.max)
        if np.isnan(best).any() or (best == np.inf).any():
            raise not_a_number()
        return cls(found, best, index)

    def scores(self, users: Ints, rows: Ints) -> Floats:
        """Scores of given pairs of user and item row, float32 [n], in the one order of additions."""
        out = np.zeros(len(users), np.float32)
        first = self.index.depth - self.index.levels
        for level in range(self.index.levels):
            out += self.log_probs[users, first + level, self.index.semantic_ids[rows, level].astype(np.int64)]
        return out


def extreme(log_probs: Floats, index: CodeIndex, choose: Any) -> Floats:
    """Largest (`np.max`) or smallest (`np.min`) value of the codes that occur, float32 [B, D]."""
    out = np.zeros((len(log_probs), index.depth), np.float32)
    first = index.depth - index.levels
    for level, used in enumerate(index.used):
        part = log_probs[:, first + level]
        if len(used):
            dense = used[-1] + 1 == len(used)
            found = (
                part[:, : len(used)] if dense else part.take(used, axis=1, mode="clip")
            )  # clip: unbuffered
            out[:, first + level] = choose(found, axis=1)
    return out


def sorted_rows(ragged: Ragged | None, batch: int) -> tuple[Ints, Ints]:
    """Values of every row ascending, and where each row begins; nothing for None."""
    if ragged is None:
        return np.empty(0, np.int64), np.zeros(batch + 1, np.int64)
    assert len(ragged) == batch
    values = ragged.values.astype(np.int64)
    return values[np.lexsort((values, ragged.row_ids))], ragged.offsets


def in_lanes(tables: Floats, users: Ints) -> Floats:
    """Tables of up to eight users side by side, flat; lanes without a user are 0."""
    out = np.zeros((*tables.shape[1:], LANES), np.float32)
    out[..., : len(users)] = tables[users].transpose(*range(1, tables.ndim), 0)
    return out.reshape(-1)


def user_chunks(count: int, size: int) -> list[tuple[int, int]]:
    """Consecutive stretches of at most `size` users, covering all."""
    return list(pairwise([*range(0, count, size), count]))


def spread(chunks: list[tuple[int, int]], body: Callable[[int, int], None]) -> None:
    """Call `body(begin, end)` for every stretch, on as many threads as torch has."""
    workers = min(len(chunks), torch.get_num_threads())
    if workers <= 1:
        for begin, end in chunks:
            body(begin, end)
        return
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda chunk: body(*chunk), chunks))
