"""Metrics on the validation targets, for early stopping with the very scorer that will serve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from qbrec.engine.context import StageContext
from qbrec.ranking.metrics import METRICS, metrics_of_ranks
from qbrec.ranking.scorer import Scorer
from qbrec.ranking.topk import target_ranks, tie_rank
from qbrec.storage.catalog_view import CatalogView, Histories
from qbrec.storage.ragged import Ragged

# Scores of one batch stay below this many floats, whatever the catalogue and the batch size asked for.
MAX_SCORES = 1 << 27


class HistoriesLike(Protocol):
    """The part of `storage.catalog_view.Histories` that ranking needs."""

    @property
    def rows(self) -> Ragged:
        """Item rows of every user, oldest first."""
        ...

    @property
    def cut(self) -> NDArray[Any]:
        """Start of validation and of test inside each history, [U, 2]."""
        ...

    @property
    def domain(self) -> NDArray[Any]:
        """Domain code of every user's history, [U]."""
        ...


def batch_rows(batch_users: int, num_items: int) -> int:
    """Users scored at once, so that their dense scores fit a fixed budget of memory."""
    return max(1, min(batch_users, MAX_SCORES // max(num_items, 1)))


def validation_users(cut: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """Users with a validation target and something before it, ascending; `cut` is that of their histories."""
    return np.flatnonzero((cut[:, 0] >= 1) & (cut[:, 0] < cut[:, 1])).astype(np.int64)


def test_users(histories: HistoriesLike) -> NDArray[np.int64]:
    """Users with a test target and something before it, ascending."""
    start = np.asarray(histories.cut)[:, 1]
    return np.flatnonzero((start >= 1) & (start < histories.rows.lengths)).astype(np.int64)


def contexts_and_targets(
    histories: HistoriesLike, users: NDArray[np.int64], *, part: int
) -> tuple[Ragged, NDArray[np.int64]]:
    """What is known and what is sought: `rows[:cut]` and `rows[cut]` of each user.

    Args:
        histories: All histories.
        users: Indices into them, [B].
        part: 0 for validation, 1 for test.

    Returns:
        contexts (B ragged rows) and target item rows int64 [B].
    """
    start = np.asarray(histories.cut)[users, part].astype(np.int64)
    rows = histories.rows
    return rows.take(users).prefix(start), rows.values[rows.offsets[users] + start].astype(np.int64)


def dealt_back(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rows that were dealt to the ranks one by one (rank r has r, r + world and so on), in their own order.

    Args:
        parts: Of each rank, [n_r, …].

    Returns:
        [Σ n_r, …] on the CPU.
    """
    whole = torch.empty(sum(map(len, parts)), *parts[0].shape[1:], dtype=parts[0].dtype)
    for rank, part in enumerate(parts):
        whole[rank :: len(parts)] = part.cpu()
    return whole


def drawn(users: NDArray[np.int64], *, max_users: int, seed: int) -> NDArray[np.int64]:
    """`max_users` (0: all) of the users, drawn at random where there are more; ascending."""
    if 0 < max_users < len(users):
        return np.sort(np.random.default_rng(seed).choice(users, max_users, replace=False))
    return users


def drawn_users(histories: HistoriesLike, *, max_users: int, seed: int) -> NDArray[np.int64]:
    """Users with a validation target, or `max_users` (0: all) of them drawn at random; ascending."""
    return drawn(validation_users(histories.cut), max_users=max_users, seed=seed)


def drawn_histories(catalog: CatalogView, domain: str, *, max_users: int, seed: int) -> Histories:
    """Histories of `drawn_users` of a domain, in their order: each has a validation target.

    Of all others no more is read than where their parts begin: ranks that validate while they train need not
    hold every history.

    Raises:
        DataError: There is no such domain, or a file of the catalogue is damaged.
    """
    stored, cut = catalog.load_cuts(domain)
    return catalog.histories_of(stored[drawn(validation_users(cut), max_users=max_users, seed=seed)])


def validation_metrics(
    scorer: Scorer,
    histories: HistoriesLike,
    *,
    tie_rank: NDArray[np.int64],
    allowed: NDArray[np.bool_] | None = None,
    max_users: int = 0,
    seed: int = 0,
    batch_users: int = 256,
    rank: int = 0,
    world: int = 1,
    all_reduce: Callable[[torch.Tensor], object] | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Full-catalogue metrics on the validation targets, seen items removed.

    The users are the same for every rank and call; rank r scores users r, r + world, … and the counts are
    exact at any world size.

    Args:
        scorer: Model under training.
        histories: Histories of the target domain; context `rows[:cut0]`, target `rows[cut0]`.
        tie_rank: Order of equal scores, [N].
        allowed: Candidates (the items of the target domain), bool [N].
        max_users: Users drawn at random with `seed`; 0: all.
        seed: Of that draw.
        batch_users: Users scored at once (fewer on huge catalogues).
        rank: This process.
        world: Number of processes.
        all_reduce: Sums a float64 tensor over processes in place; needed if world > 1.
        device: Where that tensor must lie (nccl reduces on the GPU only).

    Returns:
        `hr@1 … ndcg@20, mrr` as in `METRICS`, and `num_users`. All zero without a single validation target.
    """
    assert world == 1 or all_reduce is not None
    mine = drawn_users(histories, max_users=max_users, seed=seed)[rank::world]
    sums = np.zeros(len(METRICS) + 1)
    step = batch_rows(batch_users, len(tie_rank))
    for begin in range(0, len(mine), step):
        batch = mine[begin : begin + step]
        contexts, targets = contexts_and_targets(histories, batch, part=0)
        scores = scorer.scores(contexts, histories.domain[batch])
        ranks = target_ranks(scores, targets, tie_rank=tie_rank, exclude=contexts, allowed=allowed)
        sums[:-1] += metrics_of_ranks(ranks).sum(0)
        sums[-1] += len(batch)
    total = torch.from_numpy(sums).to(device)
    if all_reduce is not None:
        all_reduce(total)
    count = float(total[-1])
    means = (total[:-1] / max(count, 1.0)).tolist()
    return {**dict(zip(METRICS, means, strict=True)), "num_users": count}


def validator(
    ctx: StageContext,
    catalog: CatalogView,
    scorer: Callable[[nn.Module], Scorer],
    *,
    domain: str,
    max_users: int,
    seed: int,
    batch_users: int,
) -> Callable[[nn.Module], dict[str, float]]:
    """What a training calls to see how good its module is, see `validation_metrics`; ranks share the users.

    Args:
        ctx: The rank's context.
        catalog: Whose histories and candidates.
        scorer: Makes a scorer of the module under training.
        domain: Name of the target domain.
        max_users: Users drawn at random with `seed`; 0: all.
        seed: Of that draw.
        batch_users: Users scored at once.

    Raises:
        DataError: A file of the catalogue is damaged.
    """
    histories = drawn_histories(catalog, domain, max_users=max_users, seed=seed)
    allowed = catalog.candidates(domain)
    ties = tie_rank(np.asarray(catalog.train_counts))

    def evaluate(module: nn.Module) -> dict[str, float]:
        return validation_metrics(
            scorer(module),
            histories,
            tie_rank=ties,
            allowed=allowed,
            batch_users=batch_users,
            rank=ctx.rank,
            world=ctx.world,
            all_reduce=ctx.all_reduce,
            device=ctx.device,
        )

    return evaluate
