"""Items on disk: our block tars beside per-item WebDataset, Parquet and plain npy, in one sitting.

Every reader opens its files inside the time it is measured and ends at the same place: contiguous batches of
512 items in memory (two float16 vectors, id, category, brand); blocks and batches do not coincide. All files
are in the page cache, as their writer left them: this measures readers, not disks. A round writes everything
once and reads it in turn, `--passes` times (WebDataset once: it takes as long as hundreds of the others). A
ratio, the rival's time / ours, is taken within a pass, where both met the same machine; the median over all
passes of all rounds is reported. The block tars are flushed to the disk while they are written, the rivals'
files are not. The last line is JSON.

    python benchmarks/shards.py [--items 40000] [--rounds 3] [--passes 7] [--width 768] [--block-bytes N]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import webdataset as wds

from qbrec.config.sections import CatalogConfig
from qbrec.storage.blocks import BlockSet, BlockTarWriter, write_block_index
from qbrec.storage.loader import BatchLoader

BATCH, ROW_GROUP = 512, 4096
VECTORS, SCALARS = ("text", "image"), ("id", "category", "brand")
FIELDS = VECTORS + SCALARS
SLOW = ("webdataset",)  # read once a round
Items = dict[str, Any]


def make_items(count: int, width: int) -> Items:
    rng = np.random.default_rng(0)
    items: Items = {
        name: rng.standard_normal((count, width), dtype=np.float32).astype(np.float16) for name in VECTORS
    }
    items["id"] = np.arange(count)
    items["category"] = rng.integers(0, 5000, count).astype(np.int32)
    items["brand"] = rng.integers(0, 90_000, count).astype(np.int32)
    return items


def write_ours(items: Items, root: Path, *, block_bytes: int) -> None:
    writer = BlockTarWriter(root, prefix="items", shard_bytes=256 << 20)
    block = max(block_bytes // sum(items[name][0].nbytes for name in FIELDS), 1)
    for begin in range(0, len(items["id"]), block):
        part = {name: items[name][begin : begin + block] for name in FIELDS}
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
        size = items[name][0].nbytes
        columns[name] = pa.FixedSizeBinaryArray.from_buffers(pa.binary(size), len(items[name]), buffers)
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
    for (batch,) in loader.iterate(0):
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
            size = column.type.byte_width
            flat = np.frombuffer(column.buffers()[1], np.uint8, len(column) * size, column.offset * size)
            items[name] = flat.view(np.float16).reshape(len(column), -1).copy()
        yield items


def read_npy(root: Path) -> Iterator[Items]:
    arrays = {name: np.load(root / f"{name}.npy", mmap_mode="r") for name in FIELDS}
    for begin in range(0, len(arrays["id"]), BATCH):
        yield {name: np.array(array[begin : begin + BATCH]) for name, array in arrays.items()}


WRITERS: dict[str, Callable[[Items, Path], None]] = {
    "webdataset": write_webdataset,
    "parquet": write_parquet,
    "npy": write_npy,
}
READERS: dict[str, tuple[str, Callable[[Path], Iterator[Items]]]] = {
    "ours": ("ours", read_ours),
    "shuffled": ("ours", read_ours_shuffled),  # by the loader
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


def drain(reader: Callable[[Path], Iterator[Items]], path: Path) -> None:
    for _ in reader(path):
        pass


def over_ours(rival: list[float], ours: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(rival, ours, strict=True))


def run(items: Items, root: Path, *, rounds: int, passes: int, block_bytes: int) -> dict[str, float]:
    writers = {"ours": partial(write_ours, block_bytes=block_bytes), **WRITERS}
    count, content = len(items["id"]), sum(array.nbytes for array in items.values())
    writing: dict[str, list[float]] = {name: [] for name in writers}
    reading: dict[str, list[float]] = {name: [] for name in READERS}
    for name, write in writers.items():
        (root / name).mkdir()
        write(items, root / name)
    check(items, root)  # and warms up
    for _ in range(rounds):
        for name, write in writers.items():
            writing[name].append(timed(partial(write, items, root / name)))
        for turn in range(passes):
            for name, (writer, reader) in READERS.items():
                again = name in SLOW and turn  # stands for this pass too
                times = reading[name]
                times.append(times[-1] if again else timed(partial(drain, reader, root / writer)))
    size = {
        name: sum(path.stat().st_size for path in (root / name).iterdir()) / content - 1 for name in writers
    }
    for name, times in writing.items():
        speed = 1e6 * statistics.median(times) / count
        print(f"write {name:12} {speed:8.2f} us/item   size {100 * size[name]:+7.2f} %")
    for name, times in reading.items():
        print(f"read  {name:12} {count / statistics.median(times):12,.0f} items/s")
    shuffled = over_ours(reading["npy"], reading["shuffled"])
    print(f"shuffled_vs_npy {shuffled:.2f} (npy reads in order; ours in the order of an epoch)")
    read = {name: over_ours(reading[name], reading["ours"]) for name in WRITERS}
    return {
        "read_vs_webdataset": round(read["webdataset"], 2),
        "read_vs_parquet": round(read["parquet"], 2),
        "read_vs_npy": round(read["npy"], 2),
        "write_vs_webdataset": round(over_ours(writing["webdataset"], writing["ours"]), 2),
        "size_overhead": round(size["ours"], 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=40_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--passes", type=int, default=7)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--block-bytes", type=int, default=CatalogConfig().block_bytes)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="qbrec-shards-") as directory:
        result = run(
            make_items(arguments.items, arguments.width),
            Path(directory),
            rounds=arguments.rounds,
            passes=arguments.passes,
            block_bytes=arguments.block_bytes,
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
