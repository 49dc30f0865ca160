"""Exact top-k and exact rank of a target over the whole catalogue; ties by popularity, then by row."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qbrec.errors import ConfigError, DataError
from qbrec.storage.ragged import Ragged

LOWEST = torch.finfo(torch.float32).min


def tie_rank(train_counts: NDArray[Any]) -> NDArray[np.int64]:
    """Place of every item in the order that breaks ties: more popular first, then lower row.

    Args:
        train_counts: Interactions of each item in the training part, [N].

    Returns:
        int64 [N], a permutation of 0…N-1 (0: the most popular item).
    """
    order = np.argsort(-np.asarray(train_counts, np.int64), kind="stable")
    ranks = np.empty(len(order), np.int64)
    ranks[order] = np.arange(len(order))
    return ranks


@torch.no_grad()
def top_k(
    scores: torch.Tensor,
    k: int,
    *,
    tie_rank: NDArray[np.int64] | torch.Tensor,
    exclude: Ragged | None = None,
    allowed: NDArray[np.bool_] | torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best items of every row, exactly.

    Args:
        scores: float [B, N], higher is better; -inf is a score like any other.
        k: How many.
        tie_rank: Order of equal scores, [N], from `tie_rank`.
        exclude: Items taken out per row (the seen ones), `B` ragged rows.
        allowed: Items that may be returned at all, bool [N].

    Returns:
        rows int64 [B, k] and scores float32 [B, k], best first. Where fewer than k items are left, the
        rest is row -1 with score -inf.

    Raises:
        ConfigError: k is below 1 or above the catalogue.
        DataError: A score is NaN.
    """
    check_k(k, num_items=scores.shape[1])
    ties = torch.as_tensor(tie_rank, device=scores.device)
    # Real scores stay above -inf, so that -inf alone means "taken out".
    work = scores.float().clamp_min(LOWEST)
    if allowed is not None:
        work.masked_fill_(~torch.as_tensor(allowed, device=work.device), -torch.inf)
    if exclude is not None and len(exclude.values):
        rows, items = _pairs(exclude, work.device)
        work[rows, items] = -torch.inf
    best, index = work.topk(k, dim=1)
    if torch.isnan(best[:, 0]).any():  # topk puts NaN first
        raise not_a_number()
    last = best[:, -1:]
    cut_tie = torch.nonzero((work >= last).sum(1) > k).flatten()
    if len(cut_tie):
        _settle(work, ties, best, index, cut_tie)
    order = ties[index].argsort(dim=1)
    best, index = best.gather(1, order), index.gather(1, order)
    order = best.argsort(dim=1, descending=True, stable=True)
    best, index = best.gather(1, order), index.gather(1, order)
    gone = best == -torch.inf
    original = scores.float().gather(1, index)
    return index.masked_fill(gone, -1), original.masked_fill(gone, -torch.inf)


def _settle(
    work: torch.Tensor, ties: torch.Tensor, best: torch.Tensor, index: torch.Tensor, cut_tie: torch.Tensor
) -> None:
    # topk takes any of the items that tie at the k-th score: replace them by the first in the order of ties.
    k = best.shape[1]
    for chunk in cut_tie.split(max(1, (1 << 24) // work.shape[1])):
        last = best[chunk, -1:]
        place = torch.where(work[chunk] == last, ties, len(ties))
        first = place.topk(k, dim=1, largest=False, sorted=True).indices
        above = (best[chunk] > last).sum(1, keepdim=True)
        column = torch.arange(k, device=work.device)
        index[chunk] = torch.where(
            column < above, index[chunk], first.gather(1, (column - above).clamp_min(0))
        )


@torch.no_grad()
def target_ranks(
    scores: torch.Tensor,
    target: NDArray[np.int64],
    *,
    tie_rank: NDArray[np.int64] | torch.Tensor,
    exclude: Ragged | None = None,
    allowed: NDArray[np.bool_] | None = None,
) -> NDArray[np.int64]:
    """Rank of each row's target among all items, 1 for the best.

    Args:
        scores: float [B, N], higher is better.
        target: Item row sought, [B].
        tie_rank: Order of equal scores, [N].
        exclude: Items that do not compete (the seen ones). A target among them is never found: rank N + 1.
        allowed: Items that compete at all, bool [N]; a target outside is never found either.

    Returns:
        int64 [B].

    Raises:
        DataError: A score is NaN (a comparison with it would count as a win for the target).
    """
    kept, removed = ranks_both(scores, target, tie_rank=tie_rank, seen=exclude, allowed=allowed)
    return kept if exclude is None else removed


@torch.no_grad()
def ranks_both(
    scores: torch.Tensor,
    target: NDArray[np.int64],
    *,
    tie_rank: NDArray[np.int64] | torch.Tensor,
    seen: Ragged | None,
    allowed: NDArray[np.bool_] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ranks with seen items kept and with seen items removed, in one pass over the scores.

    The second follows from the first by subtracting the seen items that beat the target: nothing is copied.

    Returns:
        (kept int64 [B], removed int64 [B]); arguments and errors as in `target_ranks`.
    """
    batch, num_items = scores.shape
    goal = torch.as_tensor(np.asarray(target, np.int64), device=scores.device)
    ties = torch.as_tensor(tie_rank, device=scores.device)
    mask = None if allowed is None else torch.as_tensor(allowed, device=scores.device)
    mine = scores.gather(1, goal[:, None])
    count = _count_numpy if scores.device.type == "cpu" else _count_torch
    above, level = count(scores, mine, mask)
    lost = np.zeros(batch, bool) if allowed is None else ~np.asarray(allowed)[target]
    for row in np.flatnonzero((level > 1) | (lost & (level > 0))):
        same = scores[row] == mine[row]
        same &= ties < ties[goal[row]]
        if mask is not None:
            same &= mask
        above[row] += int(same.sum())
    kept = above + 1
    removed = kept.copy()
    if seen is not None and len(seen.values):
        rows, items = _pairs(seen, scores.device)
        rival, own = scores[rows, items], mine[rows, 0]
        beats = (rival > own) | ((rival == own) & (ties[items] < ties[goal[rows]]))
        if mask is not None:
            beats &= mask[items]
        removed -= np.bincount(rows[beats].cpu().numpy(), minlength=batch)
        removed[rows[items == goal[rows]].cpu().numpy()] = num_items + 1
    kept[lost] = num_items + 1
    removed[lost] = num_items + 1
    return kept, removed


def _count_numpy(
    scores: torch.Tensor, mine: torch.Tensor, mask: torch.Tensor | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    # numpy counts true bytes with SIMD, row by row in the cache: some thirty times faster than torch's sum.
    table, own = scores.numpy(), mine.numpy()[:, 0]
    competes = None if mask is None else mask.numpy()
    above, level = np.empty((2, len(table)), np.int64)
    for i, row in enumerate(table):
        greater, least = row > own[i], row >= own[i]
        if np.count_nonzero(least) + np.count_nonzero(row < own[i]) != len(row):
            raise not_a_number()
        if competes is not None:
            greater &= competes
            least &= competes
        above[i] = np.count_nonzero(greater)
        level[i] = np.count_nonzero(least) - above[i]
    return above, level


def _count_torch(
    scores: torch.Tensor, mine: torch.Tensor, mask: torch.Tensor | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    if torch.isnan(scores).any():
        raise not_a_number()
    greater, equal = scores > mine, scores == mine
    if mask is not None:
        greater &= mask
        equal &= mask
    return greater.sum(1).cpu().numpy(), equal.sum(1).cpu().numpy()


def _pairs(ragged: Ragged, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct (batch row, item) pairs: an item seen twice must be taken out once."""
    rows, items = ragged.row_ids, ragged.values.astype(np.int64)
    order = np.lexsort((items, rows))
    rows, items = rows[order], items[order]
    fresh = np.ones(len(rows), bool)
    fresh[1:] = (rows[1:] != rows[:-1]) | (items[1:] != items[:-1])
    return torch.from_numpy(rows[fresh]).to(device), torch.from_numpy(items[fresh]).to(device)


def check_k(k: int, *, num_items: int) -> None:
    """Refuse a `k` below 1 or above the catalogue with a ConfigError."""
    if not 1 <= k <= num_items:
        raise ConfigError(
            f"k is {k}, but the catalogue has {num_items} items",
            where="--k",
            fix=f"choose k from 1 to {num_items}",
        )


def not_a_number() -> DataError:
    """What to raise where a model's score is NaN."""
    return DataError(
        "the model scores some items as NaN, so they cannot be ranked",
        where="ranking",
        fix="train again from the last good checkpoint, with a lower learning rate or float32",
    )
