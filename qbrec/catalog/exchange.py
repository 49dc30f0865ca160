"""All-to-all on Ray tasks: split many inputs by partition, then work on each partition once.

Ray Data's hash shuffle does the same with a pool of actors that hold their partitions in their own memory;
plain tasks leave them in the object store, which spills to disk, need no actors (seconds to start), and
measured faster (`benchmarks/shuffle.py`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

if TYPE_CHECKING:
    from ray import ObjectRef

MAX_OBJECTS = 200_000  # parts of one exchange: the driver keeps a kilobyte or so for each
Source = TypeVar("Source")
Part = TypeVar("Part")
Summary = TypeVar("Summary")
Result = TypeVar("Result")
Parts = list[list["ObjectRef[Part]"]]  # by partition, in the order of the sources


def range_of(hashes: NDArray[np.uint64], partitions: int) -> NDArray[np.int32]:
    """Partition of each hash: equal ranges of 64 bits, in their order; int32 [n]."""
    return ((hashes >> np.uint64(32)) * np.uint64(partitions) >> np.uint64(32)).astype(np.int32)


def split_by(table: pa.Table, partition: NDArray[Any], partitions: int) -> list[pa.Table]:
    """Rows of a table by their partition, in their order within each.

    Args:
        table: n rows.
        partition: Partition of every row, integers [n] below `partitions`.
        partitions: Number of partitions.
    """
    if partitions == 1:
        return [table]
    # Of numbers below 2^16 numpy's stable sort is a radix sort: ten times faster.
    small = partition.astype(np.uint16 if partitions <= 1 << 16 else np.int32)
    order = np.argsort(small, kind="stable")
    bounds = np.concatenate([[0], np.cumsum(np.bincount(small, minlength=partitions))]).tolist()
    ordered = table.take(pa.array(order))
    return [ordered.slice(begin, end - begin) for begin, end in pairwise(bounds)]


def exchange(
    sources: Iterable[Source],
    split: Callable[[list[Source]], tuple[list[Part], Summary]],
    *,
    partitions: int,
    group: int = 1,
    num_cpus: float = 1,
    add: Callable[[Summary], None] | None = None,
) -> Parts[Part]:
    """Split all sources into `partitions` parts, some sources in each task.

    Args:
        sources: Values or references of objects; one is let go of as soon as it has been split, and no
            more are asked for than the cluster works on.
        split: Called with `group` sources; returns a part for every partition, and a summary.
        partitions: Number of partitions.
        group: Sources per task (see `group_size`).
        num_cpus: CPUs that a task asks for; 0 where actors that make the sources may hold all there are: it
            then runs beside them, and what they made does not pile up.
        add: Called with every summary, in the order in which the tasks end.

    Returns:
        By partition, references of its parts in the order of the sources.
    """
    import ray

    def task(work: Callable[[list[Source]], tuple[list[Part], Summary]], *mine: Source) -> list[Any]:
        parts, summary = work(list(mine))
        assert len(parts) == partitions
        return [summary, *parts]

    remote = ray.remote(task).options(num_returns=partitions + 1, num_cpus=num_cpus)
    shared = ray.put(split)
    limit = _in_flight()
    outputs: list[list[Any]] = []
    running: list[Any] = []
    for mine in _groups(sources, group):
        refs = remote.remote(shared, *mine)
        del mine
        running.append(refs[0])
        outputs.append(refs[1:])
        del refs
        while len(running) >= limit:
            running = _collect(running, add)
    while running:
        running = _collect(running, add)
    return [list(mine) for mine in zip(*outputs, strict=True)] or [[] for _ in range(partitions)]


def reduce(
    parts: Parts[Part], work: Callable[[int, list[Part]], Result], *, release: bool = True
) -> Iterator[Result]:
    """Work on every partition in a task of its own; yields the results in the order of the partitions.

    Args:
        parts: What `exchange` returned.
        work: Called with the number of the partition and its parts.
        release: Let go of a partition's parts when it is finished, so that a later one finds room.
    """
    import ray

    def task(job: Callable[[int, list[Part]], Result], number: int, *mine: Part) -> Result:
        return job(number, list(mine))

    remote = ray.remote(task)
    shared = ray.put(work)
    limit = _in_flight()
    running: deque[Any] = deque()
    for number in range(len(parts)):
        running.append(remote.remote(shared, number, *parts[number]))
        if release:
            parts[number] = []
        if len(running) >= limit:
            yield ray.get(running.popleft())
    while running:
        yield ray.get(running.popleft())


def fetch(value: Any) -> Any:
    """What a reference of the object store stands for; any other value as it is (outside Ray)."""
    import ray

    return ray.get(value) if isinstance(value, ray.ObjectRef) else value


def group_size(num_sources: int, partitions: int) -> int:
    """Sources per task of an exchange, so that it makes no more than `MAX_OBJECTS` parts."""
    return max(1, -(-num_sources * partitions // MAX_OBJECTS))


def _groups(sources: Iterable[Source], size: int) -> Iterator[list[Source]]:
    iterator = iter(sources)
    while group := list(islice(iterator, size)):
        yield group


def _in_flight() -> int:
    """Tasks that may be under way: enough that a core never waits for the driver."""
    import ray

    return 2 * max(int(ray.cluster_resources().get("CPU", 1)), 1)


def _collect(running: list[Any], add: Callable[[Any], None] | None) -> list[Any]:
    """Wait until one task has ended, hand on what it returned (an error is raised), and drop it."""
    import ray

    done, left = ray.wait(running, num_returns=1, fetch_local=False)
    for ref in done:
        result = ray.get(ref)
        if add is not None:
            add(result)
    return list(left)
