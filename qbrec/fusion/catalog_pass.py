"""One pass of the trained network over the whole catalogue: fused vectors by block, on all ranks."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from qbrec.engine.context import StageContext
from qbrec.engine.rows import ShardedRows
from qbrec.fusion.batches import Collator, item_fields
from qbrec.fusion.embed import CHUNK, FusionEncoder
from qbrec.storage.artifact import ArtifactWriter
from qbrec.storage.block_format import index_dtype
from qbrec.storage.block_reader import BlockSet
from qbrec.storage.blocks import BlockTarWriter, write_block_index

_FIELDS = ("depth", "fused", "row")
_SHARD_BLOCKS = 32  # of CHUNK rows: tars of about 32 MB
_PARTS = 16  # small catalogues are cut into about this many tars, so that every rank has some to write


@dataclass(frozen=True)
class PassResult:
    """What the pass took.

    Attributes:
        mean_depth: Blocks of the network that an item went through, mean over the catalogue.
        seconds: Of the whole pass, on this machine.
    """

    mean_depth: float
    seconds: float


def embed_catalog(
    ctx: StageContext,
    writer: ArtifactWriter,
    items: BlockSet,
    encoder: FusionEncoder,
    plain: Collator,
    *,
    rows: ShardedRows | None,
) -> PassResult:
    """Write the fused vectors of this rank's shards and the index of all. A collective call.

    Shards and blocks are cut on the global row grid, so the files do not depend on the number of ranks.

    Args:
        ctx: The rank's context.
        writer: Of the fusion artifact.
        items: Blocks of the catalogue's items.
        encoder: The trained network.
        plain: Makes batches without dropout.
        rows: ID rows; a rank's items are not its rows, so each block fetches them from their owners.
    """
    begin = time.monotonic()
    fields = item_fields(encoder.model.modalities)
    blocks = -(-items.num_samples // CHUNK)
    per_shard = min(-(-blocks // _PARTS), _SHARD_BLOCKS)
    shards = -(-blocks // per_shard)
    bounds = [shards * rank // ctx.world for rank in range(ctx.world + 1)]
    own = range(bounds[ctx.rank], bounds[ctx.rank + 1])
    # Ranks with fewer shards still take part in every exchange of rows.
    rounds = max(last - first for first, last in pairwise(bounds)) * per_shard
    done = 0

    def fetch(ids: torch.Tensor) -> torch.Tensor:
        nonlocal done
        done += 1
        assert rows is not None
        return rows.lookup(rows.route(ids))

    if rows is not None:
        encoder.own = fetch
    progress = ctx.progress(len(own) * per_shard, "embed items")
    depths, records = 0, []
    for shard in own:
        with BlockTarWriter(writer.path, prefix="fused", first_shard=shard, shard_bytes=1 << 40) as tar:
            for block in range(shard * per_shard, min((shard + 1) * per_shard, blocks)):
                numbers = np.arange(
                    block * CHUNK, min((block + 1) * CHUNK, items.num_samples), dtype=np.int64
                )
                fused, depth = encoder.embed_batch(plain(items.take(numbers, fields), numbers, 0))
                tar.add({"row": numbers, "fused": fused, "depth": depth}, len(numbers))
                depths += int(depth.sum(dtype=np.int64))
                progress.update()
            records.append(tar.close())
    while rows is not None and done < rounds:
        fetch(torch.zeros(0, dtype=torch.int64, device=ctx.device))
    progress.close()
    data = b"".join(part.tobytes() for part in records)
    # A rank without shards still takes part in the exchange.
    mine = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)
    parts = ctx.gather_bytes(mine.to(ctx.device))
    total = ctx.all_reduce(torch.tensor(depths, dtype=torch.int64, device=ctx.device))
    if ctx.is_main:
        dtype = index_dtype(list(_FIELDS))
        index = [np.frombuffer(part.cpu().numpy().tobytes(), dtype=dtype) for part in parts]
        write_block_index(writer.path / "blocks.fused.npy", index)
    return PassResult(float(total) / items.num_samples, time.monotonic() - begin)
