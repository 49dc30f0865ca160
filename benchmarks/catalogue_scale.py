"""The catalogue stage at scale: items with 128-d float16 embeddings and interactions, Parquet to block tars.

Runs a fifth of the size first, then the size itself, each in a process of its own with a Ray of its own, and
prints seconds, rates and the peak memory of all their processes together (proportional set size, so that
shared pages count once; the object store and mapped files are in it). The last line is JSON.

    python benchmarks/catalogue_scale.py [--items 5000000] [--interactions 50000000] [--folder /tmp]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

WIDTH, CHUNK = 128, 1 << 20


def ids(prefix: str, numbers: np.ndarray) -> pa.Array:
    return pc.binary_join_element_wise(prefix, pc.utf8_lpad(pa.array(numbers).cast(pa.string()), 9, "0"), "")


def write_items(path: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    kind = pa.list_(pa.float16(), WIDTH)
    schema = pa.schema([("item_id", pa.string()), ("title", pa.string()), ("text_embedding", kind)])
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as out:
        for begin in range(0, count, CHUNK // 8):
            numbers = np.arange(begin, min(begin + CHUNK // 8, count))
            values = rng.standard_normal((len(numbers), WIDTH), dtype=np.float32).astype(np.float16)
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), WIDTH)
            columns = [ids("item", numbers), ids("An article of the number ", numbers), vectors]
            out.write_table(pa.table(columns, schema=schema))


def write_interactions(path: Path, count: int, num_items: int, num_users: int) -> None:
    rng = np.random.default_rng(1)
    schema = pa.schema([("user_id", pa.string()), ("item_id", pa.string()), ("timestamp", pa.int64())])
    with pq.ParquetWriter(path, schema, compression="snappy") as out:
        for begin in range(0, count, CHUNK):
            n = min(CHUNK, count - begin)
            items = (num_items * rng.random(n) ** 2).astype(np.int64)  # low numbers are popular
            users = (num_users * rng.random(n) ** 1.5).astype(np.int64)
            times = rng.integers(1_500_000_000, 1_700_000_000, n)
            out.write_table(pa.table([ids("user", users), ids("item", items), times], schema=schema))


def build(folder: Path) -> dict[str, float]:
    """The catalogue stage on a Ray of its own; seconds of its parts."""
    from qbrec.catalog.build_histories import build_histories
    from qbrec.catalog.build_items import build_items
    from qbrec.catalog.contract import read_contract
    from qbrec.catalog.duplicates.near_duplicates import build_near_duplicates
    from qbrec.config import parse_config
    from qbrec.engine.context import StageContext
    from qbrec.engine.ray_data import ray_errors
    from qbrec.engine.ray_session import ensure_ray
    from qbrec.storage.artifact import ArtifactStore

    places = {role: str(folder / f"{role}.parquet") for role in ("items", "interactions")}
    config = parse_config({"data": {"domains": {"shop": places}}})
    ctx = StageContext.local(ArtifactStore(folder / "out"), folder / "out" / "run", stage="catalog")
    ensure_ray(config.compute)
    domains = read_contract(config.data, config.catalog)
    writer = ctx.writer()
    begin = time.perf_counter()
    with ray_errors("catalog"):
        items = build_items(ctx, config, domains, writer)
        middle = time.perf_counter()
        _, facts = build_histories(ctx, config, domains, writer, items)
        end = time.perf_counter()
        facts |= build_near_duplicates(
            ctx, config, writer, domains=["shop"], num_interactions=facts["num_interactions"]
        )
    compared = time.perf_counter()
    ctx.commit(writer, meta=items.meta | facts, inputs={})
    return {
        "items_s": middle - begin,
        "interactions_s": end - middle,
        "compare_s": compared - end,
        "commit_s": time.perf_counter() - compared,
    }


class PeakMemory:
    """Watches the memory of a process and all its descendants; GB, proportional set size."""

    def __init__(self, pid: int) -> None:
        self.pid, self.peak, self._stop = pid, 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def close(self) -> float:
        self._stop.set()
        self._thread.join()
        return self.peak

    def _watch(self) -> None:
        while not self._stop.wait(0.5):
            self.peak = max(self.peak, sum(map(_pss, _family(self.pid))) / 1e6)


def _family(root: int) -> list[int]:
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = Path("/proc", entry, "stat").read_text()
            except OSError:
                continue
            parents[int(entry)] = int(stat.rpartition(")")[2].split()[1])
    found, grew = {root}, True
    while grew:
        more = {pid for pid, parent in parents.items() if parent in found} - found
        grew = bool(more)
        found |= more
    return sorted(found)


def _pss(pid: int) -> int:
    """Kilobytes of one process."""
    try:
        for line in Path("/proc", str(pid), "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1])
    except OSError:
        pass
    return 0


def measure(items: int, interactions: int, place: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="qbrec-scale-", dir=place) as name:
        folder = Path(name)
        write_items(folder / "items.parquet", items)
        write_interactions(folder / "interactions.parquet", interactions, items, max(interactions // 10, 1))
        script = "import sys, json, pathlib; sys.path.insert(0, sys.argv[1]); import catalogue_scale as c; "
        script += "print(json.dumps(c.build(pathlib.Path(sys.argv[2]))))"
        command = [sys.executable, "-c", script, str(Path(__file__).parent), str(folder)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        memory = PeakMemory(process.pid)
        output, _ = process.communicate()
        peak = memory.close()
        if process.returncode:
            raise SystemExit(f"the catalogue stage failed with exit code {process.returncode}")
        result: dict[str, Any] = json.loads(output.splitlines()[-1])
        size = sum(path.stat().st_size for path in (folder / "out").rglob("*.tar")) / 1e9
    result |= {"items": items, "interactions": interactions, "peak_gb": peak}
    print(
        f"{items:>12,} items in {result['items_s']:7.1f} s   {interactions:>12,} interactions in "
        f"{result['interactions_s']:7.1f} s   near-duplicates {result['compare_s']:5.1f} s   "
        f"hashing and manifest {result['commit_s']:5.1f} s   "
        f"peak {peak:5.2f} GB   {size:.2f} GB of tars",
        flush=True,
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=5_000_000)
    parser.add_argument("--interactions", type=int, default=50_000_000)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    arguments = parser.parse_args()
    part = measure(arguments.items // 5, arguments.interactions // 5, arguments.folder)
    whole = measure(arguments.items, arguments.interactions, arguments.folder)
    for what in ("items", "interactions"):
        growth = whole[f"{what}_s"] / part[f"{what}_s"]
        print(f"five times the {what}: {growth:.2f} times the seconds")
    print(
        json.dumps(
            {
                "items_per_s": round(whole["items"] / whole["items_s"]),
                "interactions_per_s": round(whole["interactions"] / whole["interactions_s"]),
                "peak_gb": round(whole["peak_gb"], 2),
            }
        )
    )


if __name__ == "__main__":
    main()
