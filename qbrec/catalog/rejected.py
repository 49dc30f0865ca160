"""Bad rows: kept with their reason, counted, and fatal past `catalog.max_rejected_fraction`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from qbrec.catalog import parts
from qbrec.catalog.contract import Domain
from qbrec.errors import DataError
from qbrec.storage.hashing import hash64

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
    "lies outside catalog.image.roots": "move the picture into an allowed place, or allow its place",
    "cannot be read": "check that the picture is there and may be read",
    "has more bytes than catalog.image.max_bytes": "store the picture smaller, or raise that limit",
    "has a scheme that is not allowed": "name a local path, s3://, gs://, http:// or https://",
    "is not a usable URL": "write http(s)://host/path, without a user name and on the usual port",
    "names a host that is not in catalog.image.hosts": "allow the host there, or download its pictures first",
    "names a host that is not known": "correct the address, or replace it by null",
    "leads to an address that is not public": "download the picture and name the local file",
    "comes from a server whose certificate is not trusted": "download the picture and name the local file",
    "is redirected from https to http": "name the address it leads to, if that may be trusted",
    "redirects too often": "name the address it leads to in the end",
    "is not found by its server": "correct the address, or replace it by null",
    "is refused by its server": "check that the picture may be fetched without logging in",
    "could not be fetched: its server fails or is too slow": "run again later, raise retries or "
    "total_timeout_s in catalog.image, or download the pictures first",
}


def interactions(table: pa.Table, reasons: pa.Array, domain: int, file: int, first_row: int) -> pa.Table:
    """The bad rows of a batch of interactions (`INTERACTIONS`), with their place and reason."""
    n = table.num_rows
    columns = {
        "domain": np.full(n, domain, np.int32),
        "file": np.full(n, file, np.int32),
        "row": np.arange(first_row, first_row + n, dtype=np.int64),
        "user_id": table["user_id"].cast(pa.string()),
        "item_id": table["item_id"].cast(pa.string()),
        "reason": reasons,
    }
    return pa.table(columns, schema=INTERACTIONS).filter(reasons.is_valid())


def write_part(directory: Path, role: str, number: int, table: pa.Table) -> None:
    """Write the bad rows of one unit of input, for `settle`."""
    (directory / "rejected").mkdir(exist_ok=True)
    parts.write_part(table, directory / "rejected" / f"{role}.part-{number:06d}.tmp")


def item_hashes(directory: Path) -> NDArray[np.uint64]:
    """Sorted hashes of the items in `rejected/items.parquet` that have an id."""
    table = pq.read_table(directory / "rejected" / "items.parquet", columns=["domain", "item_id"])
    found = [np.zeros(0, np.uint64)]
    for domain in table["domain"].unique().to_pylist():
        ids = table.filter(pc.equal(table["domain"], domain))["item_id"].drop_null()
        found.append(hash64(domain, ids.to_pylist()))
    return np.sort(np.concatenate(found))


def settle(directory: Path, *, role: str, domains: list[Domain], max_fraction: float) -> dict[str, int]:
    """Join the parts to `rejected/<role>.parquet`, a batch at a time, and decide whether the run may go on.

    Args:
        directory: Artifact under construction.
        role: `items`, `interactions`, or `pictures` that items go without.
        domains: All domains; the fraction is taken of each one's own rows.
        max_fraction: `catalog.max_rejected_fraction`.

    Returns:
        Rows by reason.

    Raises:
        DataError: A domain has more bad rows than allowed; names the first of them.
    """
    names = pa.array([domain.name for domain in domains])
    source = "interactions" if role == "interactions" else "items"
    paths = [[file.path for file in getattr(domain, source)] for domain in domains]
    counts: Counter[tuple[int, str]] = Counter()
    first: dict[int, dict[str, Any]] = {}
    schema = ITEMS if source == "items" else INTERACTIONS
    target = directory / "rejected" / f"{role}.parquet"
    target.parent.mkdir(exist_ok=True)
    for index, name in enumerate(("domain", "file")):
        schema = schema.set(index, pa.field(name, pa.string()))
    with pq.ParquetWriter(target, schema) as out:
        for table in parts.read_parts(target.parent, role):  # by unit, hence by domain, file and row
            keys = zip(table["domain"].to_pylist(), table["reason"].to_pylist(), strict=True)
            counts.update(keys)
            (number,) = table["domain"].unique().to_pylist()
            first.setdefault(number, table.slice(0, 1).to_pylist()[0])
            files = pa.array(paths[number], pa.string()).take(table["file"].combine_chunks())
            out.write_table(
                table.set_column(0, "domain", names.take(table["domain"].combine_chunks())).set_column(
                    1, "file", files
                )
            )
    for domain in domains:
        total = getattr(domain, f"{source.removesuffix('s')}_rows")
        mine = Counter({reason: n for (number, reason), n in counts.items() if number == domain.number})
        if mine.total() > max_fraction * total:
            row = first[domain.number]
            listed = "; ".join(f"{count} × {reason}" for reason, count in mine.most_common())
            column, _, what = row["reason"].partition(": ")
            value = f" {row[column]!r}" if row.get(column) else ""
            raise DataError(
                f"{mine.total()} of {total} rows of {role} in domain {domain.name!r} are bad ({listed}): "
                f"more than catalog.max_rejected_fraction = {max_fraction:g} allows",
                where=f"{paths[domain.number][row['file']]}, row {row['row']} (from 0), "
                f"{column}{value}: {what}",
                fix=f"{_REMEDIES[what]}; all of them are listed in {target}",
            )
    by_reason: Counter[str] = Counter()
    for (_, reason), count in counts.items():
        by_reason[reason] += count
    return dict(by_reason)
