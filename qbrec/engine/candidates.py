"""Items that a softmax over items runs over while training: all of a pool, or a uniform sample of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qbrec.engine.mixing import uniform

CANDIDATES = 10  # purpose in the stream of random numbers; stages number their own from 0


@dataclass(frozen=True)
class Candidates:
    """Items that the right one is told from: all of a pool, or a uniform sample of a large one.

    Attributes:
        pool: int64 [P], item rows, ascending.
        count: Largest number of candidates of one micro-batch.
        seed: Seed of the random stream.
    """

    pool: torch.Tensor
    count: int
    seed: int

    def __post_init__(self) -> None:
        assert bool((self.pool[1:] > self.pool[:-1]).all()), "targets are looked up in the pool's order"

    def draw(self, samples: torch.Tensor, *, epoch: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Candidates of the micro-batch that consists of `samples` int64 [B].

        Returns:
            Item rows int64 [C], ascending, on the device of `samples`, and float32 [C], log of how many items
            each stands for: a row drawn twice stands for twice as many, its repetition for none. None: each
            for itself.
        """
        pool = self.pool.to(samples.device)
        if len(pool) <= self.count:
            return pool, None
        # Which samples share a micro-batch does not depend on the world size, so their sum is a fit key.
        key = samples.sum().expand(self.count)
        index = torch.arange(self.count, device=samples.device)
        u = uniform(key, seed=self.seed, epoch=epoch, purpose=CANDIDATES, index=index)
        fine = uniform(key, seed=self.seed, epoch=epoch, purpose=CANDIDATES, index=index + self.count)
        # 24 bits do not reach every row of a large pool; a second draw gives the digits below them.
        place = ((u.double() + fine.double() * 2.0**-24) * len(pool)).to(torch.int64).clamp(max=len(pool) - 1)
        place = place.sort().values
        before = torch.searchsorted(place, place)
        copies = torch.searchsorted(place, place, right=True) - before
        stands_for = torch.where(before == index, copies * (len(pool) / self.count), 0.0)
        return pool[place], stands_for.log()
