"""Items on disk: our block tars beside per-item WebDataset, Parquet and plain npy, in one sitting.

Every reader ends at the same place: contiguous batches of 512 items in memory (two float16 vectors of 768,
id, category, brand). Rounds are interleaved and medians compared, so that a machine that drifts does so for
all. The block tars are flushed to the disk while they are written, the rivals' files are not. Ratios are the
rival's time / ours; the last line is JSON.

    python benchmarks/shards.py [--items 20000] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import webdataset as wds

from qbrec.storage.blocks import BlockSet, BlockTarWriter, write_block_index
from qbrec.storage.loader import BatchLoader

WIDTH, BATCH, BLOCK, ROW_GROUP = 768, 512, 512, 4096
VECTORS, SCALARS = ("text", "image"), ("id", "category", "brand")
FIELDS = VECTORS + SCALARS
Items = dict[str, Any]


def make_items(count: int) -> Items:
    rng = np.random.default_rng(0)
    items: Items = {
        name: rng.standard_normal((count, WIDTH), dtype=np.float32).astype(np.float16) for name in VECTORS
    }
    items["id"] = np.arange(count)
    items["category"] = rng.integers(0, 5000, count).astype(np.int32)
    items["brand"] = rng.integers(0, 90_000, count).astype(np.int32)
    return items


def write_ours(items: Items, root: Path) -> None:
    writer = BlockTarWriter(root, prefix="items")
    for begin in range(0, len(items["id"]), BLOCK):
        part = {name: items[name][begin : begin + BLOCK] for name in FIELDS}
        writer.add(part, len(part["id"]))
    write_block_index(root / "blocks.items.npy", [writer.close()])


def write_webdataset(items: Items, root: Path) -> None:
    with wds.TarWriter(str(root / "items.tar")) as sink:
        for i in range(len(items["id"])):
            meta = {name: int(items[name][i]) for name in SCALARS}
            vectors = {f"{name}.npy": items[name][i] for name in VECTORS}
            sink.write({"__key__": f"{i:012d}", **vectors, "meta.json": meta})


def write_parquet(items: Items, root: Path) -> None:
    columns: dict[str, Any] = {name: pa.array(items[name]) for name in SCALARS}
    for name in VECTORS:
        buffers = [None, pa.py_buffer(items[name])]
        columns[name] = pa.FixedSizeBinaryArray.from_buffers(pa.binary(2 * WIDTH), len(items[name]), buffers)
    pq.write_table(
        pa.table(columns),
        root / "items.parquet",
        compression="none",
        use_dictionary=False,
        row_group_size=ROW_GROUP,
    )


def write_npy(items: Items, root: Path) -> None:
    for name in FIELDS:
        np.save(root / f"{name}.npy", items[name])


def read_ours(root: Path) -> Iterator[Items]:
    blocks = BlockSet.open(root, "items")
    for begin in range(0, blocks.num_samples, BATCH):
        end = min(begin + BATCH, blocks.num_samples)
        yield {name: blocks.column(name, begin, end) for name in FIELDS}


def read_ours_shuffled(root: Path) -> Iterator[Items]:
    blocks = BlockSet.open(root, "items")
    loader = BatchLoader(
        blocks,
        batch_size=BATCH,
        micro_batch=BATCH,
        seed=0,
        rank=0,
        world=1,
        collate=lambda fields, *_: fields,
        fields=FIELDS,
    )
    for (batch,) in loader.iterate():
        assert batch is not None
        yield {name: batch[name] for name in FIELDS}


def read_webdataset(root: Path) -> Iterator[Items]:
    samples: Iterator[Items] = iter(wds.WebDataset(str(root / "items.tar"), shardshuffle=False).decode())
    while batch := [sample for _, sample in zip(range(BATCH), samples, strict=False)]:
        scalars = [sample["meta.json"] for sample in batch]
        items: Items = {name: np.stack([sample[f"{name}.npy"] for sample in batch]) for name in VECTORS}
        yield items | {name: np.array([values[name] for values in scalars]) for name in SCALARS}


def read_parquet(root: Path) -> Iterator[Items]:
    file = pq.ParquetFile(root / "items.parquet", memory_map=True)
    for batch in file.iter_batches(batch_size=BATCH, columns=list(FIELDS)):
        items: Items = {name: batch.column(name).to_numpy().copy() for name in SCALARS}
        for name in VECTORS:
            column = batch.column(name)
            flat = np.frombuffer(
                column.buffers()[1], np.float16, len(column) * WIDTH, 2 * column.offset * WIDTH
            )
            items[name] = flat.reshape(-1, WIDTH).copy()
        yield items


def read_npy(root: Path) -> Iterator[Items]:
    arrays = {name: np.load(root / f"{name}.npy", mmap_mode="r") for name in FIELDS}
    for begin in range(0, len(arrays["id"]), BATCH):
        yield {name: np.array(array[begin : begin + BATCH]) for name, array in arrays.items()}


WRITERS: dict[str, Callable[[Items, Path], None]] = {
    "ours": write_ours,
    "webdataset": write_webdataset,
    "parquet": write_parquet,
    "npy": write_npy,
}
READERS: dict[str, tuple[str, Callable[[Path], Iterator[Items]]]] = {
    "ours": ("ours", read_ours),
    "ours, shuffled by the loader": ("ours", read_ours_shuffled),
    "webdataset": ("webdataset", read_webdataset),
    "parquet": ("parquet", read_parquet),
    "npy": ("npy", read_npy),
}


def check(items: Items, root: Path) -> None:
    """All readers must have read the same, else their times mean nothing."""
    for name, (writer, reader) in READERS.items():
        batches = list(reader(root / writer))
        ids = np.concatenate([batch["id"] for batch in batches])
        assert np.array_equal(np.sort(ids), items["id"]), name
        for field in FIELDS:
            values = np.concatenate([batch[field] for batch in batches])
            assert np.array_equal(values, items[field][ids]), (name, field)


def timed(work: Callable[[], None]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def drain(batches: Iterator[Items]) -> None:
    for _ in batches:
        pass


def run(count: int, rounds: int, root: Path) -> dict[str, float]:
    items = make_items(count)
    content = sum(array.nbytes for array in items.values())
    writing: dict[str, list[float]] = {name: [] for name in WRITERS}
    reading: dict[str, list[float]] = {name: [] for name in READERS}
    for name in WRITERS:
        (root / name).mkdir()
    for turn in range(rounds + 1):  # the first turn warms up and does not count
        for name, write in WRITERS.items():
            seconds = timed(lambda write=write, name=name: write(items, root / name))  # type: ignore[misc]
            writing[name] += [seconds] if turn else []
        if turn == 0:
            check(items, root)
        for name, (writer, reader) in READERS.items():
            seconds = timed(lambda reader=reader, writer=writer: drain(reader(root / writer)))  # type: ignore[misc]
            reading[name] += [seconds] if turn else []
    write_time = {name: statistics.median(times) for name, times in writing.items()}
    read_time = {name: statistics.median(times) for name, times in reading.items()}
    size = {
        name: sum(path.stat().st_size for path in (root / name).iterdir()) / content - 1 for name in WRITERS
    }
    for name, seconds in write_time.items():
        print(f"write {name:30} {1e6 * seconds / count:8.2f} us/item   size {100 * size[name]:+7.2f} %")
    for name, seconds in read_time.items():
        print(f"read  {name:30} {count / seconds:12,.0f} items/s")
    return {
        "read_vs_webdataset": round(read_time["webdataset"] / read_time["ours"], 2),
        "read_vs_parquet": round(read_time["parquet"] / read_time["ours"], 2),
        "read_vs_npy": round(read_time["npy"] / read_time["ours"], 2),
        "write_vs_webdataset": round(write_time["webdataset"] / write_time["ours"], 2),
        "size_overhead": round(size["ours"], 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="qbrec-shards-") as directory:
        print(json.dumps(run(arguments.items, arguments.rounds, Path(directory))))


if __name__ == "__main__":
    main()
