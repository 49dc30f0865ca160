"""How many threads NumPy's linear algebra may use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Keep NumPy's matrix products on one thread; a context or a decorator.

    With several threads they add in another order, and how many there are depends on who started the process:
    Ray and torchrun allow one, a shell allows all. The same configuration must give the same artifact.
    """
    from threadpoolctl import threadpool_limits

    with threadpool_limits(limits=1, user_api="blas"):
        yield
