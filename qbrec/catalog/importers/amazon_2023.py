"""Amazon Reviews 2023 (Hou et al., arXiv 2403.03952).

Format: https://amazon-reviews-2023.github.io. Reviews are JSON lines with `user_id`, `parent_asin`, `rating`
and `timestamp` (milliseconds); the benchmark files are CSV with the same names. Metadata, too, is by
`parent_asin`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from qbrec.catalog.importers import values
from qbrec.catalog.importers.amazon_2018 import ONLY_ID, item_schema
from qbrec.catalog.importers.dataset import INTERACTIONS, Dataset, Part, Tally
from qbrec.catalog.importers.delimited import Layout, numbers, read_delimited, whole_numbers
from qbrec.catalog.importers.records import Record, read_json_columns, read_json_lines
from qbrec.catalog.importers.source import Moved, Source, find_source

_REVIEWS = pa.schema(
    [
        ("user_id", pa.string()), ("parent_asin", pa.string()), ("timestamp", pa.int64()),
        ("rating", pa.float64()),
    ]
)  # fmt: skip


def amazon_2023(
    *, reviews: Sequence[str], metadata: Sequence[str] = (), images: bool = True, keep_html: bool = False
) -> Dataset:
    """The data set from its files.

    Args:
        reviews: Files or URLs of reviews (`.jsonl`) or of the benchmark's interactions (`.csv`), gzip or not.
        metadata: Files or URLs of metadata.
        images: Write the address of each item's picture as `image_path`.
        keep_html: Leave tags, entities and white space in texts.

    Raises:
        DataError: A file is not there.
    """
    schema = item_schema([pa.field("main_category", pa.string())], images=images)
    review_files = tuple(map(find_source, reviews))
    metadata_files = tuple(map(find_source, metadata))

    def interactions(tally: Tally, moved: Moved) -> Iterator[pa.Table]:
        for source in review_files:
            tables = _benchmark if _is_csv(source.place) else _reviews
            for table in tables(source, tally, moved):
                yield table.rename_columns(INTERACTIONS.names)

    def items(tally: Tally, moved: Moved) -> Iterator[pa.Table]:
        def convert(record: Record) -> Record:
            return _item(record, clean=not keep_html)

        return read_json_lines(metadata_files, schema, convert, tally, moved, what="metadata")

    return Dataset(
        name="amazon-2023",
        interactions=Part(review_files, interactions),
        ticks_per_second=1000,
        items=Part(metadata_files, items) if metadata_files else None,
        item_schema=schema if metadata_files else ONLY_ID,
        options={"images": images, "keep_html": keep_html},
    )


def _is_csv(place: str) -> bool:
    return place.partition("?")[0].lower().removesuffix(".gz").endswith(".csv")


def _reviews(source: Source, tally: Tally, moved: Moved) -> Iterator[pa.Table]:
    return read_json_columns([source], _REVIEWS, _review, tally, moved, what="interactions")


def _benchmark(source: Source, tally: Tally, moved: Moved) -> Iterator[pa.Table]:
    for table in read_delimited(source, _REVIEWS.names, Layout(), tally, moved, what="interactions"):
        user, item, time, rating = table.columns
        yield pa.table([user, item, whole_numbers(time), numbers(rating)], schema=_REVIEWS)


def _review(record: Record) -> Record:
    return {
        "user_id": values.identifier(record.get("user_id")),
        "parent_asin": values.identifier(record.get("parent_asin")),
        "timestamp": values.integer(record.get("timestamp")),
        "rating": values.number(record.get("rating")),
    }


def _item(record: Record, *, clean: bool) -> Record:
    return {
        "item_id": values.identifier(record.get("parent_asin")),
        "title": values.text(record.get("title"), clean=clean),
        "description": values.text(record.get("description"), clean=clean),
        "brand": values.text(_brand(record), clean=clean),
        "categories": values.texts(record.get("categories"), clean=clean),
        "image_path": values.address(_pictures(record.get("images"))),
        "price": values.price(record.get("price")),
        "features": values.texts(record.get("features"), clean=clean),
        "main_category": values.text(record.get("main_category"), clean=clean),
    }


def _brand(record: Record) -> Any:
    """`details.Brand`, else the name of the store."""
    details = record.get("details")
    if isinstance(details, str):
        # The Hugging Face copy holds this object as text.
        try:
            details = json.loads(details)
        except (ValueError, RecursionError):
            details = None
    brand = details.get("Brand") if isinstance(details, dict) else None
    return brand if isinstance(brand, str) and brand.strip() else record.get("store")


def _pictures(images: Any) -> list[Any]:
    """Addresses in order of choice: the main picture first, the larger size first."""
    if isinstance(images, dict):
        # The Hugging Face copy: one list for each size.
        return [images.get("hi_res"), images.get("large")]
    if not isinstance(images, list):
        return []
    pictures = [picture for picture in images if isinstance(picture, dict)]
    pictures.sort(key=lambda picture: picture.get("variant") != "MAIN")
    return [picture.get(size) for picture in pictures for size in ("hi_res", "large")]
