"""The global row grid: rows are cut so that no result depends on how many ranks or threads share the work.

Rows are dealt out in *grains* of `GRAIN` consecutive rows of the whole catalogue. What is found of a row
depends on that row alone (`kernels`), what is found of a grain is computed in one thread; sums over rows and
grains are int64 fixed point, and integer addition knows no order: any partition gives the same bits.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

GPU_ROWS = 1 << 18  # rows that keep a GPU busy for longer than the launches take
GRAIN = 2048  # rows: unit of distribution over ranks and threads, and of one fixed-point conversion

R = TypeVar("R")


class Collective(Protocol):
    """What this stage needs of a process group; `engine.StageContext` is one."""

    @property
    def rank(self) -> int:
        """This process among `world`."""
        ...

    @property
    def world(self) -> int:
        """Number of processes."""
        ...

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Tensor:
        """Reduce in place over all ranks."""
        ...

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Overwrite in place with rank 0's values."""
        ...


@dataclass(frozen=True)
class Alone:
    """A process group of one."""

    rank: int = 0
    world: int = 1

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Tensor:
        """Nothing to add."""
        return tensor

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Nobody to tell."""
        return tensor


def split_rows(total: int, *, rank: int, world: int) -> tuple[int, int]:
    """Rows [start, stop) of one rank: contiguous, borders on the grain grid; late ranks may be empty."""
    grains = -(-total // GRAIN)
    start, stop = grains * rank // world, grains * (rank + 1) // world
    return min(start * GRAIN, total), min(stop * GRAIN, total)


@dataclass(frozen=True)
class Shard:
    """One rank's contiguous part of a global matrix.

    Args:
        x: float32 [n, D], contiguous.
        start: Global row of `x[0]`, a multiple of `GRAIN` unless the shard is empty.
        total: Rows of the global matrix, N.
        train: bool [n], the rows a fit may see; None: all.
    """

    x: Tensor
    start: int
    total: int
    train: Tensor | None = None

    def __post_init__(self) -> None:
        assert self.x.dtype == torch.float32
        assert self.x.dim() == 2
        assert self.x.is_contiguous()
        assert len(self.x) == 0 or self.start % GRAIN == 0, "rank borders lie on the grain grid"
        assert self.start + len(self.x) == self.total or len(self.x) % GRAIN == 0
        assert self.train is None or (self.train.dtype == torch.bool and len(self.train) == len(self.x))

    @property
    def num_grains(self) -> int:
        """Grains of this rank."""
        return -(-len(self.x) // GRAIN)

    def rows(self) -> Tensor:
        """Global rows of this rank, int64 [n]."""
        return torch.arange(self.start, self.start + len(self.x), device=self.x.device)

    def pieces(self) -> list[slice]:
        """Local rows in pieces that one call of a kernel takes: grains on a CPU, far more on a GPU."""
        size = GRAIN if self.x.device.type == "cpu" else GPU_ROWS
        return [slice(a, min(a + size, len(self.x))) for a in range(0, len(self.x), size)]

    def grain(self, index: int) -> slice:
        """Local rows of one grain."""
        return slice(index * GRAIN, min((index + 1) * GRAIN, len(self.x)))


def parallel(count: int, body: Callable[[range], R], *, device: torch.device) -> list[R]:
    """Run `body` over 0..count-1, dealt out to single-threaded workers; one result per worker.

    On a CPU every grain is computed by one thread, `torch.get_num_threads()` grains at a time: faster than
    threads inside each small operation, and results do not depend on the number of threads. On a GPU there is
    one worker.
    """
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    workers = max(1, min(threads, count))
    if workers == 1 and threads == 1:
        return [body(range(count))]
    ready = threading.Barrier(workers + 1)

    def single_threaded() -> None:
        torch.set_num_threads(1)
        ready.wait()

    with ThreadPoolExecutor(workers, initializer=single_threaded) as pool:
        futures = [pool.submit(body, range(w, count, workers)) for w in range(workers)]
        ready.wait()
        # Setting threads in a worker is local to it but for the default of threads born later: put that back.
        torch.set_num_threads(threads)
        return [future.result() for future in futures]


@dataclass(frozen=True)
class FixedPoint:
    """int64 fixed point for a sum of `count` numbers of magnitude at most `bound`.

    The scale is 2^s with s = min(62 - ceil(log2 count), 50) - ceil(log2 bound): a sum cannot overflow, and a
    single number stays where doubles hold every integer.
    """

    shift: int

    @classmethod
    def of(cls, count: int, bound: float) -> FixedPoint:
        """The finest scale that is safe."""
        assert math.isfinite(bound), "a bound on finite numbers"
        size = math.ceil(math.log2(bound)) if bound > 0 else 0
        return cls(min(62 - math.ceil(math.log2(max(count, 1))), 50) - size)

    def encode(self, values: Tensor) -> Tensor:
        """Float tensor -> int64, rounded half to even."""
        return (values.double() * math.ldexp(1.0, self.shift)).round_().long()

    def decode(self, sums: Tensor) -> Tensor:
        """int64 -> float64."""
        return sums.double() * math.ldexp(1.0, -self.shift)


def max_abs(shard: Shard, comm: Collective) -> float:
    """Largest magnitude in the global matrix (exact on any partition)."""
    low, high = torch.aminmax(shard.x) if shard.x.numel() else (torch.zeros(()), torch.zeros(()))
    top = torch.maximum(-low, high).reshape(1).to(shard.x.device)
    comm.all_reduce(top, op="max")
    return float(top)


def standardise(shard: Shard, comm: Collective, *, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Give every dimension mean 0 and deviation 1, in place.

    Args:
        shard: This rank's rows.
        comm: Process group.
        rows: Those that count, bool [n]; the others become 0. None: all.

    Returns:
        Mean and deviation float32 [D], the same bits on any partition; a dimension that does not vary has
        deviation 1.
    """
    x, bound = shard.x, max_abs(shard, comm)
    present = torch.ones(len(x), dtype=torch.bool, device=x.device) if rows is None else rows
    count = int(comm.all_reduce(present.sum().reshape(1)))

    def mean_of(centre: Tensor | None, limit: float) -> Tensor:
        fixed = FixedPoint.of(count, limit)

        def body(grains: range) -> Tensor:
            out = torch.zeros(x.shape[1], dtype=torch.int64, device=x.device)
            for g in grains:
                have = x[shard.grain(g)].double()
                if centre is not None:
                    have = (have - centre) ** 2
                out += fixed.encode((have * present[shard.grain(g), None]).sum(0))
            return out

        sums = sum_of(parallel(shard.num_grains, body, device=x.device))
        comm.all_reduce(sums)
        return fixed.decode(sums) / max(count, 1)

    mean = mean_of(None, bound)
    std = mean_of(mean, (2 * bound) ** 2).sqrt()
    flat = std <= 1e-7 * max(bound, 1e-30)
    narrow = mean.float(), torch.where(flat, torch.ones_like(std), std).float()
    x -= narrow[0]
    x /= narrow[1]
    if rows is not None:
        x[~rows] = 0
    return narrow


def sum_of(parts: Sequence[Tensor]) -> Tensor:
    """Sum of the workers' int64 accumulators."""
    out = parts[0]
    for part in parts[1:]:
        out += part
    return out


def gather_rows(shard: Shard, rows: np.ndarray, comm: Collective) -> Tensor:
    """Rows of the global matrix, on every rank.

    Args:
        shard: This rank's part.
        rows: int64 [n] global rows, sorted, the same on every rank.
        comm: Process group.

    Returns:
        float32 [n, D].
    """
    lo, hi = np.searchsorted(rows, [shard.start, shard.start + len(shard.x)])
    out = torch.zeros(len(rows), shard.x.shape[1], dtype=torch.float32, device=shard.x.device)
    local = torch.from_numpy(rows[lo:hi] - shard.start).to(shard.x.device)
    # Adding zeros is exact; + 0.0 turns a negative zero into the one that a sum over ranks would give.
    out[int(lo) : int(hi)] = shard.x[local] + 0.0
    comm.all_reduce(out)
    return out


def stratified(total: int, count: int, *, seed: int) -> np.ndarray:
    """`count` of `total` rows, one at random from each of `count` equal strata: int64, sorted, unique."""
    if count >= total:
        return np.arange(total, dtype=np.int64)
    rng = np.random.Generator(np.random.PCG64(seed))
    edges = np.arange(count + 1, dtype=np.int64) * total // max(count, 1)
    width = np.diff(edges)
    inside = np.minimum((rng.random(count) * width).astype(np.int64), width - 1)
    return np.asarray(edges[:-1] + inside, dtype=np.int64)


def batches(num_grains: int, *, seed: int) -> list[np.ndarray]:
    """One epoch's batches of global grains: each takes one grain from every stratum of the row range.

    So a batch holds about as many grains of every rank, while the batches do not depend on the number of
    ranks.
    """
    strata = min(max(4, num_grains // 64), max(1, num_grains // 8))
    rng = np.random.Generator(np.random.PCG64(seed))
    edges = np.arange(strata + 1) * num_grains // strata
    drawn = [rng.permutation(np.arange(a, b)) for a, b in pairwise(edges)]
    longest = max(len(d) for d in drawn)
    return [np.array([d[i] for d in drawn if i < len(d)], dtype=np.int64) for i in range(longest)]
