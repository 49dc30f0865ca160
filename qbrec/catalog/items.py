"""Items, the part of Ray tasks before the shards: scan (ids, word counts), encode, split by shard."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from qbrec.catalog import rejected
from qbrec.catalog.contract import Domain
from qbrec.catalog.encoders.encode import ItemEncoder, skipped_pictures
from qbrec.catalog.encoders.fields import category_paths, item_texts, strings
from qbrec.catalog.encoders.ngrams import NUM_BUCKETS
from qbrec.catalog.encoders.text import (
    FIELDS,
    SAMPLE_TEXTS,
    HashedNgramEncoder,
    document_frequencies,
    normalise,
)
from qbrec.catalog.exchange import range_of, split_by
from qbrec.catalog.units import ITEM_UNIT_ROWS, read_unit
from qbrec.config.sections import CatalogConfig
from qbrec.storage.hashing import hash64, hash_bytes

if TYPE_CHECKING:
    import ray

COUNTED_ITEMS = 1 << 21  # items whose words are counted for the inverse document frequencies
_TEXT_COLUMNS = ("title", "description", "brand", "categories")
_BATCH_ROWS = 2_048


@dataclass(frozen=True)
class ScanJob:
    """What a task that scans items needs beside its units.

    Attributes:
        domains: All domains.
        partitions: Number of ranges of the item hash.
        count_words: Whether the built-in text encoder will be fitted.
    """

    domains: list[Domain]
    partitions: int
    count_words: bool

    def split(self, units: list[dict[str, Any]]) -> tuple[list[pa.Table], list[dict[str, Any]]]:
        """Where every item stands, by range of the hash, and what the text encoder is fitted on.

        Returns:
            `partitions` tables (hash uint64, unit int32, place int32 from the beginning of the unit), and one
            summary per unit for `ScanResult.add`.
        """
        found, summaries = [], []
        for unit in units:
            where, summary = self._scan(unit)
            found.append(where)
            summaries.append(summary)
        table = pa.concat_tables(found)
        keys = np.asarray(table["hash"], dtype=np.uint64)
        return split_by(table, range_of(keys, self.partitions), self.partitions), summaries

    def _scan(self, unit: dict[str, Any]) -> tuple[pa.Table, dict[str, Any]]:
        domain = self.domains[unit["domain"]]
        total = sum(d.item_rows for d in self.domains)
        count_words = self.count_words and domain.encodes_text
        columns = ["item_id", *(c for c in _TEXT_COLUMNS if count_words and c in domain.columns)]
        columns += domain.attributes if count_words else ()
        hashes, places = [], []
        frequencies = np.zeros((len(FIELDS), NUM_BUCKETS) if count_words else (0, 0), dtype=np.int64)
        num_texts = np.zeros(len(FIELDS), dtype=np.int64)
        sample: dict[str, list[str]] = {name: [] for name in FIELDS}
        begin = unit["first_row"] + unit["begin"]
        for first_row, table in read_unit(unit, columns, batch_rows=_BATCH_ROWS):
            ids = pc.fill_null(strings(table, "item_id"), "")
            batch = hash64(domain.name, ids.to_pylist())
            valid = pc.not_equal(ids, "").to_numpy(zero_copy_only=False)
            hashes.append(batch[valid])
            places.append((np.flatnonzero(valid) + first_row - begin).astype(np.int32))
            if not count_words:
                continue
            counted = valid & _drawn(batch, COUNTED_ITEMS / total)
            table = table.filter(pa.array(counted))
            chosen = pa.array(_drawn(batch[counted], SAMPLE_TEXTS / total))
            for number, (name, raw) in enumerate(
                item_texts(table, category_paths(table), domain.attributes).items()
            ):
                texts = normalise(raw)
                frequencies[number] += document_frequencies(texts)
                num_texts[number] += int(pc.sum(pc.greater(pc.utf8_length(texts), 0)).as_py() or 0)
                sample[name].extend(text for text in texts.filter(chosen).to_pylist() if text)
        where = np.flatnonzero(frequencies.ravel())
        keys = np.concatenate(hashes)
        found = {"hash": keys, "unit": np.full(len(keys), unit["number"], np.int32)}
        summary = {
            "num_texts": num_texts,
            "buckets": where.astype(np.int32),
            "counts": frequencies.ravel()[where].astype(np.int32),
            "sample": sample,
        }
        return pa.table(found | {"place": np.concatenate(places)}), summary


def _drawn(hashes: NDArray[np.uint64], share: float) -> NDArray[np.bool_]:
    """Whether an item belongs to the sample of this share: by its hash, the same on every machine."""
    return np.asarray(hashes <= np.uint64(min(share, 1.0) * (2**64 - 2048)))


class ScanResult:
    """Adds up the summaries of `ScanJob`; the order in which they come changes nothing."""

    def __init__(self) -> None:
        self._frequencies = np.zeros(len(FIELDS) * NUM_BUCKETS, dtype=np.int64)
        self._num_texts = np.zeros(len(FIELDS), dtype=np.int64)
        self._sample: dict[str, set[str]] = {name: set() for name in FIELDS}

    def add(self, summary: dict[str, Any]) -> None:
        """Take one unit's summary."""
        self._frequencies[summary["buckets"]] += summary["counts"]
        self._num_texts += summary["num_texts"]
        for name in FIELDS:
            self._sample[name].update(summary["sample"][name])

    def fit(self, *, dim: int, seed: int) -> HashedNgramEncoder:
        """The frozen text encoder."""
        # Titles where there are any: directions learnt from long descriptions were no better, even for them.
        field = next((name for name in FIELDS if self._sample[name]), FIELDS[0])
        sample = _cap(self._sample[field], SAMPLE_TEXTS)
        frequencies = self._frequencies.reshape(len(FIELDS), NUM_BUCKETS)
        return HashedNgramEncoder.fit(frequencies, self._num_texts, sample, field=field, dim=dim, seed=seed)


def _cap(texts: set[str], limit: int) -> pa.Array:
    """At most `limit` texts, chosen and ordered by their hash."""
    ordered = sorted(texts)
    order = np.argsort(hash_bytes(text.encode() for text in ordered), kind="stable")[:limit]
    return pa.array([ordered[i] for i in order], pa.string())


@dataclass(frozen=True)
class EncodeJob:
    """What an encoding task needs beside its unit.

    Attributes:
        directory: The artifact under construction, for the rejected rows.
        display: Further columns of all domains together.
        device: Where named encoders run.
    """

    directory: Path
    config: CatalogConfig
    domains: list[Domain]
    modalities: tuple[str, ...]
    display: pa.Schema
    device: str = "cpu"

    def unit(self, unit: dict[str, Any], text: HashedNgramEncoder | None) -> Iterator[pa.Table]:
        """Encoded good rows of one unit, batch by batch; bad ones go to the rejected rows."""
        domain = self.domains[unit["domain"]]
        encoder = ItemEncoder(
            self.config, modalities=self.modalities, display=self.display, text=text, device=self.device
        )
        columns = [c for c in domain.columns if c != "image_path" or domain.picture_column == c]
        if domain.picture_column != "image":
            columns = [c for c in columns if c != "image"]
        columns += [column for column, _ in domain.embeddings.values()] + domain.display.names
        bad, skipped = [], []
        light = not (domain.encodes_text or domain.picture_column)
        batch_rows = ITEM_UNIT_ROWS if light else _BATCH_ROWS
        for first_row, table in read_unit(unit, columns, batch_rows=batch_rows):
            encoded = encoder.encode(table, domain, file=unit["file"], first_row=first_row)
            reason = encoded["reason"]
            if reason.null_count < len(reason):
                bad.append(
                    encoded.filter(reason.is_valid()).select(rejected.ITEMS.names).cast(rejected.ITEMS)
                )
                encoded = encoded.filter(reason.is_null())
            skipped.append(skipped_pictures(encoded).cast(rejected.ITEMS))
            yield encoded.drop_columns(["reason", "skipped", "file", "row"])
        if bad:
            rejected.write_part(self.directory, "items", unit["number"], pa.concat_tables(bad))
        if any(part.num_rows for part in skipped):
            rejected.write_part(self.directory, "pictures", unit["number"], pa.concat_tables(skipped))


class EncodeWorker:
    """An actor that encodes units: its process keeps the named encoders."""

    def __init__(self, job: EncodeJob, text: ray.ObjectRef[Any]) -> None:
        import ray

        self._job, self._text = job, ray.get(text)

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """Encoded good rows of the unit that a table of one row names."""
        (unit,) = table.to_pylist()
        yield from self._job.unit(unit, self._text)


@dataclass(frozen=True)
class ItemSplit:
    """Splits encoded items by shard: a shard is a range of the item hash."""

    modalities: tuple[str, ...]
    shards: int

    def split(self, blocks: list[pa.Table]) -> tuple[list[pa.Table], dict[str, NDArray[np.int64]]]:
        """Rows by shard, and their sizes.

        Returns:
            A table per shard; `counts` int64 [shards], and `sizes`: `token_sizes`.
        """
        table = pa.concat_tables(blocks)
        shard = range_of(np.asarray(table["hash"], dtype=np.uint64), self.shards)
        summary = {
            "counts": np.bincount(shard, minlength=self.shards).astype(np.int64),
            "sizes": token_sizes(table, self.modalities),
        }
        return split_by(table, shard, self.shards), summary


def token_sizes(table: pa.Table, modalities: tuple[str, ...]) -> NDArray[np.int64]:
    """Bytes, tokens, items that have some, and most tokens of one item, int64 [modalities, 4].

    Args:
        table: Encoded items.
        modalities: Names of all modalities.
    """
    sizes = []
    for modality in modalities:
        tokens = np.asarray(table[f"tokens.{modality}"], dtype=np.int64)
        stored = int(pc.sum(pc.binary_length(table[f"feature.{modality}"])).as_py() or 0)
        sizes.append([stored, int(tokens.sum()), int((tokens > 0).sum()), int(tokens.max(initial=0))])
    return np.array(sizes, dtype=np.int64).reshape(-1, 4)
