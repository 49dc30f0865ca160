"""Stage 0, items: the driver's side. It holds a hash per item; features stay in Ray's object store."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from qbrec.catalog import equal_content, items, rejected
from qbrec.catalog.contract import Domain
from qbrec.catalog.exchange import Parts, exchange, group_size, reduce
from qbrec.catalog.image import DIM as IMAGE_DIM
from qbrec.catalog.index import Uniqueness
from qbrec.catalog.models import BUILT_IN_IMAGE, BUILT_IN_TEXT, encoder_identity
from qbrec.catalog.parts import join_parts, new_array
from qbrec.catalog.pool import encoder_pool
from qbrec.catalog.shards import ShardJob
from qbrec.catalog.text import HashedNgramEncoder
from qbrec.catalog.units import ITEM_UNIT_ROWS, blocks_of, cut_units, unit_dataset
from qbrec.config.root import RootConfig
from qbrec.engine.context import StageContext
from qbrec.errors import DataError
from qbrec.storage.artifact import ArtifactWriter
from qbrec.storage.blocks import write_block_index

if TYPE_CHECKING:
    from ray.data import Dataset

ITEMS_PER_CHECK = 1 << 22  # in one task that looks for equal hashes
_UNKNOWN_DIM = 1024  # of a named encoder, for the size of the shards only


@dataclass
class BuiltItems:
    """What the histories and the manifest need of the items.

    Attributes:
        hashes: Item hashes, sorted: the index is the row; uint64 [N], mapped.
        refused: Sorted hashes of the items that were brought and rejected.
        rejected: Rows left out by reason.
        meta: For the manifest.
    """

    hashes: NDArray[np.uint64]
    refused: NDArray[np.uint64]
    rejected: dict[str, int]
    meta: dict[str, Any] = field(default_factory=dict)


def build_items(
    ctx: StageContext, config: RootConfig, domains: list[Domain], writer: ArtifactWriter
) -> BuiltItems:
    """Scan, encode, number and store the items of all domains.

    Raises:
        ConfigError: Unknown encoder.
        DataError: An id occurs twice, too many rows are bad, or none is good.
    """
    return _Build(ctx, config, domains, writer).run()


class _Build:
    def __init__(
        self, ctx: StageContext, config: RootConfig, domains: list[Domain], writer: ArtifactWriter
    ) -> None:
        self.ctx, self.config, self.catalog, self.domains = ctx, config, config.catalog, domains
        self.writer, self.directory = writer, writer.path
        self.units = cut_units(domains, role="items", unit_rows=ITEM_UNIT_ROWS)
        self.total = sum(domain.item_rows for domain in domains)
        found = {m for domain in domains for m in domain.embeddings}
        found |= {"text"} if any(d.encodes_text for d in domains) else set()
        found |= {"image"} if any(d.picture_column for d in domains) else set()
        self.encoded = {m for m in ("text", "image") if any(self._encodes(d, m) for d in domains)}
        order = {"text": 0, "image": 1}
        self.modalities = tuple(sorted(found, key=lambda m: (order.get(m, 2), m)))
        self.shards = -(-self.total * self._row_bytes() // self.catalog.shard_bytes)

    @staticmethod
    def _encodes(domain: Domain, modality: str) -> bool:
        return domain.encodes_text if modality == "text" else domain.picture_column is not None

    def run(self) -> BuiltItems:
        text = self._scan()
        parts, counts, sizes = self._encode(text)
        reasons = rejected.settle(
            self.directory,
            role="items",
            domains=self.domains,
            max_fraction=self.catalog.max_rejected_fraction,
        )
        first_row = np.concatenate([[0], np.cumsum(counts)])
        num_items = int(first_row[-1])
        if num_items == 0:
            raise DataError(
                "not a single item is good",
                where=self.domains[0].items[0].path,
                fix="see rejected/items.parquet",
            )
        widths = {
            m: int(sizes[i, 0] // (2 * sizes[i, 1])) for i, m in enumerate(self.modalities) if sizes[i, 1]
        }
        hashes = self._store(parts, first_row, widths, sizes)
        if text is not None:
            self.writer.save_safetensors("encoder.safetensors", text.state())
        duplicates = equal_content.write_duplicates(self.directory, num_items)
        meta = {
            "modalities": {
                m: {"dim": widths[m], "present": int(sizes[i, 2]), "max_tokens": int(sizes[i, 3])}
                for i, m in enumerate(self.modalities)
                if m in widths
            },
            "num_items": num_items,
            "num_duplicates": duplicates,
            "structure_slots": self.catalog.structure_depth + 1,
            "structure_buckets": self.catalog.structure_buckets,
            "encoders": encoder_identity(
                self.catalog, dims={m: w for m, w in widths.items() if m in self.encoded}
            ),
            "skipped_pictures": rejected.settle(
                self.directory, role="pictures", domains=self.domains, max_fraction=float("inf")
            )
            if "image" in self.encoded
            else {},
        }
        refused = rejected.item_hashes(self.directory) if reasons else np.zeros(0, np.uint64)
        return BuiltItems(hashes, refused, reasons, meta)

    def _row_bytes(self) -> int:
        """Bytes of an item that lacks nothing, to cut the shards by: known before anything is encoded."""
        dims = {m: width for domain in self.domains for m, (_, width) in domain.embeddings.items()}
        named = {
            "text": self.catalog.text.dim if self.catalog.text.encoder == BUILT_IN_TEXT else _UNKNOWN_DIM,
            "image": IMAGE_DIM if self.catalog.image.encoder == BUILT_IN_IMAGE else _UNKNOWN_DIM,
        }
        text = self.catalog.text
        tokens = {
            "text": 2 + text.description_tokens + bool(text.attributes),
            "image": self.catalog.image.tokens_per_picture,
        }
        return (
            17
            + 4 * (self.catalog.structure_depth + 1)
            + sum(
                2 * dims[m] + 1 if m in dims else 2 * named[m] * tokens.get(m, 1) + 1 for m in self.modalities
            )
        )

    def _scan(self) -> HashedNgramEncoder | None:
        count_words = self.catalog.text.encoder == BUILT_IN_TEXT and any(d.encodes_text for d in self.domains)
        partitions = -(-self.total // ITEMS_PER_CHECK)
        result = items.ScanResult()
        with self.ctx.progress(len(self.units), "reading items") as progress:

            def add(summaries: list[dict[str, Any]]) -> None:
                progress.update(len(summaries))
                for summary in summaries:
                    result.add(summary)

            job = items.ScanJob(self.domains, partitions, count_words)
            parts = exchange(self.units, job.split, partitions=partitions, add=add)
            for _ in reduce(parts, Uniqueness(self.units, self.domains).check):
                pass
        if not count_words:
            return None
        return result.fit(dim=self.catalog.text.dim, seed=self.ctx.sub_seed("catalog/text"))

    def _encode(
        self, text: HashedNgramEncoder | None
    ) -> tuple[Parts[pa.Table], NDArray[np.int64], NDArray[np.int64]]:
        """Encoded items by shard, items of every shard [shards], and sizes by modality (see `ItemSplit`)."""
        counts = np.zeros(self.shards, np.int64)
        sizes: list[NDArray[np.int64]] = []
        with self.ctx.progress(self.total, "encoding items") as progress:

            def add(summary: dict[str, NDArray[np.int64]]) -> None:
                counts[:] += summary["counts"]
                sizes.append(summary["sizes"])
                progress.update(int(summary["counts"].sum()))

            parts = exchange(
                blocks_of(self._encoded(text)),
                items.ItemSplit(self.modalities, self.shards).split,
                partitions=self.shards,
                group=group_size(len(self.units), self.shards),
                add=add,
            )
        every = np.stack([*sizes, np.zeros((len(self.modalities), 4), np.int64)])
        return parts, counts, np.concatenate([every[..., :3].sum(axis=0), every[..., 3:].max(axis=0)], axis=1)

    def _encoded(self, text: HashedNgramEncoder | None) -> Dataset:
        import ray
        import ray.data

        compute = self.config.compute
        pool = encoder_pool(
            self.catalog, compute, encoded=self.encoded, resources=ray.cluster_resources(),
            actors=compute.encoder_actors, gpus_per_actor=compute.encoder_gpus,
            cpus_per_actor=compute.encoder_cpus,
        )  # fmt: skip
        display = _display(self.domains)
        job = items.EncodeJob(
            self.directory,
            self.catalog,
            self.domains,
            self.modalities,
            display,
            pool.device if pool else "cpu",
        )
        reference = ray.put(text)
        if pool is not None:
            return unit_dataset(self.units).map_batches(
                items.EncodeWorker, fn_constructor_args=(job, reference), batch_size=None,
                batch_format="pyarrow", num_gpus=pool.num_gpus, num_cpus=pool.num_cpus,
                compute=ray.data.ActorPoolStrategy(min_size=pool.min_size, max_size=pool.max_size),
            )  # fmt: skip

        def encode(table: pa.Table) -> Any:
            (unit,) = table.to_pylist()
            yield from job.unit(unit, ray.get(reference))

        return unit_dataset(self.units).map_batches(encode, batch_size=None, batch_format="pyarrow")

    def _store(
        self,
        parts: Parts[pa.Table],
        first_row: NDArray[np.int64],
        widths: dict[str, int],
        sizes: NDArray[np.int64],
    ) -> NDArray[np.uint64]:
        import torch

        num_items = int(first_row[-1])
        hashes = new_array(self.directory, "hashes", np.uint64, num_items)
        domain = new_array(self.directory, "item_domain", np.uint8, num_items)
        names = tuple(d.name for d in self.domains)
        job = ShardJob(self.directory, widths, names, first_row, self.catalog.block_bytes)
        records = []
        sums = {modality: np.zeros((2, width)) for modality, width in widths.items()}
        with self.ctx.progress(num_items, "writing items") as progress:
            for shard, result in enumerate(reduce(parts, job.write)):
                if result is None:
                    continue
                span = slice(int(first_row[shard]), int(first_row[shard + 1]))
                hashes[span], domain[span] = result["hashes"], result["domains"]
                records.append(result["records"])
                for modality, both in result["sums"].items():
                    sums[modality] += both  # in the order of the shards: the same for any number of workers
                progress.update(span.stop - span.start)
        write_block_index(self.directory / "blocks.items.npy", records)
        join_parts(self.directory, "items")
        tensors = {}
        for modality, (total, squares) in sums.items():
            count = int(sizes[self.modalities.index(modality), 1])
            mean = total / count
            spread = np.sqrt(np.maximum(squares / count - mean**2, 0.0))
            tensors[f"mean.{modality}"] = torch.from_numpy(mean.astype(np.float32))
            tensors[f"std.{modality}"] = torch.from_numpy(spread.astype(np.float32))
        self.writer.save_safetensors("statistics.safetensors", tensors)
        for array in (hashes, domain):
            array.flush()  # type: ignore[attr-defined]
        return hashes


def _display(domains: list[Domain]) -> pa.Schema:
    try:
        return pa.unify_schemas([domain.display for domain in domains], promote_options="permissive")
    except pa.ArrowException as error:
        raise DataError(
            f"a display column has different types in the domains: {error}",
            where=", ".join(domain.items[0].path for domain in domains),
            fix="write it with the same type, or under different names",
        ) from None
