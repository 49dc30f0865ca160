"""Stage 0 on Ray Data: Parquet in, the catalogue artifact out (DESIGN sections 2 and 3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from qbrec.catalog import histories, items, rejected
from qbrec.catalog.contract import Domain, read_contract
from qbrec.catalog.encode import BUILT_IN_IMAGE, BUILT_IN_TEXT
from qbrec.catalog.index import check_unique
from qbrec.catalog.shuffle import by_group, join_parts, one_row, rows_per_block, summaries_of, write_index
from qbrec.catalog.text import FIELDS, SAMPLE_TEXTS, HashedNgramEncoder
from qbrec.catalog.units import (
    INTERACTION_UNIT_ROWS,
    ITEM_UNIT_ROWS,
    cut_units,
    keep,
    ray_data,
    rows,
    unit_dataset,
)
from qbrec.config.root import RootConfig
from qbrec.engine.context import StageContext
from qbrec.engine.ray_session import ensure_ray
from qbrec.errors import DataError
from qbrec.storage.artifact import Artifact, ArtifactWriter

if TYPE_CHECKING:
    from ray.data import Dataset


def run(ctx: StageContext, config: RootConfig, inputs: Mapping[str, Artifact]) -> Artifact:
    """Build the catalogue artifact.

    Args:
        ctx: Of the driver: Ray tasks do the work, so there is one rank.
        config: Root configuration.
        inputs: Empty: this stage reads the raw input.

    Raises:
        ConfigError: No domain, unknown encoder, `image_path` without allowed folders.
        DataError: The input breaks the contract, or too many rows are bad.
        LaunchError: Ray cannot be reached or fails.
    """
    assert ctx.world == 1
    assert not inputs
    domains = read_contract(config.data, config.catalog)
    ensure_ray(config.compute)
    build = _Build(ctx, config, domains)
    with ray_data():
        build.items()
        build.interactions()
    return build.commit()


class _Build:
    """The state of one build on the driver: ids and counts; features stay in Ray's object store."""

    def __init__(self, ctx: StageContext, config: RootConfig, domains: list[Domain]) -> None:
        self.ctx, self.config, self.catalog, self.domains = ctx, config, config.catalog, domains
        self.writer: ArtifactWriter = ctx.writer()
        self.names = tuple(domain.name for domain in domains)
        self.rejected: dict[str, int] = {}
        self.meta: dict[str, Any] = {}
        self.known = self.hashes = np.zeros(0, np.uint64)
        self.state: dict[str, Any] = {}
        self.tokens: dict[str, int] = {}  # by modality, over all items

    def items(self) -> None:
        """Scan, encode, number and store the items."""
        units = cut_units(self.domains, role="items", unit_rows=ITEM_UNIT_ROWS)
        units = [unit | {"number": number} for number, unit in enumerate(units)]
        text = self._scan(units)
        encoded, modalities = self._encode(units, text)
        summaries = summaries_of(encoded, lambda table: items.summarise(table, modalities))
        self._settle("items", summaries, rejected.ITEMS)
        self.hashes = np.sort(np.concatenate([np.frombuffer(s["hashes"], np.uint64) for s in summaries]))
        if len(self.hashes) == 0:
            raise DataError(
                "not a single item is good", where=self._first("items"), fix="see rejected/items.parquet"
            )
        sizes = np.stack([np.frombuffer(s["sizes"], np.int64).reshape(-1, 4) for s in summaries])
        total, longest = sizes[..., :3].sum(axis=0), sizes[..., 3].max(axis=0)
        widths = {m: int(total[i, 0] // (2 * total[i, 1])) for i, m in enumerate(modalities) if total[i, 1]}
        self.meta["modalities"] = {
            m: {"dim": widths[m], "present": int(total[i, 2]), "max_tokens": int(longest[i])}
            for i, m in enumerate(modalities)
            if m in widths
        }
        self.tokens = {m: int(total[i, 1]) for i, m in enumerate(modalities)}
        self._store(encoded, widths)

    def _scan(self, units: list[dict[str, Any]]) -> HashedNgramEncoder | None:
        domains = self.domains
        count_words = self.catalog.text.encoder == BUILT_IN_TEXT and any(d.encodes_text for d in domains)
        share = min(1.0, SAMPLE_TEXTS / sum(d.item_rows for d in domains))

        def scan(table: pa.Table) -> pa.Table:
            (unit,) = table.to_pylist()
            return one_row(items.scan_unit(unit, domains, count_words=count_words, sample_share=share), _SCAN)

        result = items.ScanResult()
        dataset = unit_dataset(units).map_batches(scan, batch_size=None, batch_format="pyarrow")
        for summary in rows(dataset, self.ctx.progress(len(units), "reading items")):
            result.add(summary)
        self.known = check_unique(result.locations(), units, domains)
        if not count_words:
            return None
        text = result.fit(dim=self.catalog.text.dim, seed=self.ctx.sub_seed("catalog/text"))
        self.state = text.state()
        return text

    def _encode(
        self, units: list[dict[str, Any]], text: HashedNgramEncoder | None
    ) -> tuple[Dataset, tuple[str, ...]]:
        import ray

        found = {m for domain in self.domains for m in domain.embeddings}
        found |= {"text"} if any(d.encodes_text for d in self.domains) else set()
        found |= {"image"} if any(d.picture_column for d in self.domains) else set()
        order = {"text": 0, "image": 1}
        modalities = tuple(sorted(found, key=lambda m: (order.get(m, 2), m)))
        job = items.EncodeJob(self.catalog, self.domains, modalities, _union(self.domains))
        reference = ray.put(text)

        def encode(table: pa.Table) -> pa.Table:
            (unit,) = table.to_pylist()
            yield from job.unit(unit, ray.get(reference))

        named = "text" in found and self.catalog.text.encoder != BUILT_IN_TEXT
        named |= "image" in found and self.catalog.image.encoder != BUILT_IN_IMAGE
        gpus = (
            1
            if named and self.config.compute.device != "cpu" and ray.cluster_resources().get("GPU")
            else None
        )
        dataset = unit_dataset(units).map_batches(
            encode, batch_size=None, batch_format="pyarrow", num_gpus=gpus
        )
        return keep(dataset, self.ctx.progress(len(units), "encoding items")), modalities

    def _store(self, encoded: Dataset, widths: dict[str, int]) -> None:
        import ray

        slots = self.catalog.structure_depth + 1
        row_bytes = 17 + 4 * slots
        row_bytes += sum(2 * d * self.meta["modalities"][m]["max_tokens"] + 1 for m, d in widths.items())
        per_shard = self.catalog.rows_per_shard
        job = items.ShardJob(
            self.writer.path,
            widths,
            self.names,
            per_shard,
            rows_per_block(self.catalog.block_bytes, row_bytes, per_shard),
        )
        num_items = len(self.hashes)
        num_shards = -(-num_items // per_shard)
        reference = ray.put(self.hashes)
        schema = {"shard": pa.int64(), "records": pa.binary(), "content": pa.binary(), "domains": pa.binary()}
        schema |= {f"sums.{modality}": pa.binary() for modality in widths}
        dataset = encoded.map_batches(
            lambda table: job.assign(table, ray.get(reference)), batch_size=None, batch_format="pyarrow"
        )
        shards = by_group(
            dataset,
            "shard",
            num_shards,
            sum(domain.item_rows for domain in self.domains),
            lambda group: one_row(job.write(group), pa.schema(schema)),
        )
        results = sorted(
            rows(shards, self.ctx.progress(num_shards, "writing items")), key=lambda r: r["shard"]
        )
        assert len(results) == num_shards, "a shard was written twice"
        fields = ["row", "domain", "structure", "content"]
        fields += [f"{kind}.{modality}" for modality in widths for kind in ("feature", "tokens")]
        write_index(self.writer.path, "items", [r["records"] for r in results], fields)
        content = np.concatenate([np.frombuffer(r["content"], np.int64) for r in results])
        _, first, inverse = np.unique(content, return_index=True, return_inverse=True)
        self.writer.save_npy("duplicates.npy", first[inverse].astype(np.int64))
        self.writer.save_npy(
            "item_domain.npy", np.concatenate([np.frombuffer(r["domains"], np.uint8) for r in results])
        )
        self.writer.save_npy("hashes.npy", self.hashes)
        self._statistics(results, widths)
        if self.state:
            self.writer.save_safetensors("encoder.safetensors", self.state)
        join_parts(self.writer.path, "items")
        buckets = self.catalog.structure_buckets
        self.meta |= {"num_items": num_items, "structure_slots": slots, "structure_buckets": buckets}
        self.meta["num_duplicates"] = num_items - len(first)

    def _statistics(self, results: list[dict[str, Any]], widths: dict[str, int]) -> None:
        import torch

        tensors = {}
        for modality, width in widths.items():
            sums = np.zeros((2, width))
            for (
                result
            ) in results:  # in the order of the shards: the sum is the same for any number of workers
                sums += np.frombuffer(result[f"sums.{modality}"], np.float64).reshape(2, width)
            count = self.tokens[modality]
            mean = sums[0] / count
            spread = np.sqrt(np.maximum(sums[1] / count - mean**2, 0.0))
            tensors[f"mean.{modality}"] = torch.from_numpy(mean.astype(np.float32))
            tensors[f"std.{modality}"] = torch.from_numpy(spread.astype(np.float32))
        self.writer.save_safetensors("statistics.safetensors", tensors)

    def interactions(self) -> None:
        """Validate the interactions and store them as one history per user."""
        import ray

        domains = self.domains
        units = cut_units(domains, role="interactions", unit_rows=INTERACTION_UNIT_ROWS)
        partitions = -(-sum(d.interaction_rows for d in domains) // histories.INTERACTIONS_PER_PARTITION)
        reference = ray.put((self.hashes, self.known))

        def read(table: pa.Table) -> pa.Table:
            (unit,) = table.to_pylist()
            hashes, known = ray.get(reference)
            yield from histories.read_interactions(
                unit, domains, partitions=partitions, hashes=hashes, known=known
            )

        dataset = unit_dataset(units).map_batches(read, batch_size=None, batch_format="pyarrow")
        table = keep(dataset, self.ctx.progress(len(units), "reading interactions"))
        summaries = summaries_of(table, histories.summarise)
        self._settle("interactions", summaries, rejected.INTERACTIONS)
        users = np.unique(np.concatenate([np.frombuffer(s["users"], np.uint64) for s in summaries]))
        if len(users) == 0:
            raise DataError(
                "not a single interaction is good",
                where=self._first("interactions"),
                fix="see rejected/interactions.parquet",
            )
        spans = np.concatenate([np.frombuffer(s["spans"], np.int64).reshape(-1, 4) for s in summaries])
        first_user = np.searchsorted(histories.partition_of(users, partitions), np.arange(partitions))
        job = histories.HistoryJob(
            self.writer.path, self.catalog, first_user, self._starts(spans), self.names
        )
        good = table.map_batches(_only_good, batch_size=None, batch_format="pyarrow")
        groups = by_group(
            good,
            "partition",
            partitions,
            sum(domain.interaction_rows for domain in domains),
            lambda group: one_row(job.write(group, ray.get(reference)[0]), _HISTORY),
        )
        results = list(rows(groups, self.ctx.progress(partitions, "writing histories")))
        assert sum(r["users"] for r in results) == len(users), "a partition was written twice"
        fields = ["user", "domain", "offset", "row", "time", "cut"]
        write_index(self.writer.path, "histories", [r["records"] for r in results], fields)
        counts = np.zeros(len(self.hashes), np.int64)
        for result in results:
            counts[np.frombuffer(result["rows"], np.int64)] += np.frombuffer(result["counts"], np.int64)
        self.writer.save_npy("train_counts.npy", counts)
        join_parts(self.writer.path, "users")
        tested = np.sum([np.frombuffer(r["eval_users"], np.int64) for r in results], axis=0)
        target = self.config.data.target_domain
        if not tested[self.names.index(target)]:
            raise DataError(
                f"no user of the target domain {target!r} has anything to be tested on",
                where=f"{self._first('interactions')}: split {self.catalog.split}",
                fix="bring users with three interactions at least, for global_time some of them late",
            )
        self.meta |= {
            "num_users": len(users),
            "num_interactions": sum(r["kept"] for r in results),
            "truncated_interactions": sum(r["truncated"] for r in results),
            "eval_users": int(tested[self.names.index(target)]),
        }

    def _starts(self, spans: NDArray[np.int64]) -> NDArray[np.int64]:
        """For split global_time: when validation and test begin, by domain, int64 [domains, 2]."""
        starts = np.zeros((len(self.domains), 2), np.int64)
        test = self.catalog.test_fraction
        for number in np.unique(spans[:, 0]):
            mine = spans[spans[:, 0] == number]
            first, last = int(mine[:, 1].min()), int(mine[:, 2].max())
            for place, fraction in enumerate((self.catalog.validation_fraction + test, test)):
                starts[number, place] = last - int((last - first) * fraction)
        return starts

    def commit(self) -> Artifact:
        """Write the manifest."""
        self.meta |= {
            "domains": list(self.names),
            "target_domain": self.config.data.target_domain,
            "rejected": self.rejected,
        }
        return self.ctx.commit(self.writer, meta=self.meta, inputs={})

    def _settle(self, role: str, summaries: list[dict[str, Any]], schema: pa.Schema) -> None:
        table = rejected.unpack([s["rejected"] for s in summaries], schema)
        counts = rejected.settle(
            self.writer,
            table,
            role=role,
            domains=self.domains,
            max_fraction=self.catalog.max_rejected_fraction,
        )
        self.rejected |= {f"{role}: {reason}": count for reason, count in sorted(counts.items())}

    def _first(self, role: str) -> str:
        files = getattr(self.domains[0], role)
        return str(files[0].path)


_SCAN = pa.schema(
    [
        ("number", pa.int64()),
        *((name, pa.binary()) for name in ("hashes", "places", "num_texts", "buckets", "counts")),
    ]
    + [(f"sample.{name}", pa.list_(pa.string())) for name in FIELDS]
)
_HISTORY = pa.schema(
    [(name, pa.binary()) for name in ("records", "rows", "counts", "eval_users")]
    + [(name, pa.int64()) for name in ("kept", "truncated", "users")]
)


def _only_good(table: pa.Table) -> pa.Table:
    good = table.filter(table["reason"].is_null())
    return good.select(["partition", "user", "user_id", "item", "time", "domain"])


def _union(domains: list[Domain]) -> pa.Schema:
    try:
        return pa.unify_schemas([domain.display for domain in domains], promote_options="permissive")
    except pa.ArrowException as error:
        raise DataError(
            f"a display column has different types in the domains: {error}",
            where=", ".join(domain.items[0].path for domain in domains),
            fix="write it with the same type, or under different names",
        ) from None
