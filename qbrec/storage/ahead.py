"""Making the next items in a thread while the caller works on the one before."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
_END: Any = object()


def ahead(items: Generator[T, None, None], *, depth: int = 2) -> Iterator[T]:
    """The same items, up to `depth` made ahead.

    Args:
        items: It runs, and is closed, in the thread. Its errors are raised here, in their place.
        depth: Items made ahead; 0 makes each when it is asked for, without a thread.

    Yields:
        The items in their order; leaving early waits for the one being made.
    """
    if depth == 0:
        yield from items
        return
    thread = ThreadPoolExecutor(1, thread_name_prefix="qbrec-ahead")
    pending: deque[Future[T]] = deque()
    try:
        while True:
            while len(pending) <= depth:
                pending.append(thread.submit(next, items, _END))
            item = pending.popleft().result()
            if item is _END:
                return
            yield item
    finally:
        for future in pending:
            future.cancel()
        thread.submit(items.close)
        thread.shutdown(wait=True)
