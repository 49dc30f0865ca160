"""Who is evaluated on what: contexts, targets and candidates; and the ranks a model reaches on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from qbrec.config.stages import RankingConfig
from qbrec.engine.context import StageContext
from qbrec.errors import DataError
from qbrec.ranking.recommend import Ranker
from qbrec.ranking.scorer import Scorer
from qbrec.ranking.topk import tie_rank
from qbrec.ranking.validate import (
    HistoriesLike,
    batch_rows,
    contexts_and_targets,
    dealt_back,
    drawn,
    test_users,
)
from qbrec.storage.ragged import Ragged

COVERAGE_AT = 10


@dataclass(frozen=True)
class TestSet:
    """All test users of the target domain.

    Attributes:
        users: Index of each user's history among the domain's histories, int64 [B].
        domain: Domain code of each, [B].
        contexts: All items before the test target, oldest first; the seen filter reads all of them.
        targets: Item row to be found, int64 [B].
        allowed: Candidates, bool [N].
        ties: Order of equal scores, int64 [N].
    """

    __test__ = False  # pytest: no test class

    users: NDArray[np.int64]
    domain: NDArray[np.uint8]
    contexts: Ragged
    targets: NDArray[np.int64]
    allowed: NDArray[np.bool_]
    ties: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.users)

    @property
    def num_items(self) -> int:
        """Items of the catalogue, over all domains."""
        return len(self.ties)

    @classmethod
    def build(
        cls,
        histories: HistoriesLike,
        *,
        allowed: NDArray[np.bool_],
        train_counts: NDArray[np.int64],
        max_users: int = 0,
        seed: int = 0,
    ) -> TestSet:
        """Users with a test target `rows[cut1]` and at least one item before it.

        Args:
            histories: Histories of the target domain.
            allowed: Items of the target domain that may be recommended, bool [N].
            train_counts: Interactions of each item in the training part, [N].
            max_users: Users drawn at random with `seed`; 0: all.
            seed: Of that draw.

        Raises:
            DataError: Nobody has a test target.
        """
        users = test_users(histories)
        if not len(users):
            raise DataError(
                "no user has a test interaction, so there is nothing to evaluate",
                where="catalog artifact",
                fix="bring users with at least three interactions, or a later `catalog.test_fraction`",
            )
        users = drawn(users, max_users=max_users, seed=seed)
        contexts, targets = contexts_and_targets(histories, users, part=1)
        domain = np.asarray(histories.domain)[users]
        return cls(users, domain, contexts, targets, np.asarray(allowed), tie_rank(train_counts))


@dataclass(frozen=True)
class ModelRanks:
    """What one model reached.

    Attributes:
        kept: Rank of each target among all candidates, int64 [B].
        removed: The same with the user's seen items out of the race, int64 [B].
        coverage: Share of the candidates that are in anybody's top 10 (seen removed).
    """

    kept: NDArray[np.int64]
    removed: NDArray[np.int64]
    coverage: float

    def of(self, mode: str) -> NDArray[np.int64]:
        """Ranks of one mode, `kept` or `removed`."""
        return self.kept if mode == "kept" else self.removed


def rank_model(
    scorer: Scorer,
    test: TestSet,
    *,
    batch_users: int,
    ranking: RankingConfig | None = None,
    on_batch: Callable[[int], None] | None = None,
    ctx: StageContext | None = None,
) -> ModelRanks:
    """Rank every test target over the full catalogue; each user once, whatever the number of ranks.

    Args:
        scorer: The model.
        test: Users, targets and candidates.
        batch_users: Users scored at once (fewer on huge catalogues, if scores are dense).
        ranking: How semantic IDs are ranked; None: exactly.
        on_batch: Called with the number of users done, over all ranks, for progress.
        ctx: The ranks that share the users; None: this process has them all.

    Returns:
        The ranks of all users, on every rank.
    """
    rank, world = (ctx.rank, ctx.world) if ctx is not None else (0, 1)
    mine = np.arange(rank, len(test), world)
    ranks = np.empty((len(mine), 2), np.int64)  # kept, removed
    recommended = np.zeros(test.num_items, np.uint8)
    k = min(COVERAGE_AT, test.num_items)
    ranker = Ranker(scorer, tie_rank=test.ties, config=ranking or RankingConfig())
    among = ranker.only(test.allowed)
    step = batch_users if ranker.by_ids else batch_rows(batch_users, test.num_items)
    for begin in range(0, len(mine), step):
        batch = mine[begin : begin + step]
        contexts = test.contexts.take(batch)
        found = ranker.judge(contexts, test.domain[batch], test.targets[batch], k, among=among)
        ranks[begin : begin + step] = np.stack([found.kept, found.removed], axis=1)
        recommended[found.best[found.best >= 0]] = 1
        if on_batch is not None:
            on_batch(len(batch) * world)
    if ctx is not None:
        ranks = dealt_back(ctx.gather_bytes(torch.from_numpy(ranks).to(ctx.device))).numpy()
        anywhere = ctx.all_reduce(torch.from_numpy(recommended).to(ctx.device), op="max")
        recommended = anywhere.cpu().numpy()
    share = float(recommended.sum(dtype=np.int64) / test.allowed.sum())
    return ModelRanks(ranks[:, 0].copy(), ranks[:, 1].copy(), share)
