"""Ray Data as the commands use it: one block per unit of work, no noise, errors that say what they were."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from qbrec.errors import LaunchError, QbrecError

if TYPE_CHECKING:
    from ray.data import Dataset


def unit_dataset(units: list[dict[str, Any]]) -> Dataset:
    """One Ray Data block per unit, so that a unit is one task."""
    import ray.data

    return ray.data.from_arrow([pa.Table.from_pylist([unit]) for unit in units])


def blocks_of(dataset: Dataset) -> Iterator[Any]:
    """References of a dataset's blocks as they are made, no faster than they are taken."""
    for bundle in dataset.iter_internal_ref_bundles():
        for block in bundle.blocks:
            yield block.ref


@contextmanager
def ray_errors(where: str) -> Iterator[None]:
    """Ray Data without its own progress bars and logs; errors of tasks come out as what they were.

    Args:
        where: What runs, for the message of an error that is Ray's own.

    Raises:
        LaunchError: Ray itself failed.
    """
    import ray
    import ray.data

    context = ray.data.DataContext.get_current()
    # Without the last one Ray Data replaces a task's error by its own, and what the user did wrong is lost.
    settings = {
        "enable_progress_bars": False,
        "verbose_stats_logs": False,
        "raise_original_map_exception": True,
    }
    before = {name: getattr(context, name) for name in settings}
    for name, value in settings.items():
        setattr(context, name, value)
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    except QbrecError as error:
        # Ray's wrapper is a subclass of the original that prints a remote traceback: show the message only.
        raise _rebuilt(error) from None
    except ray.exceptions.RayError as error:
        cause = _cause(error)
        if cause is not None:
            raise _rebuilt(cause) from None
        inner = getattr(error, "cause", None) or error
        raise LaunchError(
            f"a Ray task failed: {type(inner).__name__}: {(str(inner).splitlines() or [''])[0]}",
            where=where,
            fix="look for memory or disk running out on the workers; the same command goes on from here",
        ) from error
    finally:
        for name, value in before.items():
            setattr(context, name, value)
        logger.setLevel(level)


def _cause(error: BaseException | None) -> QbrecError | None:
    seen = 0
    while error is not None and seen < 10:
        if isinstance(error, QbrecError):
            return error
        error = getattr(error, "cause", None) or error.__cause__
        seen += 1
    return None


def _rebuilt(error: QbrecError) -> QbrecError:
    for kind in type(error).__mro__:
        if kind.__module__ == QbrecError.__module__:
            plain: QbrecError = kind(error.what, where=error.where, fix=error.fix)
            return plain
    return error
