"""Items, the driver's side: it holds a hash per item; features stay in Ray's object store.

`ItemSteps` are the steps that a catalogue and a later generation of it share; `build_items` is stage 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from qbrec.catalog import items, rejected
from qbrec.catalog.append.frozen import Frozen
from qbrec.catalog.contract import Domain
from qbrec.catalog.duplicates import equal_content
from qbrec.catalog.encoders.image import DIM as IMAGE_DIM
from qbrec.catalog.encoders.models import BUILT_IN_IMAGE, BUILT_IN_TEXT, encoder_identity
from qbrec.catalog.encoders.pool import encoder_pool
from qbrec.catalog.encoders.text import HashedNgramEncoder
from qbrec.catalog.exchange import Parts, exchange, group_size, reduce
from qbrec.catalog.index import Uniqueness
from qbrec.catalog.parts import block_size
from qbrec.catalog.shards import ShardJob
from qbrec.catalog.store_items import store_items
from qbrec.catalog.units import ITEM_UNIT_ROWS, cut_units
from qbrec.config.root import RootConfig
from qbrec.engine.context import StageContext
from qbrec.engine.ray_data import blocks_of, unit_dataset
from qbrec.errors import DataError
from qbrec.storage.artifact import ArtifactWriter

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


@dataclass(frozen=True)
class EncodedItems:
    """Encoded items in Ray's object store.

    Attributes:
        parts: By shard: a range of the item hash.
        counts: Items of every shard, int64 [shards].
        sizes: By modality, int64 [modalities, 4]: see `token_sizes`.
    """

    parts: Parts[pa.Table]
    counts: NDArray[np.int64]
    sizes: NDArray[np.int64]


class ItemSteps:
    """Reads, checks and encodes the items of all domains.

    Args:
        ctx: Of the driver.
        config: Root configuration.
        domains: All domains, by number.
        directory: The artifact under construction.
        frozen: Of the catalogue that these items are added to; None: they are a catalogue of their own.
    """

    def __init__(
        self,
        ctx: StageContext,
        config: RootConfig,
        domains: list[Domain],
        directory: Path,
        frozen: Frozen | None = None,
    ) -> None:
        self.ctx, self.config, self.catalog, self.domains = ctx, config, config.catalog, domains
        self.directory = directory
        self.units = cut_units(domains, role="items", unit_rows=ITEM_UNIT_ROWS)
        self.total = sum(domain.item_rows for domain in domains)
        self.encoded = {m for m in ("text", "image") if any(self._encodes(d, m) for d in domains)}
        found = {m for domain in domains for m in domain.embeddings} | self.encoded
        order = {"text": 0, "image": 1}
        self.modalities = tuple(
            sorted(found if frozen is None else frozen.widths, key=lambda m: (order.get(m, 2), m))
        )
        self._widths = frozen.widths if frozen else {}
        self._display = frozen.display if frozen else _display(domains)
        self.shards = -(-self.total * self._row_bytes() // self.catalog.shard_bytes)

    @staticmethod
    def _encodes(domain: Domain, modality: str) -> bool:
        return domain.encodes_text if modality == "text" else domain.picture_column is not None

    def _row_bytes(self) -> int:
        """Bytes of an item that lacks nothing, to cut the shards by: known before anything is encoded."""
        dims = {m: width for domain in self.domains for m, (_, width) in domain.embeddings.items()}
        dims |= {m: width for m, width in self._widths.items() if m not in ("text", "image")}
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

    def scan(self, *, fit: bool) -> HashedNgramEncoder | None:
        """Check that no two items share a hash.

        Args:
            fit: Whether the built-in text encoder is fitted on the items, where they need it.

        Returns:
            That encoder.

        Raises:
            DataError: An id occurs twice, or two ids have the same hash.
        """
        count_words = fit and self.catalog.text.encoder == BUILT_IN_TEXT and "text" in self.encoded
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

    def encode(self, text: HashedNgramEncoder | None) -> EncodedItems:
        """Encode all items; bad ones go to the rejected rows.

        Args:
            text: The built-in text encoder; None where text is not encoded with it.

        Raises:
            ConfigError: Unknown encoder.
        """
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
                num_cpus=0,
                add=add,
            )
        every = np.stack([*sizes, np.zeros((len(self.modalities), 4), np.int64)])
        sizes_of_all = np.concatenate([every[..., :3].sum(axis=0), every[..., 3:].max(axis=0)], axis=1)
        return EncodedItems(parts, counts, sizes_of_all)

    def settle(self) -> tuple[dict[str, int], dict[str, int]]:
        """Rows left out, and pictures that items go without, by reason.

        Raises:
            DataError: A domain has more bad rows than allowed.
        """
        reasons = rejected.settle(
            self.directory,
            role="items",
            domains=self.domains,
            max_fraction=self.catalog.max_rejected_fraction,
        )
        skipped = {}
        if "image" in self.encoded:
            skipped = rejected.settle(
                self.directory, role="pictures", domains=self.domains, max_fraction=float("inf")
            )
        return reasons, skipped

    def _encoded(self, text: HashedNgramEncoder | None) -> Dataset:
        import ray
        import ray.data

        compute = self.config.compute
        pool = encoder_pool(
            self.catalog, compute, encoded=self.encoded, resources=ray.cluster_resources(),
            actors=compute.encoder_actors, gpus_per_actor=compute.encoder_gpus,
            cpus_per_actor=compute.encoder_cpus,
        )  # fmt: skip
        device = pool.device if pool else "cpu"
        job = items.EncodeJob(
            self.directory, self.catalog, self.domains, self.modalities, self._display, device
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


def build_items(
    ctx: StageContext, config: RootConfig, domains: list[Domain], writer: ArtifactWriter
) -> BuiltItems:
    """Scan, encode, number and store the items of all domains.

    Raises:
        ConfigError: Unknown encoder.
        DataError: An id occurs twice, too many rows are bad, or none is good.
    """
    steps, directory, catalog = ItemSteps(ctx, config, domains, writer.path), writer.path, config.catalog
    text = steps.scan(fit=True)
    encoded = steps.encode(text)
    reasons, skipped = steps.settle()
    first_row = np.concatenate([[0], np.cumsum(encoded.counts)])
    num_items = int(first_row[-1])
    if num_items == 0:
        raise DataError(
            "not a single item is good",
            where=domains[0].items[0].path,
            fix="see rejected/items.parquet",
        )
    sizes = dict(zip(steps.modalities, encoded.sizes.tolist(), strict=True))
    widths = {m: stored // (2 * tokens) for m, (stored, tokens, _, _) in sizes.items() if tokens}
    names = tuple(domain.name for domain in domains)
    block_bytes = block_size(catalog.block_bytes, int(encoded.sizes[:, 0].sum()))
    job = ShardJob(directory, widths, names, first_row, block_bytes)
    hashes = store_items(ctx, writer, encoded.parts, job, tokens={m: sizes[m][1] for m in widths})
    if text is not None:
        writer.save_safetensors("encoder.safetensors", text.state())
    meta = {
        "modalities": {
            m: {"dim": width, "present": sizes[m][2], "max_tokens": sizes[m][3]}
            for m, width in widths.items()
        },
        "num_items": num_items,
        "num_duplicates": equal_content.write_duplicates(directory, num_items),
        "structure_slots": catalog.structure_depth + 1,
        "structure_buckets": catalog.structure_buckets,
        "encoders": encoder_identity(catalog, dims={m: w for m, w in widths.items() if m in steps.encoded}),
        "skipped_pictures": skipped,
    }
    refused = rejected.item_hashes(directory) if reasons else np.zeros(0, np.uint64)
    return BuiltItems(hashes, refused, reasons, meta)


def _display(domains: list[Domain]) -> pa.Schema:
    try:
        return pa.unify_schemas([domain.display for domain in domains], promote_options="permissive")
    except pa.ArrowException as error:
        raise DataError(
            f"a display column has different types in the domains: {error}",
            where=", ".join(domain.items[0].path for domain in domains),
            fix="write it with the same type, or under different names",
        ) from None
