"""JSON lines to tables: pyarrow parses whole blocks; a block it refuses is read line by line, and counted."""

from __future__ import annotations

import ast
import io
import json
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.json as pj

from qbrec.catalog.importers.dataset import Tally
from qbrec.catalog.importers.source import Moved, Source, line_blocks, open_stream
from qbrec.storage.ahead import ahead

# Longest line that is read as a Python literal: its syntax tree takes far more memory than the text.
MAX_LITERAL = 1 << 20
Record = dict[str, Any]
Convert = Callable[[Record], Record]


def read_json_columns(
    sources: Iterable[Source], schema: pa.Schema, convert: Convert, tally: Tally, moved: Moved, *, what: str
) -> Iterator[pa.Table]:
    """Tables of `schema` from JSON lines that nearly all have exactly these types: the fast way.

    Args:
        sources: Files of JSON lines, gzip or not.
        schema: Names and types as in the lines; other members are passed over.
        convert: Turns one parsed line into a record of `schema`, where its block has to be read line by line.
        tally: Lines that are no JSON object are counted here.
        moved: Told the bytes read.
        what: What a line is, such as `interactions`.
    """
    for source in sources:
        for block in ahead(_blocks(source, moved)):
            table = _parse(block, schema)
            yield table if table is not None else _line_by_line(block, schema, convert, tally, what)


def read_json_lines(
    sources: Iterable[Source], schema: pa.Schema, convert: Convert, tally: Tally, moved: Moved, *, what: str
) -> Iterator[pa.Table]:
    """Tables of `schema` from JSON lines of any shape, every one converted by `convert`."""
    for source in sources:
        for block in ahead(_blocks(source, moved)):
            yield _line_by_line(block, schema, convert, tally, what)


def _blocks(source: Source, moved: Moved) -> Generator[bytes, None, None]:
    with open_stream(source.place, moved) as stream:
        yield from line_blocks(stream, source.place)


def _parse(block: bytes, schema: pa.Schema) -> pa.Table | None:
    """The block as pyarrow reads it, or None where there is a line it cannot read."""
    try:
        # One block and one thread: an error is an error of this block, and decompression has another core.
        table = pj.read_json(
            io.BytesIO(block),
            read_options=pj.ReadOptions(use_threads=False, block_size=len(block) + 1),
            parse_options=pj.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
        )
        # The parser takes any bytes for text.
        table.validate(full=True)
    except pa.ArrowInvalid:
        return None
    # It also takes several objects in one line, or one in several, for lines of their own.
    lines = block.count(b"\n") + (not block.endswith(b"\n"))
    return table.select(schema.names) if table.num_rows == lines else None


def _line_by_line(block: bytes, schema: pa.Schema, convert: Convert, tally: Tally, what: str) -> pa.Table:
    records = []
    # Not splitlines(): a lone carriage return ends no JSON line.
    for line in block.split(b"\n"):
        if not line.strip():
            continue
        record = decode(line)
        if record is None:
            tally.bad(what, "not a JSON object")
        else:
            records.append(convert(record))
    return pa.Table.from_pylist(records, schema=schema)


def decode(line: bytes) -> Record | None:
    """A line as JSON or, as in the metadata of 2014, as a Python literal; None for anything else."""
    try:
        value = json.loads(line)
    except ValueError:
        value = _literal(line)
    except RecursionError:
        return None
    return value if isinstance(value, dict) else None


def _literal(line: bytes) -> object:
    if len(line) > MAX_LITERAL or not line.lstrip().startswith(b"{"):
        return None
    try:
        return ast.literal_eval(line.decode("utf-8").strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
