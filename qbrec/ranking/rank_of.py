"""Exact rank of each user's target among all items, without dense scores: `ranks_both`, number for number.

Eight users share a walk over the sorted IDs. A prefix below all their targets' scores is skipped, one above
them is counted whole, the rest is scored and compared in one go (`kernels.together.count_together`). Seen
items and those with a bonus are few, so they are put right afterwards, pair by pair.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from qbrec.ranking.code_index import CodeIndex
from qbrec.ranking.kernels import native_kernels
from qbrec.ranking.rescore import PairBonus, add_bonus, checked_bonus, competes
from qbrec.ranking.tables import Floats, Ints, Tables, extreme, in_lanes, spread, user_chunks
from qbrec.ranking.topk import ranks_both
from qbrec.ranking.validate import batch_rows
from qbrec.storage.ragged import Ragged

if TYPE_CHECKING:
    import scipy.sparse as sp


def exact_ranks(
    log_probs: torch.Tensor,
    target: Ints,
    *,
    index: CodeIndex,
    seen: Ragged | None,
    bonus: sp.csr_matrix | None = None,
) -> tuple[Ints, Ints]:
    """Ranks with seen items kept and with seen items removed.

    Args:
        log_probs: float [B, L, Kmax].
        target: Item row sought, int64 [B].
        index: The candidates: the catalogue, or what `index.only` leaves of it.
        seen: Items that the second rank does without, B ragged rows. A target among them is never found.
        bonus: Added to the scores of explicit candidates, not negative, CSR [B, <= N].

    Returns:
        (kept int64 [B], removed int64 [B]), 1 for the best; N + 1 where the target is not found, because it
        is seen or not in the index.

    Raises:
        DataError: A score is NaN, a bonus is negative, or the IDs are not the model's.
    """
    target = np.asarray(target, np.int64)
    bonus = None if bonus is None else checked_bonus(bonus)
    if native_kernels(index.num_items) is None or log_probs.device.type != "cpu":
        return _dense(log_probs, target, index=index, seen=seen, bonus=bonus)
    tables = Tables.of(log_probs, index)
    goals, ties = tables.scores(np.arange(len(target)), target), index.trie.ties
    extra = PairBonus(bonus, index.num_items)
    goals += extra.of(np.arange(len(target)), target)
    kept = 1 + _count(tables, goals, ties[target])
    if bonus is not None:
        inside = competes(extra.users, rows=extra.rows, index=index, exclude=None)
        users, rows = extra.users[inside], extra.rows[inside]
        plain = tables.scores(users, rows)
        kept += _beaten_by(plain + extra.of(users, rows), users, rows, goals, target, ties)
        kept -= _beaten_by(plain, users, rows, goals, target, ties)
    removed = kept.copy()
    if seen is not None and len(seen.values):
        keys = np.unique(seen.row_ids * index.num_items + seen.values.astype(np.int64))
        users, rows = np.divmod(keys, index.num_items)
        removed[users[rows == target[users]]] = index.num_items + 1
        inside = competes(users, rows=rows, index=index, exclude=None)
        users, rows = users[inside], rows[inside]
        found = removed <= index.num_items
        beats = _beaten_by(
            tables.scores(users, rows) + extra.of(users, rows), users, rows, goals, target, ties
        )
        removed[found] -= beats[found]
    if index.allowed is not None:
        lost = ~index.allowed[target]
        kept[lost] = removed[lost] = index.num_items + 1
    return kept, removed


def _beaten_by(scores: Floats, users: Ints, rows: Ints, goals: Floats, target: Ints, ties: Ints) -> Ints:
    """How many of the given pairs beat each user's target, int64 [B]."""
    own = goals[users]
    beats = (scores > own) | ((scores == own) & (ties[rows] < ties[target[users]]))
    return np.bincount(users[beats], minlength=len(goals))


def _count(tables: Tables, goals: Floats, goal_ties: Ints) -> Ints:
    """How many items beat each target, none of them with a bonus, int64 [B]."""
    index = tables.index
    kernels = native_kernels(index.num_items)
    assert kernels is not None
    above = np.zeros(len(goals), np.int64)
    if not index.num_ranked:
        return above
    least = extreme(tables.log_probs, index, np.min)
    # The further a target lies below the best score there could be, the more is left to look at: users of
    # like needs share a walk.
    with np.errstate(invalid="ignore"):  # -inf - -inf: wherever that user goes
        order = np.argsort(tables.best.sum(1) - goals, kind="stable")

    def together(begin: int, end: int) -> None:
        users = order[begin:end]
        table = in_lanes(tables.log_probs, users)
        mine, places = np.full(kernels.WIDTH, np.inf, np.float32), np.zeros(kernels.WIDTH, np.int64)
        mine[: len(users)], places[: len(users)] = goals[users], goal_ties[users]
        found = np.zeros(kernels.WIDTH, np.int64)
        kernels.count_together(
            index.trie, table, table.size // index.depth,
            in_lanes(tables.best, users), in_lanes(least, users), mine, places, found,
        )  # fmt: skip
        above[users] = found[: len(users)]

    spread(user_chunks(len(order), kernels.WIDTH), together)
    return above


def _dense(
    log_probs: torch.Tensor,
    target: Ints,
    *,
    index: CodeIndex,
    seen: Ragged | None,
    bonus: sp.csr_matrix | None,
) -> tuple[Ints, Ints]:
    kept, removed = np.empty((2, len(target)), np.int64)
    for begin, end in user_chunks(len(target), batch_rows(len(target), index.num_items)):
        scores = index.dense.scores_of(log_probs[begin:end])
        if bonus is not None:
            add_bonus(scores, bonus[begin:end])
        kept[begin:end], removed[begin:end] = ranks_both(
            scores,
            target[begin:end],
            tie_rank=index.trie.ties,
            seen=None if seen is None else seen.slice(begin, end),
            allowed=index.allowed,
        )
    return kept, removed
