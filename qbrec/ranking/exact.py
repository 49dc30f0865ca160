"""Exact top-k of the factorised score without dense scores: rows and bits of `top_k` on those.

On the CPU and with numba, branch and bound over the sorted IDs (`kernels.best_first`); users for whom too
much of the catalogue is left after a first look are scored exhaustively, eight at once (`kernels.together`).
Elsewhere dense scores, a few users at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from qbrec.ranking.code_index import CodeIndex
from qbrec.ranking.kernels import native_kernels
from qbrec.ranking.rescore import PairBonus, checked_bonus, rescored
from qbrec.ranking.tables import Floats, Ints, Tables, in_lanes, sorted_rows, spread, user_chunks
from qbrec.ranking.topk import check_k, top_k
from qbrec.ranking.validate import batch_rows
from qbrec.storage.ragged import Ragged

if TYPE_CHECKING:
    import scipy.sparse as sp

FIRST_LOOK = 32  # prefixes per level that the first look follows
# Share left after the first look from which several users are scored together. Kernel and numpy must compare
# it at one precision: a share that is exactly as large would be put off by one and left there by the other.
EXHAUSTIVE = float(np.float32(0.1))
WORTH_TOGETHER = 3  # users of that kind from which it pays to score eight at once
SMALL = 250_000  # distinct IDs up to which several users need no first look
SMALL_ALONE = 2_000  # and one user
FLAT_ALONE = 0.5  # share left from which one user of a small catalogue is scored exhaustively
TINY = 20_000  # distinct IDs up to which asking whether a prefix can matter costs more than it spares
NEVER = 2.0  # no share is so large
USERS_PER_TASK = 16


def exact_top_k(
    log_probs: torch.Tensor,
    k: int,
    *,
    index: CodeIndex,
    exclude: Ragged | None = None,
    allowed: NDArray[np.bool_] | None = None,
    bonus: sp.csr_matrix | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best items of every user by Σ_l log p_l(c_l), plus a bonus where there is one.

    The result equals that of `top_k` on dense scores, rows and bits, for the items in the index.

    Args:
        log_probs: float [B, L, Kmax].
        k: How many.
        index: The catalogue, or what a filter leaves of it.
        exclude: Items taken out per user (the seen ones), B ragged rows.
        allowed: A filter asked for once, bool [N]; one that is asked often is better made with `index.only`.
        bonus: Added to the scores of explicit candidates, not negative, CSR [B, <= N]. An item without one
            that is among the best k is so without any: the best k by ID and the candidates suffice.

    Returns:
        rows int64 [B, k] and scores float32 [B, k] on the device of `log_probs`, best first. Where fewer than
        k items are left, the rest is row -1 with score -inf.

    Raises:
        ConfigError: k is below 1 or above the catalogue.
        DataError: A score is NaN, a bonus is negative, or the IDs are not the model's.
    """
    check_k(k, num_items=index.num_items)
    if allowed is not None:
        index = index.only(np.asarray(allowed))
    if native_kernels(index.num_items) is None or log_probs.device.type != "cpu":
        rows, scores = _dense(log_probs, k, index=index, exclude=exclude)
    else:
        rows, scores = _searched(Tables.of(log_probs, index), k, exclude=exclude)
    if bonus is None:
        return rows, scores
    best, values = _with_bonus(
        Tables.of(log_probs, index), rows.cpu().numpy(), exclude=exclude, bonus=checked_bonus(bonus)
    )
    device = log_probs.device
    return torch.from_numpy(best).to(device), torch.from_numpy(values).to(device)


def _dense(
    log_probs: torch.Tensor, k: int, *, index: CodeIndex, exclude: Ragged | None
) -> tuple[torch.Tensor, torch.Tensor]:
    found = []
    size = batch_rows(len(log_probs), index.num_items)
    for begin, end in user_chunks(len(log_probs), size) or [(0, 0)]:
        scores = index.dense.scores_of(log_probs[begin:end])
        seen = None if exclude is None else exclude.slice(begin, end)
        found.append(top_k(scores, k, tie_rank=index.trie.ties, exclude=seen, allowed=index.allowed))
    rows, values = zip(*found, strict=True)
    return torch.cat(rows), torch.cat(values)


def _searched(tables: Tables, k: int, *, exclude: Ragged | None) -> tuple[torch.Tensor, torch.Tensor]:
    batch = len(tables.best)
    kept = min(k, tables.index.num_ranked)
    rows, scores = _search(tables, kept, *sorted_rows(exclude, batch))
    if kept < k:
        pad = ((0, 0), (0, k - kept))
        rows = np.pad(rows, pad, constant_values=-1)
        scores = np.pad(scores, pad, constant_values=-np.inf)
    return torch.from_numpy(rows), torch.from_numpy(scores)


def _search(tables: Tables, k: int, seen: Ints, seen_at: Ints) -> tuple[Ints, Floats]:
    batch, trie = len(tables.best), tables.index.trie
    kernels = native_kernels(tables.index.num_items)
    assert kernels is not None
    rows, scores = np.empty((batch, k), np.int64), np.empty((batch, k), np.float32)
    if not k:
        return rows, scores
    floors, shares = np.empty(batch, np.float32), np.empty(batch, np.float32)

    def one_by_one(users: slice, limit: float) -> None:
        kernels.best_first(
            trie, tables.log_probs[users], tables.best[users], seen, seen_at[users.start : users.stop + 1],
            FIRST_LOOK, limit, scores[users], rows[users], floors[users], shares[users],
        )  # fmt: skip

    leaves, several = len(trie.tail), batch >= WORTH_TOGETHER
    small = leaves <= (SMALL if several else SMALL_ALONE)
    limit = EXHAUSTIVE if several else FLAT_ALONE if leaves <= SMALL else NEVER
    if small:
        floors[:], late = -np.inf, np.arange(batch)
    else:
        spread(user_chunks(batch, USERS_PER_TASK), lambda begin, end: one_by_one(slice(begin, end), limit))
        late = np.flatnonzero(shares > limit)
        late = late[np.argsort(shares[late], kind="stable")]  # users of like needs share a pass

    def together(begin: int, end: int) -> None:
        users = late[begin:end]
        if len(users) < WORTH_TOGETHER and leaves > SMALL:
            for user in users:
                one_by_one(slice(int(user), int(user) + 1), NEVER)
            return
        table = in_lanes(tables.log_probs, users)
        if leaves <= TINY:
            # Not inf: together with a code that cannot be, -inf, it would be no number at all.
            best = np.full(kernels.WIDTH * tables.index.depth, np.finfo(np.float32).max, np.float32)
        else:
            best = in_lanes(tables.best, users)
        bars = np.full(kernels.WIDTH, np.inf, np.float32)
        bars[: len(users)] = floors[users]
        spans = np.zeros((2, kernels.WIDTH), np.int64)
        spans[0, : len(users)], spans[1, : len(users)] = seen_at[users], seen_at[users + 1]
        best_scores = np.empty((kernels.WIDTH, k), np.float32)
        best_rows = np.empty((kernels.WIDTH, k), np.int64)
        kernels.top_together(
            trie, table, table.size // tables.index.depth, best, bars, seen, spans, best_scores, best_rows
        )  # fmt: skip
        scores[users], rows[users] = best_scores[: len(users)], best_rows[: len(users)]

    spread(user_chunks(len(late), kernels.WIDTH), together)
    return rows, scores


def _with_bonus(
    tables: Tables, best: Ints, *, exclude: Ragged | None, bonus: sp.csr_matrix
) -> tuple[Ints, Floats]:
    """Top-k among the best by ID alone and the candidates of the bonus."""
    pairs = PairBonus(bonus, tables.index.num_items)
    there = best >= 0
    scores = np.full(best.shape, -np.inf, np.float32)
    scores[there] = tables.scores(np.nonzero(there)[0], best[there])
    candidates = (pairs.users, pairs.rows, tables.scores(pairs.users, pairs.rows))
    return rescored(candidates, best, scores, index=tables.index, exclude=exclude, bonus=pairs)
