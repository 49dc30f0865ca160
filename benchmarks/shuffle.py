"""Grouping interactions by user: our exchange on Ray tasks beside Ray Data's hash shuffle, in one sitting.

Both begin with the same blocks in the object store and end with every partition's rows in one task. Rounds
are interleaved, medians compared; the last line is JSON (Ray Data's seconds / ours).

    python benchmarks/shuffle.py [--rows 10000000] [--partitions 8] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import numpy as np
import pyarrow as pa

from qbrec.catalog.exchange import exchange, range_of, reduce, split_by
from qbrec.config.sections import ComputeConfig
from qbrec.engine.ray_data import ray_errors
from qbrec.engine.ray_session import ensure_ray

BLOCK = 1 << 20


def make_block(number: int, rows: int, partitions: int) -> pa.Table:
    rng = np.random.default_rng(number)
    user = rng.integers(0, 2**64, rows, dtype=np.uint64)
    return pa.table(
        {
            "user": user,
            "item": rng.integers(0, 1_000_000, rows),
            "time": rng.integers(0, 2_000_000_000, rows),
            "partition": range_of(user, partitions),
        }
    )


def digest(rows: int, users: np.ndarray) -> dict[str, Any]:
    """What both must agree on: the rows of a partition and a sum over its users."""
    return {"rows": rows, "sum": int(users.sum(dtype=np.uint64))}


def ours(refs: list[Any], partitions: int) -> list[dict[str, Any]]:
    def split(blocks: list[pa.Table]) -> tuple[list[pa.Table], None]:
        table = pa.concat_tables(blocks)
        return split_by(table, np.asarray(table["partition"]), partitions), None

    def work(_number: int, tables: list[pa.Table]) -> dict[str, Any]:
        table = pa.concat_tables(tables)
        return digest(table.num_rows, np.asarray(table["user"], dtype=np.uint64))

    return list(reduce(exchange(refs, split, partitions=partitions), work))


def ray_data(refs: list[Any], partitions: int) -> list[dict[str, Any]]:
    import ray.data

    def work(table: pa.Table) -> pa.Table:
        found = digest(table.num_rows, np.asarray(table["user"], dtype=np.uint64))
        row = found | {"partition": table["partition"][0].as_py()}
        return pa.table({"row": [json.dumps(row)]})

    grouped = ray.data.from_arrow_refs(refs).groupby("partition", num_partitions=partitions)
    found = [json.loads(r["row"]) for r in grouped.map_groups(work, batch_format="pyarrow").iter_rows()]
    return [
        {"rows": row["rows"], "sum": row["sum"]} for row in sorted(found, key=lambda row: row["partition"])
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--partitions", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    import ray

    ensure_ray(ComputeConfig())
    sizes = [min(BLOCK, arguments.rows - begin) for begin in range(0, arguments.rows, BLOCK)]
    refs = [ray.put(make_block(number, size, arguments.partitions)) for number, size in enumerate(sizes)]
    seconds: dict[str, list[float]] = {"ours": [], "ray_data": []}
    with ray_errors("catalog"):
        for turn in range(arguments.rounds + 1):  # the first turn starts workers and does not count
            answers = []
            for name, work in (("ours", ours), ("ray_data", ray_data)):
                begin = time.perf_counter()
                answers.append(work(refs, arguments.partitions))
                seconds[name] += [time.perf_counter() - begin] if turn else []
            assert answers[0] == answers[1]
    middle = {name: statistics.median(times) for name, times in seconds.items()}
    for name, value in middle.items():
        print(f"{name:10} {value:7.2f} s   {arguments.rows / value:14,.0f} rows/s")
    print(json.dumps({"exchange_vs_ray_data": round(middle["ray_data"] / middle["ours"], 2)}))


if __name__ == "__main__":
    main()
