"""Delimited text of one's own, with columns named by options."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from qbrec.catalog.importers.dataset import INTERACTIONS, Dataset, Part, Tally
from qbrec.catalog.importers.delimited import (
    Layout,
    check_columns,
    column_names,
    numbers,
    read_delimited,
    split_texts,
    times,
    whole_numbers,
)
from qbrec.catalog.importers.source import Moved, find_source

UNITS = {"s": 1, "ms": 1000, "us": 1_000_000, "iso": 1_000_000}
TEXTS = ("title", "description", "brand", "categories", "image_path")


@dataclass(frozen=True)
class Columns:
    """Names of columns in the files.

    Attributes:
        rating: None: there is none.
        items_item: The item's id in the file of items; None: as in the interactions.
        texts: Column by contract name (`title`, …); others are taken where the file has that very name.
        keep: Further columns of the file of items, carried along as strings.
    """

    user: str = "user_id"
    item: str = "item_id"
    time: str = "timestamp"
    rating: str | None = None
    items_item: str | None = None
    texts: Mapping[str, str] = field(default_factory=dict)
    keep: Sequence[str] = ()


def csv_files(
    *,
    interactions: Sequence[str],
    items: str | None = None,
    columns: Columns,
    delimiter: str | None = None,
    header: bool = True,
    quotes: bool = True,
    encoding: str = "utf-8",
    unit: str = "s",
    separator: str = "|",
) -> Dataset:
    """A data set from delimited files.

    Args:
        interactions: Files or URLs, gzip or not.
        items: File or URL of items, or None.
        columns: Their names.
        delimiter: Between columns; None: by the ending, a tab in `.tsv`, a comma elsewhere.
        header: Whether the first line names the columns; else they are called `1`, `2`, ….
        quotes: Whether `"` may enclose a value.
        encoding: Of all files.
        unit: Of the timestamps: `s`, `ms`, `us` since 1970, or `iso` for ISO 8601 text.
        separator: Between the categories of an item.

    Raises:
        DataError: A file or column is not there.
    """
    assert unit in UNITS

    def layout_of(place: str) -> Layout:
        tabs = place.partition("?")[0].lower().removesuffix(".gz").endswith((".tsv", ".tab"))
        return Layout(delimiter or ("\t" if tabs else ","), header=header, quotes=quotes, encoding=encoding)

    sources = tuple(map(find_source, interactions))
    item_source = find_source(items) if items is not None else None
    wanted = [columns.user, columns.item, columns.time, *([columns.rating] if columns.rating else [])]
    for source in sources:
        check_columns(wanted, column_names(source, layout_of(source.place)), source.place)
    taken = {"item_id": columns.items_item or columns.item}
    if item_source is not None:
        present = column_names(item_source, layout_of(item_source.place))
        named = {name: name for name in TEXTS if name in present} | dict(columns.texts)
        taken |= {name: named[name] for name in TEXTS if name in named}
        taken |= {name: name for name in columns.keep}
        check_columns(list(taken.values()), present, item_source.place)
    schema = pa.schema([(name, _type(name)) for name in taken])

    def read_interactions(tally: Tally, moved: Moved) -> Iterator[pa.Table]:
        for source in sources:
            form = layout_of(source.place)
            unique = list(dict.fromkeys(wanted))
            for table in read_delimited(source, unique, form, tally, moved, what="interactions"):
                time = times(table[columns.time]) if unit == "iso" else whole_numbers(table[columns.time])
                stars = pa.nulls(len(table), pa.float64())
                if columns.rating:
                    stars = numbers(table[columns.rating])
                yield pa.table([table[columns.user], table[columns.item], time, stars], schema=INTERACTIONS)

    def read_items(tally: Tally, moved: Moved) -> Iterator[pa.Table]:
        assert item_source is not None
        form = layout_of(item_source.place)
        unique = list(dict.fromkeys(taken.values()))
        for table in read_delimited(item_source, unique, form, tally, moved, what="metadata"):
            found = [
                split_texts(table[column], separator) if name == "categories" else table[column]
                for name, column in taken.items()
            ]
            yield pa.table(found, schema=schema)

    return Dataset(
        name="csv",
        interactions=Part(sources, read_interactions),
        ticks_per_second=UNITS[unit],
        items=Part((item_source,), read_items) if item_source is not None else None,
        item_schema=schema if item_source is not None else pa.schema([("item_id", pa.string())]),
        options={
            "interaction_columns": dict(zip(("user", "item", "time", "rating"), wanted, strict=False)),
            "item_columns": taken if item_source is not None else {},
            "delimiter": delimiter,
            "header": header,
            "quotes": quotes,
            "encoding": encoding,
            "unit": unit,
            "separator": separator,
        },
    )


def _type(name: str) -> pa.DataType:
    return pa.list_(pa.string()) if name == "categories" else pa.string()
