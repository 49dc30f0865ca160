"""Small pictures of the few items that a page shows, taken from the files that the items came in."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from qbrec.catalog.contract import ITEM_COLUMNS
from qbrec.catalog.encoders.fetch import PictureReader
from qbrec.catalog.encoders.fields import strings
from qbrec.catalog.encoders.image import BadImageError, open_picture
from qbrec.catalog.sources import list_files, open_parquet
from qbrec.catalog.units import cut_file, read_unit
from qbrec.config import RootConfig
from qbrec.config.sections import ImageConfig
from qbrec.errors import DataError
from qbrec.storage.catalog_view import CatalogView

SIDE = 64  # pixels of the longer side
MAX_BYTES = 300_000  # of all pictures on a page, as they stand in it
_QUALITY = 60  # a kilobyte or two each
_COLUMNS = ("image", "image_path")
_TIMEOUT_S = 10.0  # for one picture from elsewhere
_ID_ROWS, _PICTURE_ROWS = 65_536, 64  # held at a time


@dataclass(frozen=True)
class Thumbnails:
    """Pictures as data URIs by item row, and in words what is missing of them."""

    uris: Mapping[int, str] = field(default_factory=dict)
    note: str = ""

    def of(self, row: int) -> str | None:
        """The picture of an item; empty where it has none, None where no item has one."""
        return self.uris.get(row, "") if self.uris else None


def thumbnails(
    config: RootConfig, catalog: CatalogView, rows: Sequence[int], *, max_bytes: int = MAX_BYTES
) -> Thumbnails:
    """Read, shrink and encode the first picture of items.

    A report is worth more than its pictures: one that cannot be had is counted, never an error.

    Args:
        config: Where the items came from, and which places pictures may be read from.
        catalog: The catalogue.
        rows: Item rows as the page shows them; one that is shown twice is there twice.
        max_bytes: Of all data URIs together; the last rows go without.
    """
    uses = Counter(rows)
    found, problems = _read(config, catalog, list(uses))
    uris: dict[int, str] = {}
    size = 0
    for row, times in uses.items():
        if row not in found:
            continue
        try:
            uri = _encode(found[row], config.catalog.image)
        except BadImageError as error:
            problems[str(error)] += 1
            continue
        if size + times * len(uri) > max_bytes:
            problems["is beyond what a page may carry"] += 1
            continue
        size += times * len(uri)
        uris[row] = uri
    told = "; ".join(f"{count:,} × {why.rstrip('.')}" for why, count in problems.items())
    return Thumbnails(uris, f"Pictures left out: {told}." if told else "")


def _read(
    config: RootConfig, catalog: CatalogView, rows: Sequence[int]
) -> tuple[dict[int, bytes], Counter[str]]:
    """Encoded pictures by row as they came, and why some could not be read."""
    problems: Counter[str] = Counter()
    values: dict[int, bytes | str] = {}
    rows_of: dict[str, dict[str, int]] = {}
    for row, item_id in zip(rows, catalog.item_ids(rows), strict=True):
        rows_of.setdefault(catalog.domains[catalog.item_domain[row]], {})[item_id] = row
    for domain, row_of in rows_of.items():
        source = config.data.domains.get(domain)
        if source is None:
            problems["is of a domain that the configuration does not name"] += len(row_of)
            continue
        try:
            for item_id, value in _values(source.items, set(row_of), where=f"data.domains.{domain}.items"):
                values[row_of[item_id]] = value
        except DataError as error:
            problems[error.what] += sum(row not in values for row in row_of.values())
    found = {row: value for row, value in values.items() if isinstance(value, bytes)}
    for row in [row for row, value in found.items() if len(value) > config.catalog.image.max_bytes]:
        del found[row]
        problems["has more bytes than catalog.image.max_bytes"] += 1
    places = {row: value for row, value in values.items() if isinstance(value, str)}
    if places:
        for row, read in zip(places, _fetched(list(places.values()), config.catalog.image), strict=True):
            if isinstance(read, BadImageError):
                problems[str(read)] += 1
            else:
                found[row] = read
    return found, problems


def _fetched(places: list[str], config: ImageConfig) -> list[bytes | BadImageError]:
    """Pictures by path or URL. A report is not worth waiting for: one try each, all at once, and briefly."""
    timeout = min(config.total_timeout_s, _TIMEOUT_S)
    hurried = config.model_copy(update={"retries": 0, "total_timeout_s": timeout})
    return PictureReader(hurried).map(places, bytes)


def _values(place: str, wanted: set[str], *, where: str) -> Iterator[tuple[str, bytes | str]]:
    """First picture, or its place, of those items that have one.

    Ids are read everywhere, pictures only from the row groups that hold somebody wanted, some at a time: a
    catalogue's pictures may be a thousand times larger than its ids.
    """
    left = set(wanted)
    for file in list_files(place, where=where):
        parquet = open_parquet(file.path)
        schema = parquet.schema_arrow
        column = next((name for name in _COLUMNS if name in schema.names), None)
        for name in ("item_id", column):
            if name and not (name in schema.names and ITEM_COLUMNS[name][1](schema.field(name).type)):
                raise DataError(f"the column {name} is missing now, or of another type", where=file.path)
        for group in cut_file(file.path, parquet.metadata, unit_rows=max(parquet.metadata.num_rows, 1)):
            if not left:
                return
            batches = read_unit(group, ["item_id"], batch_rows=_ID_ROWS)
            here = {i for _, batch in batches for i in _hits(batch, left)["item_id"].to_pylist()}
            left -= here
            if column is None or not here:
                continue
            for _, batch in read_unit(group, ["item_id", column], batch_rows=_PICTURE_ROWS):
                table = _hits(batch, here)
                for item_id, value in zip(
                    table["item_id"].to_pylist(), table[column].to_pylist(), strict=True
                ):
                    here.discard(item_id)
                    several = value if isinstance(value, list) else [value]
                    first = next((one for one in several if one), None)
                    if first is not None:
                        yield item_id, first
                if not here:
                    break


def _hits(batch: pa.Table, wanted: set[str]) -> pa.Table:
    ids = strings(batch, "item_id")
    place = batch.schema.get_field_index("item_id")
    return batch.set_column(place, "item_id", ids).filter(pc.is_in(ids, pa.array(sorted(wanted), ids.type)))


def _encode(data: bytes, config: ImageConfig) -> str:
    """Drawn anew, so that nothing of the file but its pixels gets into the page."""
    picture = open_picture(data, max_pixels=config.max_pixels, side=SIDE)
    picture.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=_QUALITY, method=6)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
