"""Bad rows: kept with their reason, counted, and fatal past `catalog.max_rejected_fraction`."""

from __future__ import annotations

import io
from collections import Counter

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qbrec.catalog.contract import Domain
from qbrec.errors import DataError
from qbrec.storage.artifact import ArtifactWriter

ITEMS = pa.schema(
    [
        ("domain", pa.int32()), ("file", pa.int32()), ("row", pa.int64()), ("item_id", pa.string()),
        ("reason", pa.string()),
    ]
)  # fmt: skip
INTERACTIONS = pa.schema(
    [
        ("domain", pa.int32()), ("file", pa.int32()), ("row", pa.int64()), ("user_id", pa.string()),
        ("item_id", pa.string()), ("reason", pa.string()),
    ]
)  # fmt: skip

_REMEDIES = {
    "is null": "give every row an id and a timestamp, or remove such rows",
    "is empty": "give every row an id, or remove such rows",
    "is not among the items": "add the item to the items, or remove its interactions",
    "belongs to a rejected item": "mend the item first: see rejected/items.parquet",
    "cannot be decoded": "replace the picture by a PNG or JPEG file, or by null",
    "has more pixels than catalog.image.max_pixels": "scale the picture down, or raise that limit",
    "has a wrong length": "give all vectors of the column the same length, or null",
    "holds NaN or a number beyond float16": "replace the vector by null or by finite numbers below 65504",
    "is a URL": "download the picture and name the local file: nothing is fetched from the network",
    "lies outside catalog.image.roots": "move the picture into an allowed folder, or allow its folder",
    "cannot be read": "check that the picture is there and may be read",
}


def pack(table: pa.Table) -> bytes:
    """A small table as Arrow IPC bytes, to travel inside a summary row."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def unpack(parts: list[bytes], schema: pa.Schema) -> pa.Table:
    """All packed tables as one, ordered by domain, file and row."""
    tables = [pa.ipc.open_stream(part).read_all() for part in parts]
    table = pa.concat_tables([schema.empty_table(), *tables])
    return table.sort_by([(name, "ascending") for name in ("domain", "file", "row")])


def settle(
    writer: ArtifactWriter, table: pa.Table, *, role: str, domains: list[Domain], max_fraction: float
) -> dict[str, int]:
    """Write `rejected/<role>.parquet` and decide whether the run may go on.

    Args:
        writer: Artifact under construction.
        table: The rejected rows (`ITEMS` or `INTERACTIONS`).
        role: `items` or `interactions`.
        domains: All domains; the fraction is taken of each one's own rows.
        max_fraction: `catalog.max_rejected_fraction`.

    Returns:
        Rows by reason.

    Raises:
        DataError: A domain has more bad rows than allowed; names the first of them.
    """
    names = pa.array([domain.name for domain in domains])
    paths = [pc.cast(pa.array([f.path for f in getattr(domain, role)]), pa.string()) for domain in domains]
    columns = {name: table[name] for name in table.schema.names}
    columns["domain"] = names.take(table["domain"])
    files = zip(table["domain"].to_pylist(), table["file"].to_pylist(), strict=True)
    columns["file"] = pa.array([paths[domain][file].as_py() for domain, file in files], pa.string())
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    path = writer.write_bytes(f"rejected/{role}.parquet", sink.getvalue())
    for domain in domains:
        bad = table.filter(pc.equal(table["domain"], domain.number))
        total = getattr(domain, f"{role.removesuffix('s')}_rows")
        if bad.num_rows > max_fraction * total:
            row = bad.slice(0, 1).to_pylist()[0]
            counts = Counter(bad["reason"].to_pylist()).most_common()
            listed = "; ".join(f"{count} × {reason}" for reason, count in counts)
            column, _, what = row["reason"].partition(": ")
            value = f" {row[column]!r}" if row.get(column) else ""
            raise DataError(
                f"{bad.num_rows} of {total} rows of {role} in domain {domain.name!r} are bad ({listed}): "
                f"more than catalog.max_rejected_fraction = {max_fraction:g} allows",
                where=f"{paths[domain.number][row['file']]}, row {row['row']} (from 0), "
                f"{column}{value}: {what}",
                fix=f"{_REMEDIES[what]}; all of them are listed in {path}",
            )
    return dict(Counter(table["reason"].to_pylist()))
