"""Ids of items to be retired: Parquet or CSV with a column `item_id`, or text with one id a line."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
from numpy.typing import NDArray

from qbrec.catalog.encoders.fields import strings
from qbrec.catalog.sources import open_parquet
from qbrec.errors import DataError
from qbrec.storage.filesystem import filesystem
from qbrec.storage.generations import GenerationsView

_BATCH = 65_536
Ints = NDArray[np.int64]


def list_identity(place: str) -> str:
    """SHA-256 of the bytes of a list.

    Raises:
        DataError: It cannot be read.
    """
    digest = hashlib.sha256()
    with _stream(place) as stream:
        while data := stream.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()


def read_ids(place: str) -> Iterator[list[str]]:
    """The ids of a list, batch by batch; empty lines and nulls are skipped.

    Args:
        place: `.parquet`, `.pq` or `.csv` with a column `item_id`; anything else is text, one id a line.

    Raises:
        DataError: It cannot be read, or has no column `item_id` of strings.
    """
    suffix = place.rpartition(".")[2].lower()
    if suffix in ("parquet", "pq"):
        parquet = open_parquet(place)
        if "item_id" not in parquet.schema_arrow.names:
            raise _no_column(place)
        tables = (
            pa.Table.from_batches([batch])
            for batch in parquet.iter_batches(batch_size=_BATCH, columns=["item_id"])
        )
        for table in tables:
            yield [name for name in strings(table, "item_id").to_pylist() if name]
        return
    with _stream(place) as stream:
        if suffix == "csv":
            options = pacsv.ConvertOptions(include_columns=["item_id"], column_types={"item_id": pa.string()})
            try:
                for batch in pacsv.open_csv(stream, convert_options=options):
                    yield [name for name in batch.column(0).to_pylist() if name]
            except KeyError:
                raise _no_column(place) from None
            except pa.ArrowException as error:
                raise _unreadable(place, str(error).splitlines()[0]) from error
            return
        try:
            lines = (line.rstrip("\r\n") for line in io.TextIOWrapper(stream, encoding="utf-8-sig"))
            while batch := list(islice(lines, _BATCH)):
                yield [line for line in batch if line.strip()]
        except UnicodeDecodeError as error:
            raise _unreadable(place, f"it is no UTF-8 text ({error.reason})") from error


def rows_to_retire(place: str, domain: str, view: GenerationsView) -> tuple[Ints, list[str]]:
    """Rows of the listed ids, ascending, and the ids that the domain does not have.

    Args:
        place: The list.
        domain: Their domain.
        view: The catalogue so far.
    """
    rows, unknown = [np.zeros(0, np.int64)], dict[str, None]()
    for ids in read_ids(place):
        found = view.lookup(ids, domain)
        known = np.flatnonzero(found >= 0)
        # An id that is not there may share its hash with one that is.
        stored = view.item_ids(found[known])
        right = np.array([ids[k] == name for k, name in zip(known.tolist(), stored, strict=True)], bool)
        found[known[~right]] = -1
        rows.append(found[found >= 0])
        unknown.update(dict.fromkeys(ids[k] for k in np.flatnonzero(found < 0).tolist()))
    return np.unique(np.concatenate(rows)), list(unknown)


def _stream(place: str) -> pa.NativeFile:
    fs, path = filesystem(place)
    try:
        return fs.open_input_stream(path, compression=None)
    except OSError as error:
        raise _unreadable(place, str(error)) from error


def _unreadable(place: str, why: str) -> DataError:
    return DataError(f"cannot read the list: {why}", where=f"--retire {place}", fix="check that it is there")


def _no_column(place: str) -> DataError:
    return DataError("there is no column 'item_id'", where=f"--retire {place}", fix="name the column item_id")
