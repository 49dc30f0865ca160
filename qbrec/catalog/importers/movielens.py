"""MovieLens: 25M and its kin (20M, 32M, latest: ratings.csv, movies.csv), 1M and 10M (.dat instead of .csv).

Format: https://grouplens.org/datasets/movielens/ (README.html of ml-25m, README of ml-1m). Comma-separated
UTF-8 with a header; in 1M `::` between values, no header, Latin-1 (10M: UTF-8). Genres, a flat set divided by
`|`, are written as categories.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.compute as pc

from qbrec.catalog.importers.dataset import INTERACTIONS, Dataset, Part, Tally
from qbrec.catalog.importers.delimited import (
    Layout,
    check_columns,
    first_names,
    numbers,
    parse_delimited,
    split_texts,
    whole_numbers,
)
from qbrec.catalog.importers.source import (
    Moved,
    Source,
    line_blocks,
    open_raw,
    open_stream,
    unreadable,
)
from qbrec.errors import DataError
from qbrec.storage.ahead import ahead

_ITEMS = pa.schema(
    [
        ("item_id", pa.string()), ("title", pa.string()), ("categories", pa.list_(pa.string())),
        ("year", pa.int32()),
    ]
)  # fmt: skip
_RATINGS = ("userId", "movieId", "rating", "timestamp")
_MOVIES = ("movieId", "title", "genres")
_NO_GENRES = "(no genres listed)"
# One character in place of `::`, which no title holds.
_DAT = Layout(delimiter="\x1f", header=False, quotes=False)


def movielens(place: str, *, path: str | None = None) -> Dataset:
    """The data set from a zip file as it is downloaded, or the folder it was unpacked to.

    Args:
        place: What the user named.
        path: Where it lies, if `place` is an address.

    Raises:
        DataError: It is neither, or holds no ratings and movies.
    """
    ratings, movies = _find(place, path or place)

    def interactions(tally: Tally, moved: Moved) -> Iterator[pa.Table]:
        for table in ratings.tables(_RATINGS, tally, moved, what="interactions"):
            user, item, rating, time = table.columns
            yield pa.table([user, item, whole_numbers(time), numbers(rating)], schema=INTERACTIONS)

    def items(tally: Tally, moved: Moved) -> Iterator[pa.Table]:
        for table in movies.tables(_MOVIES, tally, moved, what="metadata"):
            item, title, genres = table.columns
            genres = pc.if_else(pc.equal(genres, _NO_GENRES), "", genres)
            year = pc.struct_field(pc.extract_regex(title, r"\((?P<year>\d{4})\)\s*$"), "year")
            yield pa.table([item, title, split_texts(genres, "|"), year.cast(pa.int32())], schema=_ITEMS)

    return Dataset(
        name="movielens",
        interactions=Part((ratings.source,), interactions),
        ticks_per_second=1,
        items=Part((movies.source,), items),
        item_schema=_ITEMS,
        options={"place": place},
    )


@dataclass(frozen=True)
class _Table:
    """A file of the data set, by itself or in the zip file."""

    source: Source
    path: str
    member: str | None

    @contextmanager
    def open(self, moved: Moved) -> Iterator[IO[bytes]]:
        if self.member is None:
            with open_stream(self.path, moved) as stream:
                yield stream
            return
        try:
            with (
                open_raw(self.path, moved) as raw,
                zipfile.ZipFile(raw) as archive,
                archive.open(self.member) as stream,
            ):
                yield stream
        except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
            raise DataError(
                f"the zip file is damaged: {error}", where=self.source.place, fix="download it again"
            ) from None

    def tables(
        self, columns: tuple[str, ...], tally: Tally, moved: Moved, *, what: str
    ) -> Iterator[pa.Table]:
        dat = self.source.place.endswith(".dat")
        return ahead((self._dat if dat else self._csv)(columns, tally, moved, what))

    def _csv(
        self, columns: tuple[str, ...], tally: Tally, moved: Moved, what: str
    ) -> Generator[pa.Table, None, None]:
        place = self.source.place
        with self.open(lambda _: None) as stream:
            names = first_names(stream, place, Layout())
        check_columns(columns, names, place)
        with self.open(moved) as stream:
            yield from parse_delimited(stream, names, columns, Layout(), tally, place=place, what=what)

    def _dat(
        self, columns: tuple[str, ...], tally: Tally, moved: Moved, what: str
    ) -> Generator[pa.Table, None, None]:
        place = self.source.place
        with self.open(moved) as stream:
            for block in line_blocks(stream, place):
                part = io.BytesIO(block.replace(b"::", b"\x1f"))
                layout = replace(_DAT, encoding="utf-8" if _is_utf8(block) else "latin1")
                yield from parse_delimited(part, columns, columns, layout, tally, place=place, what=what)


def _is_utf8(block: bytes) -> bool:
    try:
        block.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _find(place: str, path: str) -> tuple[_Table, _Table]:
    """Ratings and movies."""
    found: dict[str, _Table] = {}
    try:
        if os.path.isdir(path):
            for file in sorted(Path(path).iterdir()):
                found[file.name] = _Table(Source(str(file), file.stat().st_size), str(file), None)
        else:
            with zipfile.ZipFile(path) as archive:
                for info in archive.infolist():
                    source = Source(f"{place}:{info.filename}", info.compress_size)
                    found[info.filename.rpartition("/")[2]] = _Table(source, path, info.filename)
    except zipfile.BadZipFile:
        raise DataError(
            "this is neither a zip file nor a folder", where=place, fix="name ml-25m.zip, or its folder"
        ) from None
    except OSError as error:
        raise unreadable(place, error) from None
    for suffix in (".csv", ".dat"):
        ratings, movies = found.get(f"ratings{suffix}"), found.get(f"movies{suffix}")
        if ratings is not None and movies is not None:
            return ratings, movies
    raise DataError(
        "there are no ratings.csv and movies.csv, nor ratings.dat and movies.dat",
        where=place,
        fix="name the zip file of MovieLens 1M, 10M, 20M, 25M or 32M, or its folder",
    )
