"""Items on Ray Data: scan (ids, word counts) → encode → shuffle by shard → one tar per Ray task."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from qbrec.catalog.contract import Domain
from qbrec.catalog.encode import DISPLAY, ItemEncoder, category_paths, from_binary, item_texts, strings
from qbrec.catalog.index import Locations
from qbrec.catalog.ngrams import NUM_BUCKETS
from qbrec.catalog.rejected import ITEMS, pack
from qbrec.catalog.text import FIELDS, SAMPLE_TEXTS, HashedNgramEncoder, document_frequencies, normalise
from qbrec.catalog.units import read_unit, write_part
from qbrec.config.sections import CatalogConfig
from qbrec.storage.blocks import BlockTarWriter
from qbrec.storage.hashing import hash64, hash_bytes, rows_of

_TEXT_COLUMNS = ("title", "description", "brand", "categories")
_BATCH_ROWS = 2_048


def scan_unit(
    unit: dict[str, Any], domains: list[Domain], *, count_words: bool, sample_share: float
) -> dict[str, Any]:
    """Ids of a unit, and what the text encoder is frozen from.

    Returns:
        hashes and places (of rows with an id), number, and when words are counted: per field the number of
        texts, the buckets and counts of their n-grams, and the sample's texts.
    """
    domain = domains[unit["domain"]]
    count_words &= domain.encodes_text
    columns = ["item_id", *(c for c in _TEXT_COLUMNS if count_words and c in domain.columns)]
    hashes, places = [], []
    frequencies = np.zeros((len(FIELDS), NUM_BUCKETS), dtype=np.int64)
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
        chosen = pa.array(valid & (batch <= np.uint64(sample_share * (2**64 - 2048))))
        for number, (name, raw) in enumerate(item_texts(table, category_paths(table)).items()):
            texts = normalise(raw)
            frequencies[number] += document_frequencies(texts)
            num_texts[number] += int(pc.sum(pc.greater(pc.utf8_length(texts), 0)).as_py() or 0)
            sample[name].extend(text for text in texts.filter(chosen).to_pylist() if text)
    where = np.flatnonzero(frequencies.ravel())
    return {
        "number": unit["number"],
        "hashes": np.concatenate(hashes).tobytes(),
        "places": np.concatenate(places).tobytes(),
        "num_texts": num_texts.tobytes(),
        "buckets": where.astype(np.int32).tobytes(),
        "counts": frequencies.ravel()[where].astype(np.int32).tobytes(),
        **{f"sample.{name}": texts for name, texts in sample.items()},
    }


class ScanResult:
    """Adds up the summaries of `scan_unit`; the order in which they come changes nothing."""

    def __init__(self) -> None:
        self._parts: dict[int, tuple[NDArray[np.uint64], NDArray[np.int32]]] = {}
        self._frequencies = np.zeros(len(FIELDS) * NUM_BUCKETS, dtype=np.int64)
        self._num_texts = np.zeros(len(FIELDS), dtype=np.int64)
        self._sample: dict[str, set[str]] = {name: set() for name in FIELDS}

    def add(self, summary: dict[str, Any]) -> None:
        """Take one unit's summary."""
        self._parts[summary["number"]] = (
            np.frombuffer(summary["hashes"], np.uint64), np.frombuffer(summary["places"], np.int32),
        )  # fmt: skip
        where = np.frombuffer(summary["buckets"], np.int32)
        self._frequencies[where] += np.frombuffer(summary["counts"], np.int32)
        self._num_texts += np.frombuffer(summary["num_texts"], np.int64)
        for name in FIELDS:
            self._sample[name].update(summary[f"sample.{name}"])

    def locations(self) -> Locations:
        """Where every item stands."""
        parts = [self._parts[number] for number in sorted(self._parts)]
        unit = np.repeat(np.array(sorted(self._parts), dtype=np.int32), [len(hashes) for hashes, _ in parts])
        hashes, places = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
        return Locations(hashes, unit, places)

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
    """What an encoding task needs beside its unit."""

    config: CatalogConfig
    domains: list[Domain]
    modalities: tuple[str, ...]
    display: pa.Schema

    def unit(self, unit: dict[str, Any], text: HashedNgramEncoder | None) -> Iterator[pa.Table]:
        """Encoded rows of one unit, batch by batch."""
        domain = self.domains[unit["domain"]]
        encoder = ItemEncoder(self.config, modalities=self.modalities, display=self.display, text=text)
        columns = [c for c in domain.columns if c != "image_path" or domain.picture_column == c]
        if domain.picture_column != "image":
            columns = [c for c in columns if c != "image"]
        columns += [column for column, _ in domain.embeddings.values()] + domain.display.names
        for first_row, table in read_unit(unit, columns, batch_rows=_BATCH_ROWS):
            yield encoder.encode(table, domain, file=unit["file"], first_row=first_row)


def summarise(encoded: pa.Table, modalities: tuple[str, ...]) -> dict[str, Any]:
    """What the driver must know of encoded rows: hashes of the good ones, the bad ones, sizes by modality."""
    good = encoded.filter(encoded["reason"].is_null())
    bad = encoded.filter(encoded["reason"].is_valid())
    sizes = []
    for modality in modalities:
        tokens = np.asarray(good[f"tokens.{modality}"], dtype=np.int64)
        stored = int(pc.sum(pc.binary_length(good[f"feature.{modality}"])).as_py() or 0)
        sizes.append([stored, int(tokens.sum()), int((tokens > 0).sum()), int(tokens.max(initial=0))])
    return {
        "hashes": np.asarray(good["hash"], dtype=np.uint64).tobytes(),
        "rejected": pack(bad.select(ITEMS.names).cast(ITEMS)),
        "sizes": np.array(sizes, dtype=np.int64).reshape(-1, 4).tobytes(),
    }


@dataclass(frozen=True)
class ShardJob:
    """What a task that writes one shard of items needs beside its rows.

    Attributes:
        directory: The artifact under construction (on storage that all workers see).
        widths: Width of every modality that some item has.
        domain_names: Name of every domain, by number.
        rows_per_block: Items per block; blocks never cross the grid of `rows_per_shard`.
    """

    directory: Path
    widths: dict[str, int]
    domain_names: tuple[str, ...]
    rows_per_shard: int
    rows_per_block: int

    def assign(self, encoded: pa.Table, hashes: NDArray[np.uint64]) -> pa.Table:
        """Good rows with their number among all items, and the shard it falls into."""
        good = encoded.filter(encoded["reason"].is_null())
        rows = rows_of(hashes, np.asarray(good["hash"], dtype=np.uint64))
        assert (rows >= 0).all()
        absent = [c for c in good.column_names if c.partition(".")[0] in ("feature", "tokens")]
        keep = {f"{kind}.{m}" for m in self.widths for kind in ("feature", "tokens")}
        good = good.drop_columns([*(c for c in absent if c not in keep), "reason", "file", "row", "hash"])
        shards = pa.array(rows // self.rows_per_shard)
        return good.append_column("row", pa.array(rows)).append_column("shard", shards)

    def write(self, group: pa.Table) -> dict[str, Any]:
        """Write `items-<shard>.tar` and its part of items.arrow; returns index records and sums."""
        table = group.combine_chunks().sort_by("row")
        shard = int(table["shard"][0].as_py())
        rows = np.asarray(table["row"], dtype=np.int64)
        assert rows[0] == shard * self.rows_per_shard, "a shard begins on the grid"
        assert (np.diff(rows) == 1).all(), "a shard has all its rows"
        n = len(rows)
        structure = table["structure"].combine_chunks()
        slots = structure.type.byte_width // 4
        buffer = np.frombuffer(structure.buffers()[1], dtype=np.int32).reshape(-1, slots)
        dense: dict[str, NDArray[Any]] = {
            "row": rows,
            "domain": np.asarray(table["domain"], dtype=np.uint8),
            "structure": buffer[structure.offset : structure.offset + n],
            "content": np.asarray(table["content"], dtype=np.int64),
        }
        values, offsets = {}, {}
        for modality, width in self.widths.items():
            dense[f"tokens.{modality}"] = np.asarray(table[f"tokens.{modality}"], dtype=np.uint8)
            values[modality] = from_binary(table[f"feature.{modality}"], width)
            offsets[modality] = np.concatenate([[0], np.cumsum(dense[f"tokens.{modality}"], dtype=np.int64)])
        sums = {modality: np.zeros((2, width)) for modality, width in self.widths.items()}
        with BlockTarWriter(self.directory, prefix="items", first_shard=shard, shard_bytes=1 << 62) as writer:
            for begin in range(0, n, self.rows_per_block):
                end = min(begin + self.rows_per_block, n)
                fields = {name: array[begin:end] for name, array in dense.items()}
                for modality in self.widths:
                    span = slice(offsets[modality][begin], offsets[modality][end])
                    fields[f"feature.{modality}"] = values[modality][span]
                    wide = values[modality][span].astype(np.float64)
                    sums[modality] += np.stack([wide.sum(axis=0), np.square(wide).sum(axis=0)])
                writer.add(fields, end - begin)
            records = writer.close()
        self._write_display(table, shard)
        return {
            "shard": shard,
            "records": np.ascontiguousarray(records).tobytes(),
            "content": dense["content"].tobytes(),
            "domains": dense["domain"].tobytes(),
            **{f"sums.{modality}": both.tobytes() for modality, both in sums.items()},
        }

    def _write_display(self, table: pa.Table, shard: int) -> None:
        domain = pa.array(self.domain_names).take(table["domain"].combine_chunks())
        columns: dict[str, Any] = {"row": table["row"], "domain": domain}
        columns |= {name: table[name] for name in ("item_id", "title", "brand", "categories")}
        # A column of the input that bears one of our names would shadow it.
        for name in table.column_names:
            if name.startswith(DISPLAY):
                own = name.removeprefix(DISPLAY)
                columns[own if own not in columns else f"input.{own}"] = table[name]
        part = pa.table(columns)
        write_part(part, self.directory / f"items.part-{shard:06d}.tmp")
