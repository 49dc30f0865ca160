"""Items, the driver's side of the shards: run the tasks, join what they wrote."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from qbrec.catalog.exchange import Parts, reduce
from qbrec.catalog.parts import join_parts, new_array
from qbrec.catalog.shards import ShardJob
from qbrec.engine.context import StageContext
from qbrec.storage.artifact import ArtifactWriter
from qbrec.storage.blocks import write_block_index

Take = Callable[[slice, dict[str, Any]], None]


def write_shards(ctx: StageContext, parts: Parts[pa.Table], job: ShardJob, *, label: str, take: Take) -> None:
    """Write all shards of a job, their block index and their Arrow file.

    Args:
        ctx: Of the driver.
        parts: Encoded items by shard; not all of them may be empty.
        job: The job.
        label: What the progress shows.
        take: Called with the place of a shard's items among all of the job, and what `ShardJob.write`
            returned; in the order of the shards.

    Raises:
        DataError: The disk is full.
    """
    first = job.first_row - job.first_row[0]
    records = []
    with ctx.progress(int(first[-1]), label) as progress:
        for shard, result in enumerate(reduce(parts, job.write)):
            if result is None:
                continue
            span = slice(int(first[shard]), int(first[shard + 1]))
            take(span, result)
            records.append(result["records"])
            progress.update(span.stop - span.start)
    write_block_index(job.directory / f"blocks.{job.prefix}.npy", records)
    join_parts(job.directory, job.prefix)


def store_items(
    ctx: StageContext,
    writer: ArtifactWriter,
    parts: Parts[pa.Table],
    job: ShardJob,
    *,
    tokens: Mapping[str, int] | None = None,
) -> NDArray[np.uint64]:
    """Write new items: tars, items.arrow, hashes.npy, item_domain.npy and, for a catalogue, statistics.

    Args:
        ctx: Of the driver.
        writer: The artifact under construction.
        parts: Encoded items by shard.
        job: The job, with the prefix `items`.
        tokens: Tokens of every modality; None: no statistics, those of the catalogue are frozen.

    Returns:
        Item hashes in the order of their rows, uint64 [n], mapped.
    """
    num_items = int(job.first_row[-1] - job.first_row[0])
    hashes = new_array(job.directory, "hashes", np.uint64, num_items)
    domain = new_array(job.directory, "item_domain", np.uint8, num_items)
    sums = {modality: np.zeros((2, width)) for modality, width in job.widths.items()}

    def take(span: slice, result: dict[str, Any]) -> None:
        hashes[span], domain[span] = result["hashes"], result["domains"]
        for modality, both in result["sums"].items():
            sums[modality] += both  # in the order of the shards: the same for any number of workers

    write_shards(ctx, parts, job, label="writing items", take=take)
    for array in (hashes, domain):
        array.flush()  # type: ignore[attr-defined]
    if tokens is not None:
        _save_statistics(writer, sums, tokens)
    return hashes


def _save_statistics(
    writer: ArtifactWriter, sums: Mapping[str, NDArray[np.float64]], tokens: Mapping[str, int]
) -> None:
    import torch

    tensors = {}
    for modality, (total, squares) in sums.items():
        mean = total / tokens[modality]
        spread = np.sqrt(np.maximum(squares / tokens[modality] - mean**2, 0.0))
        tensors[f"mean.{modality}"] = torch.from_numpy(mean.astype(np.float32))
        tensors[f"std.{modality}"] = torch.from_numpy(spread.astype(np.float32))
    writer.save_safetensors("statistics.safetensors", tensors)
