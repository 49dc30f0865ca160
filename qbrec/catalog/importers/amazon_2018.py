"""Amazon Reviews 2018 (Ni, Li, McAuley, EMNLP 2019) and its forerunner of 2014.

Format: https://nijianmo.github.io/amazon/index.html (2014: https://jmcauley.ucsd.edu/data/amazon/links.html).
Reviews, the 5-core and the full ones alike, are JSON lines with `reviewerID`, `asin`, `unixReviewTime`
(seconds) and `overall`; metadata are JSON lines too, in 2014 Python literals. Some titles are a piece of the
page's source.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from qbrec.catalog.importers import values
from qbrec.catalog.importers.dataset import INTERACTIONS, Dataset, Part, Tally
from qbrec.catalog.importers.records import Record, read_json_columns, read_json_lines
from qbrec.catalog.importers.source import Moved, find_source

_REVIEWS = pa.schema(
    [
        ("reviewerID", pa.string()), ("asin", pa.string()), ("unixReviewTime", pa.int64()),
        ("overall", pa.float64()),
    ]
)  # fmt: skip
ONLY_ID = pa.schema([("item_id", pa.string())])  # of items, where no metadata is given
_SCRIPT = "getTime()"  # what the data set's own page tells unformatted titles by


def amazon_2018(
    *,
    reviews: Sequence[str],
    metadata: Sequence[str] = (),
    images: bool = True,
    keep_html: bool = False,
    also_buy: bool = False,
) -> Dataset:
    """The data set from its files.

    Args:
        reviews: Files or URLs of reviews.
        metadata: Files or URLs of metadata.
        images: Write the address of each item's picture as `image_path`.
        keep_html: Leave tags, entities and white space in texts.
        also_buy: Carry `also_buy` along (lists of asins).

    Raises:
        DataError: A file is not there.
    """
    further = [pa.field("also_buy", pa.list_(pa.string()))] if also_buy else []
    schema = item_schema(further, images=images)
    review_files = tuple(map(find_source, reviews))
    metadata_files = tuple(map(find_source, metadata))

    def interactions(tally: Tally, moved: Moved) -> Iterator[pa.Table]:
        for table in read_json_columns(review_files, _REVIEWS, _review, tally, moved, what="interactions"):
            yield table.rename_columns(INTERACTIONS.names)

    def items(tally: Tally, moved: Moved) -> Iterator[pa.Table]:
        def convert(record: Record) -> Record:
            return _item(record, tally, clean=not keep_html)

        return read_json_lines(metadata_files, schema, convert, tally, moved, what="metadata")

    return Dataset(
        name="amazon-2018",
        interactions=Part(review_files, interactions),
        ticks_per_second=1,
        items=Part(metadata_files, items) if metadata_files else None,
        item_schema=schema if metadata_files else ONLY_ID,
        options={"images": images, "keep_html": keep_html, "also_buy": also_buy},
    )


def item_schema(further: Sequence[pa.Field], *, images: bool) -> pa.Schema:
    """Columns of items in the sets of all years, with a picture's address if asked for, and further ones."""
    fields = [*ONLY_ID, pa.field("title", pa.string()), pa.field("description", pa.string())]
    fields += [pa.field("brand", pa.string()), pa.field("categories", pa.list_(pa.string()))]
    fields += [pa.field("image_path", pa.string())] if images else []
    fields += [pa.field("price", pa.float64()), pa.field("features", pa.list_(pa.string()))]
    return pa.schema([*fields, *further])


def _review(record: Record) -> Record:
    return {
        "reviewerID": values.identifier(record.get("reviewerID")),
        "asin": values.identifier(record.get("asin")),
        "unixReviewTime": values.integer(record.get("unixReviewTime")),
        "overall": values.number(record.get("overall")),
    }


def _item(record: Record, tally: Tally, *, clean: bool) -> Record:
    title = values.text(record.get("title"), clean=clean)
    if title is not None and _SCRIPT in title:
        tally.noted["titles that are page source, left empty"] += 1
        title = None
    return {
        "item_id": values.identifier(record.get("asin")),
        "title": title,
        "description": values.text(record.get("description"), clean=clean),
        "brand": values.text(record.get("brand"), clean=clean),
        "categories": values.texts(_path(record), clean=clean),
        # 2018: a list of addresses in two sizes; 2014: one.
        "image_path": values.address(
            [record.get("imageURLHighRes"), record.get("imageURL"), record.get("imUrl")]
        ),
        "price": values.price(record.get("price")),
        "features": values.texts(record.get("feature"), clean=clean),
        "also_buy": values.texts(record.get("also_buy"), clean=False),
    }


def _path(record: Record) -> Any:
    """Category path: `category`, in 2014 the longest of `categories`."""
    if "category" in record:
        return record["category"]
    paths = record.get("categories")
    if not isinstance(paths, list):
        return None
    return max((path for path in paths if isinstance(path, list)), key=len, default=None)
