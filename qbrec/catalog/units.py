"""Units of input: slices of Parquet row groups that one Ray task reads, and Ray Data without noise."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from qbrec.catalog.contract import Domain
from qbrec.catalog.sources import open_parquet
from qbrec.errors import DataError, LaunchError, QbrecError

if TYPE_CHECKING:
    from ray.data import Dataset

ITEM_UNIT_ROWS = 16_384  # pictures and text: a second or a few of work
INTERACTION_UNIT_ROWS = 1 << 20  # some 40 MB


def cut_units(domains: list[Domain], *, role: str, unit_rows: int) -> list[dict[str, Any]]:
    """Cut the files of one role (`items`, `interactions`) of all domains into units of `unit_rows` at most.

    The cut depends on the files alone, so what is computed by batch is the same for any number of workers.
    """
    units: list[dict[str, Any]] = []
    for domain in domains:
        for number, file in enumerate(getattr(domain, role)):
            metadata = open_parquet(file.path).metadata
            first = 0
            for group in range(metadata.num_row_groups):
                rows = metadata.row_group(group).num_rows
                for begin in range(0, rows, unit_rows):
                    units.append(
                        {
                            "number": len(units), "domain": domain.number, "file": number,
                            "path": file.path, "group": group,
                            "begin": begin, "end": min(begin + unit_rows, rows), "first_row": first,
                        }
                    )  # fmt: skip
                first += rows
    return units


def unit_dataset(units: list[dict[str, Any]]) -> Dataset:
    """One Ray Data block per unit, so that a unit is one task."""
    import ray.data

    return ray.data.from_arrow([pa.Table.from_pylist([unit]) for unit in units])


def read_unit(unit: dict[str, Any], columns: list[str], *, batch_rows: int) -> Iterator[tuple[int, pa.Table]]:
    """Batches of a unit with the row number in the file (from 0) of their first row.

    Raises:
        DataError: The file changed or is damaged.
    """
    position = 0
    try:
        parquet = open_parquet(unit["path"])
        batches = parquet.iter_batches(
            batch_size=batch_rows, row_groups=[unit["group"]], columns=columns, use_threads=False
        )
        for batch in batches:
            begin, end = max(unit["begin"] - position, 0), min(unit["end"] - position, batch.num_rows)
            if begin < end:
                yield (
                    unit["first_row"] + position + begin,
                    pa.Table.from_batches([batch.slice(begin, end - begin)]),
                )
            position += batch.num_rows
            if position >= unit["end"]:
                return
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"cannot read row group {unit['group']}: {str(error).splitlines()[0]}",
            where=unit["path"],
            fix="write the file again",
        ) from error


def blocks_of(dataset: Dataset) -> Iterator[Any]:
    """References of a dataset's blocks as they are made, no faster than they are taken."""
    for bundle in dataset.iter_internal_ref_bundles():
        for block in bundle.blocks:
            yield block.ref


@contextmanager
def ray_errors() -> Iterator[None]:
    """Ray Data without its own progress bars and logs; errors of tasks come out as what they were.

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
            where="catalog",
            fix="look for memory or disk running out on the workers; the run resumes where it stopped",
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
