"""Delimited text to tables of strings, and strings to numbers and times, column by column."""

from __future__ import annotations

import csv
import io
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pc_csv

from qbrec.catalog.importers.dataset import Tally
from qbrec.catalog.importers.source import BLOCK_BYTES, Moved, Source, open_stream
from qbrec.errors import ConfigError, DataError
from qbrec.storage.ahead import ahead

_HEADER_BYTES = 1 << 20


@dataclass(frozen=True)
class Layout:
    """How a delimited file is written.

    Attributes:
        delimiter: One character between columns.
        header: Whether the first line names the columns; else they are called `1`, `2`, ….
        quotes: Whether `"` may enclose a value (which may then span lines).
        encoding: Of the text.
    """

    delimiter: str = ","
    header: bool = True
    quotes: bool = True
    encoding: str = "utf-8"


def column_names(source: Source, layout: Layout) -> list[str]:
    """Names of the columns of a file.

    Raises:
        DataError: The file is empty, or its first line is no text of the encoding.
    """
    with open_stream(source.place, lambda _: None) as stream:
        return first_names(stream, source.place, layout)


def first_names(stream: IO[bytes], place: str, layout: Layout) -> list[str]:
    """The same from the beginning of an open stream."""
    start = stream.read(_HEADER_BYTES)
    try:
        # The start may end within a character.
        text = start.decode(layout.encoding, "strict" if len(start) < _HEADER_BYTES else "ignore")
    except LookupError:
        raise ConfigError(
            f"there is no encoding {layout.encoding!r}", where="--encoding", fix="such as utf-8 or latin1"
        ) from None
    except UnicodeDecodeError as error:
        raise _encoding_error(place, str(error)) from None
    lines = io.StringIO(text.removeprefix("\ufeff"), newline="")
    rows = csv.reader(
        lines,
        delimiter=layout.delimiter,
        quoting=csv.QUOTE_MINIMAL if layout.quotes else csv.QUOTE_NONE,
    )
    row = next((row for row in rows if row), None)
    if row is None:
        raise DataError("the file is empty", where=place, fix="bring a file with rows")
    return row if layout.header else [str(i + 1) for i in range(len(row))]


def check_columns(wanted: Sequence[str], present: Sequence[str], place: str) -> None:
    """Refuse columns that are not there, or there twice.

    Raises:
        DataError: A column is missing or ambiguous.
    """
    for name in wanted:
        if present.count(name) != 1:
            what = "missing" if name not in present else "there twice"
            raise DataError(
                f"the column {name!r} is {what}",
                where=f"{place}: columns present are {', '.join(present)}",
                fix="name the column as it is in the file, and check the delimiter",
            )


def read_delimited(
    source: Source, wanted: Sequence[str], layout: Layout, tally: Tally, moved: Moved, *, what: str
) -> Iterator[pa.Table]:
    """Tables of the wanted columns, all strings; an empty value is null.

    Rows with too many or too few values are counted and passed over.

    Raises:
        DataError: A column is missing, the text is not of the encoding, or a quote is never closed.
    """
    names = column_names(source, layout)
    check_columns(wanted, names, source.place)

    def opened() -> Generator[pa.Table, None, None]:
        with open_stream(source.place, moved) as stream:
            yield from parse_delimited(stream, names, wanted, layout, tally, place=source.place, what=what)

    yield from ahead(opened())


def parse_delimited(
    stream: IO[bytes],
    names: Sequence[str],
    wanted: Sequence[str],
    layout: Layout,
    tally: Tally,
    *,
    place: str,
    what: str,
) -> Generator[pa.Table, None, None]:
    """The same from an open stream; `names` are those of all its columns."""

    def skip(_row: Any) -> str:
        tally.bad(what, "wrong number of values")
        return "skip"

    # Columns may share a name as long as it is not wanted.
    unique = [name if name in wanted else f"{i}:{name}" for i, name in enumerate(names)]
    try:
        reader = pc_csv.open_csv(
            stream,
            read_options=pc_csv.ReadOptions(
                block_size=BLOCK_BYTES,
                column_names=unique,
                skip_rows=int(layout.header),
                encoding=layout.encoding,
                use_threads=False,
            ),
            parse_options=pc_csv.ParseOptions(
                delimiter=layout.delimiter,
                quote_char='"' if layout.quotes else False,
                newlines_in_values=layout.quotes,
                invalid_row_handler=skip,
            ),
            convert_options=pc_csv.ConvertOptions(
                include_columns=list(wanted),
                column_types={name: pa.string() for name in wanted},
                strings_can_be_null=True,
                null_values=[""],
            ),
        )
        for batch in reader:
            yield pa.Table.from_batches([batch])
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        said = str(error)
        if isinstance(error, UnicodeDecodeError) or "UTF8" in said or "UTF-8" in said:
            raise _encoding_error(place, said) from None
        if "Empty CSV file" in said:
            return  # nothing but a header
        raise DataError(
            f"this is no such delimited text: {said}",
            where=place,
            fix="check the delimiter; where quotes are ordinary characters, use --no-quotes",
        ) from None


def _encoding_error(place: str, said: str) -> DataError:
    return DataError(
        f"the text has another encoding: {said}", where=place, fix="name it, such as --encoding latin1"
    )


def whole_numbers(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Strings as int64; what is no whole number (a fraction of zero is fine) is null."""
    digits = pc.utf8_trim_whitespace(column)
    digits = pc.replace_substring_regex(digits, r"^\+|\.0*$", "")
    return _where(digits, r"^-?\d{1,18}$").cast(pa.int64())


def numbers(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Strings as float64; what is no finite number is null."""
    trimmed = pc.replace_substring_regex(pc.utf8_trim_whitespace(column), r"^\+", "")
    return _where(trimmed, r"^-?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,2})?$").cast(pa.float64())


def times(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """ISO 8601 text as microseconds since 1970, int64; without offset it is UTC; what is no date is null."""
    import pandas as pd

    parsed = pd.to_datetime(column.to_pandas(), format="ISO8601", utc=True, errors="coerce")
    stamps = parsed.to_numpy(dtype="datetime64[us]")
    return pa.chunked_array([pa.array(stamps.astype(np.int64), mask=np.isnat(stamps))])


def split_texts(column: pa.ChunkedArray, separator: str) -> pa.ChunkedArray:
    """Strings as lists of trimmed strings; null stays null."""
    if column.num_chunks != 1:
        column = pa.chunked_array([column.combine_chunks()], column.type)
    parts = pc.split_pattern(column.chunk(0), separator)
    trimmed = pc.utf8_trim_whitespace(parts.flatten())
    parents = pc.list_parent_indices(parts)
    full = pc.greater(pc.binary_length(trimmed), 0)
    counts = np.bincount(np.asarray(parents.filter(full)), minlength=len(parts))
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))
    lists = pa.ListArray.from_arrays(offsets, trimmed.filter(full), mask=parts.is_null())
    return pa.chunked_array([lists])


def _where(column: pa.ChunkedArray, pattern: str) -> pa.ChunkedArray:
    fits = pc.match_substring_regex(column, pattern)
    return pc.if_else(fits, column, pa.scalar(None, pa.string()))
