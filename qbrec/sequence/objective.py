"""The two losses of stage 3: each level's own softmax, and the softmax over items of the score that serves.

Levels alone are not enough: their product counts the popularity of codes once per level, and it never learns
which combinations are items. So the factorised score Σ_l z_l(c_{i,l}) of wholly hidden items is also trained
as one softmax over candidates. It needs no further parameter and leaves the scorer factorised. (Ours, beyond
the paper: a sixth to a third more validation NDCG@10 after as many epochs on Amazon Scientific and Beauty.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from qbrec.sequence.masks import CANDIDATES, uniform


@dataclass(frozen=True)
class Candidates:
    """Items that the hidden one is told from: all of a pool, or a uniform sample of a large one.

    Attributes:
        pool: int64 [P], item rows.
        count: Largest number of candidates of one micro-batch.
        seed: Seed of the random stream.
    """

    pool: torch.Tensor
    count: int
    seed: int

    def draw(self, samples: torch.Tensor, *, epoch: int) -> tuple[torch.Tensor, float]:
        """Candidates of the micro-batch that consists of `samples` int64 [B].

        Returns:
            Item rows int64 [C] on the device of `samples`, and log of how many items each stands for.
        """
        pool = self.pool.to(samples.device)
        if len(pool) <= self.count:
            return pool, 0.0
        # Which samples share a micro-batch does not depend on the world size, so their sum is a fit key.
        key = samples.sum().expand(self.count)
        index = torch.arange(self.count, device=samples.device)
        u = uniform(key, seed=self.seed, epoch=epoch, purpose=CANDIDATES, index=index)
        fine = uniform(key, seed=self.seed, epoch=epoch, purpose=CANDIDATES, index=index + self.count)
        # 24 bits do not reach every row of a large pool; a second draw gives the digits below them.
        place = ((u.double() + fine.double() * 2.0**-24) * len(pool)).to(torch.int64).clamp(max=len(pool) - 1)
        return pool[place], math.log(len(pool) / self.count)


def level_loss(
    logits: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], *, label_smoothing: float
) -> torch.Tensor:
    """Cross-entropy over the level's own codes, summed over all hidden codes.

    Args:
        logits: Per level float32 [M_l, K_l].
        targets: Per level int64 [M_l].
        label_smoothing: Share of the target spread over the other codes of the level.
    """
    losses = [
        functional.cross_entropy(scores, codes, reduction="sum", label_smoothing=label_smoothing)
        for scores, codes in zip(logits, targets, strict=True)
    ]
    return torch.stack(losses).sum()


def item_loss(
    logits: Sequence[torch.Tensor],
    *,
    target_codes: torch.Tensor,
    target_rows: torch.Tensor,
    candidate_codes: torch.Tensor,
    candidate_rows: torch.Tensor,
    log_weight: float,
) -> torch.Tensor:
    """Cross-entropy of the factorised score over items, summed over the wholly hidden items.

    The partition function is exp(target) + weight · Σ exp(candidates other than the target): exact where the
    candidates are the whole pool (weight 1), an unbiased estimate where they are a uniform sample of it.

    Args:
        logits: Per level float32 [M, K_l] of the hidden items.
        target_codes: int64 [M, L].
        target_rows: int64 [M].
        candidate_codes: int64 [C, L].
        candidate_rows: int64 [C].
        log_weight: Log of the number of items each candidate stands for.
    """
    own = torch.stack(
        [scores.gather(1, target_codes[:, level, None])[:, 0] for level, scores in enumerate(logits)]
    ).sum(0)  # [M]
    starts = [0]
    for scores in logits[:-1]:
        starts.append(starts[-1] + scores.shape[1])
    bags = candidate_codes + torch.tensor(starts, device=candidate_codes.device)  # [C, L] rows of the table
    table = torch.cat(list(logits), 1).t().contiguous()  # [Σ K_l, M]
    others = functional.embedding_bag(bags, table, mode="sum").t()  # [M, C]
    others = (others + log_weight).masked_fill(candidate_rows == target_rows[:, None], -torch.inf)
    return (torch.logsumexp(torch.cat((own[:, None], others), 1), 1) - own).sum()
