"""Small files in the formats that are imported, and a server that drops connections."""

from __future__ import annotations

import gzip
import http.server
import json
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from qbrec.catalog.importers.dataset import Dataset
from qbrec.catalog.importers.run import ImportOptions, Summary, import_dataset


def write_lines(path: Path, lines: Iterable[Any], *, encoding: str = "utf-8") -> str:
    """One JSON object or ready-made line (str, bytes) a line; gzip where the name says so."""

    def encoded(line: Any) -> bytes:
        if isinstance(line, bytes):
            return line
        return (line if isinstance(line, str) else json.dumps(line)).encode(encoding)

    raw = b"".join(encoded(line) + b"\n" for line in lines)
    path.write_bytes(gzip.compress(raw, 1) if path.suffix == ".gz" else raw)
    return str(path)


def review_2018(user: Any, item: Any, time: Any, rating: Any = 5.0) -> dict[str, Any]:
    """A line of reviews as in the 5-core of 2018."""
    return {
        "overall": rating, "verified": True, "reviewTime": "09 1, 2016", "reviewerID": user, "asin": item,
        "style": {"Size:": " Large"}, "reviewerName": "A Name", "summary": "Five Stars",
        "reviewText": 'As {"expected"}\nand \u00e9 more.', "unixReviewTime": time,
    }  # fmt: skip


def review_2023(user: Any, item: Any, time: Any, rating: Any = 5.0) -> dict[str, Any]:
    """A line of reviews as in the set of 2023; time in milliseconds."""
    return {
        "rating": rating, "title": "Five Stars", "text": "As expected", "images": [], "asin": f"V{item}",
        "parent_asin": item, "user_id": user, "timestamp": time, "helpful_vote": 0, "verified_purchase": True,
    }  # fmt: skip


def run(dataset: Dataset, out: Path, *, force: bool = False, **options: Any) -> Summary:
    """Import without progress; every row read has to be accounted for."""
    summary = import_dataset(dataset, out=out, options=ImportOptions(**options), force=force, silent=True)
    record = summary.record
    assert record == json.loads((out / "import.json").read_text())
    for what, written in (
        ("interactions", record["written"]["interactions"]),
        ("metadata", record["written"]["items"] - record["noted"].get("items without metadata", 0)),
    ):
        left_out = sum(n for reason, n in record["left_out"].items() if reason.startswith(what))
        assert record["read"].get(what, 0) == written + left_out
    events, items = interactions_of(summary), items_of(summary)
    assert len(events) == record["written"]["interactions"]
    assert len(items) == record["written"]["items"]
    assert len({event[0] for event in events}) == record["written"]["users"]
    assert sorted(path.name for path in out.iterdir()) == [
        "import.json",
        "interactions.parquet",
        "items.parquet",
    ]
    return summary


def interactions_of(summary: Summary) -> list[tuple[str, str, int]]:
    """(user, item, microseconds), sorted."""
    table = pq.read_table(summary.interactions)
    times = table["timestamp"].cast(pa.int64()).to_pylist()
    return sorted(zip(table["user_id"].to_pylist(), table["item_id"].to_pylist(), times, strict=True))


def items_of(summary: Summary) -> dict[str, dict[str, Any]]:
    """Row by item id; ids are unique."""
    rows = pq.read_table(summary.items).to_pylist()
    found = {row.pop("item_id"): row for row in rows}
    assert len(found) == len(rows)
    return found


@dataclass
class Faults:
    """What the server does, and what it saw.

    Attributes:
        cut_after: Bytes after which an answer ends, while there are `cuts` left.
        ranges: Whether range requests are honoured.
        seen: `Range` headers of the requests, in order.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    cut_after: int = 0
    cuts: int = 0
    errors: int = 0
    ranges: bool = True
    etag: str = '"one"'
    etag_after_cut: str | None = None
    seen: list[str | None] = field(default_factory=list)


@contextmanager
def flaky_server(faults: Faults) -> Iterator[str]:
    """An HTTP server on this machine with planned faults; yields its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            faults.seen.append(self.headers["Range"])
            if faults.errors:
                faults.errors -= 1
                self.send_error(503)
                return
            data = faults.files.get(self.path.lstrip("/"))
            if data is None:
                self.send_error(404)
                return
            same = self.headers["If-Range"] in (None, faults.etag)
            begin = 0
            if self.headers["Range"] and faults.ranges and same:
                begin = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(len(data) - begin))
            self.send_header("ETag", faults.etag)
            part = data[begin:]
            # Before the client hears of it, and plans other faults.
            if faults.cuts and len(part) > faults.cut_after:
                faults.cuts -= 1
                faults.etag = faults.etag_after_cut or faults.etag
                part = part[: faults.cut_after]
                self.close_connection = True
            self.end_headers()
            try:
                self.wfile.write(part)
            except OSError:
                self.close_connection = True

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
