"""Units of input: slices of Parquet row groups that one Ray task reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from qbrec.catalog.contract import Domain
from qbrec.catalog.sources import open_parquet
from qbrec.errors import DataError

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
            for piece in cut_file(file.path, metadata, unit_rows=unit_rows):
                units.append({"number": len(units), "domain": domain.number, "file": number, **piece})
    return units


def cut_file(path: str, metadata: pq.FileMetaData, *, unit_rows: int) -> Iterator[dict[str, Any]]:
    """Slices of a file's row groups with at most `unit_rows` rows: what `read_unit` needs to read one."""
    first = 0
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        for begin in range(0, rows, unit_rows):
            end = min(begin + unit_rows, rows)
            yield {"path": path, "group": group, "begin": begin, "end": end, "first_row": first}
        first += rows


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
