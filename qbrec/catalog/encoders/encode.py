"""From a batch of raw items to one row of bytes per item: features and hashes, or why it was rejected."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from qbrec.catalog.contract import Domain
from qbrec.catalog.encoders.content import Content, hash_sequences, hash_vectors
from qbrec.catalog.encoders.fetch import PictureReader
from qbrec.catalog.encoders.fields import category_paths, item_texts, strings, text_tokens
from qbrec.catalog.encoders.models import BUILT_IN_IMAGE, BUILT_IN_TEXT
from qbrec.catalog.encoders.named import text_encoder
from qbrec.catalog.encoders.pictures import PictureEncoder
from qbrec.catalog.encoders.text import FIELDS, HashedNgramEncoder
from qbrec.catalog.encoders.vectors import as_vectors
from qbrec.config.sections import CatalogConfig
from qbrec.storage.hashing import combine64, hash64, hash_bytes

DISPLAY = "display."
Tokens = tuple[NDArray[np.float16], NDArray[np.uint8]]  # values [Σ, d], tokens of every item [n]


class ItemEncoder:
    """Encodes batches of raw items of any domain.

    Named encoders are loaded at their first use and stay in the process: another `ItemEncoder` finds them.

    Args:
        config: The catalogue's configuration.
        modalities: Names of all modalities of the catalogue: every domain's rows carry all of them.
        display: Further columns of all domains together.
        text: The frozen built-in text encoder; None where text is not encoded with it.
        device: Where named encoders run: `cpu` or `cuda`.
        reader: Reads `image_path`; None: as the configuration allows.
    """

    def __init__(
        self,
        config: CatalogConfig,
        *,
        modalities: tuple[str, ...],
        display: pa.Schema,
        text: HashedNgramEncoder | None,
        device: str = "cpu",
        reader: PictureReader | None = None,
    ) -> None:
        self._config, self._modalities, self._display, self._text = config, modalities, display, text
        self._device, self._reader = device, reader
        self._paths: dict[str, NDArray[np.int32]] = {}
        self._brands: dict[str, int] = {}

    def encode(self, table: pa.Table, domain: Domain, *, file: int, first_row: int) -> pa.Table:
        """One output row per input row; rejected rows have a `reason` and no features.

        Returns:
            hash uint64, item_id, domain int32, file int32, row int64 (in the file), reason (null: good),
            skipped list<string> (reasons why pictures were left out; null: none were), content int64,
            structure (int32 bytes), by modality `feature.<m>` (float16 bytes) and `tokens.<m>` uint8, title,
            brand, categories and `display.<column>` for the further columns.
        """
        n = table.num_rows
        reasons = np.full(n, None, dtype=object)
        ids = strings(table, "item_id")
        reasons[ids.is_null().to_numpy(zero_copy_only=False)] = "item_id: is null"
        reasons[pc.equal(pc.fill_null(ids, "x"), "").to_numpy(zero_copy_only=False)] = "item_id: is empty"
        hashes = hash64(domain.name, pc.fill_null(ids, "").to_pylist())
        paths = category_paths(table)
        content = Content(n)
        features: dict[str, Tokens] = {}
        for modality, (column, width) in sorted(domain.embeddings.items()):
            vectors, present, fault = as_vectors(table[column], width)
            for code, what in ((1, "has a wrong length"), (2, "holds NaN or a number beyond float16")):
                _reject(reasons, fault == code, f"{column}: {what}")
            present &= fault == 0
            features[modality] = vectors if present.all() else vectors[present], present.astype(np.uint8)
            content.add(modality, hash_vectors(vectors), present)
        if domain.encodes_text:
            features["text"] = self._encode_text(table, domain, paths, content)
        skipped: dict[int, list[str]] = {}
        if domain.picture_column:
            features["image"], skipped = self._encode_pictures(table, domain, reasons, content)
        columns = {
            "hash": hashes,
            "item_id": ids,
            "domain": np.full(n, domain.number, dtype=np.int32),
            "file": np.full(n, file, dtype=np.int32),
            "row": np.arange(first_row, first_row + n, dtype=np.int64),
            "reason": pa.array(reasons, pa.string()),
            "skipped": pa.array([skipped.get(i) for i in range(n)], pa.list_(pa.string()))
            if skipped
            else pa.nulls(n, pa.list_(pa.string())),
            "content": content.numbers(hashes),
            "structure": _fixed(self.structure(table, paths)),
        }
        for modality in self._modalities:
            values, tokens = features.get(modality, (np.zeros((0, 1), np.float16), np.zeros(n, np.uint8)))
            columns[f"feature.{modality}"] = as_binary(values, tokens)
            columns[f"tokens.{modality}"] = tokens
        columns |= {"title": strings(table, "title"), "brand": strings(table, "brand"), "categories": paths}
        for wanted in self._display:
            own = wanted.name in domain.display.names
            columns[f"{DISPLAY}{wanted.name}"] = (
                table[wanted.name].combine_chunks().cast(wanted.type) if own else pa.nulls(n, wanted.type)
            )
        return pa.table(columns)

    def structure(self, table: pa.Table, paths: pa.Array) -> NDArray[np.int32]:
        """Buckets of every prefix of the category path and, last, of the brand: int32 [n, S], -1 absent.

        Args:
            table: n items.
            paths: Their `category_paths`.
        """
        depth, buckets = self._config.structure_depth, np.uint64(self._config.structure_buckets)
        out = np.full((table.num_rows, depth + 1), -1, dtype=np.int32)
        joined = pc.binary_join(paths, "\x1f").dictionary_encode()
        # Every path and every brand is hashed once, however many items have it.
        codes = np.full((len(joined.dictionary), depth), -1, dtype=np.int32)
        for i, path in enumerate(joined.dictionary.to_pylist()):
            if path not in self._paths:
                names = path.split("\x1f")[:depth] if path else []
                keys = ["\x1f".join(("category", *names[: d + 1])).encode() for d in range(len(names))]
                self._paths[path] = (hash_bytes(keys) % buckets).astype(np.int32)
            codes[i, : len(self._paths[path])] = self._paths[path]
        out[:, :depth] = codes[np.asarray(joined.indices)]
        encoded = strings(table, "brand").dictionary_encode()
        brands = np.full(len(encoded.dictionary), -1, dtype=np.int32)
        for i, brand in enumerate(encoded.dictionary.to_pylist()):
            if brand not in self._brands:
                name = brand.strip().lower()
                key = f"\x1fbrand\x1f{name}".encode()
                self._brands[brand] = int(hash_bytes([key])[0] % buckets) if name else -1
            brands[i] = self._brands[brand]
        has = encoded.is_valid().to_numpy(zero_copy_only=False)
        out[has, depth] = brands[np.asarray(encoded.indices.drop_null())]
        return out

    def _encode_text(self, table: pa.Table, domain: Domain, paths: pa.Array, content: Content) -> Tokens:
        config = self._config.text
        texts = text_tokens(
            item_texts(table, paths, domain.attributes),
            description_tokens=config.description_tokens,
            chunk_characters=config.chunk_characters,
        )
        n = table.num_rows
        tokens = np.bincount(texts.owner, minlength=n)
        hashes = hash_bytes(text.encode() for text in texts.clean.to_pylist())
        hashes = combine64(texts.field.astype(np.uint64), hashes)
        content.add("text", hash_sequences(texts.owner, hashes, n), tokens > 0)
        if not len(texts.owner):
            return np.zeros((0, 1), np.float16), tokens.astype(np.uint8)
        if self._text is None:
            vectors = text_encoder(config, self._device).encode(texts.raw.to_pylist())
            return vectors.astype(np.float16), tokens.astype(np.uint8)
        out = np.empty((len(texts.owner), self._text.dim), dtype=np.float16)
        for number, field in enumerate(FIELDS):
            mine = np.flatnonzero(texts.field == number)
            if len(mine):
                out[mine] = self._text.encode(texts.clean.take(pa.array(mine)), field=field)
        return out, tokens.astype(np.uint8)

    def _encode_pictures(
        self, table: pa.Table, domain: Domain, reasons: NDArray[Any], content: Content
    ) -> tuple[Tokens, dict[int, list[str]]]:
        column, config = domain.picture_column, self._config.image
        assert column is not None
        self._reader = self._reader or PictureReader(config)
        encoder = PictureEncoder(config, reader=self._reader, device=self._device)
        wanted = np.array([reason is None for reason in reasons], dtype=bool)
        found = encoder.encode(table[column], paths=column == "image_path", wanted=wanted)
        for item, reason in found.reasons.items():
            reasons[item] = f"{column}: {reason}"
        content.add("image", found.content, found.tokens > 0)
        skipped = {item: [f"{column}: {what}" for what in all_] for item, all_ in found.skipped.items()}
        return (found.values, found.tokens), skipped


def skipped_pictures(encoded: pa.Table) -> pa.Table:
    """The pictures that encoded items left out, one row each: domain, file, row, item_id, reason."""
    part = encoded.select(["domain", "file", "row", "item_id", "skipped"]).combine_chunks()
    reasons = part["skipped"].combine_chunks()
    places = part.drop_columns(["skipped"]).take(pc.list_parent_indices(reasons))
    return places.append_column("reason", pc.list_flatten(reasons))


def _reject(reasons: NDArray[Any], where: NDArray[np.bool_], reason: str) -> None:
    reasons[where & (reasons == None)] = reason  # noqa: E711 - element-wise on an object array


def _fixed(values: NDArray[np.int32]) -> pa.Array:
    data = pa.py_buffer(np.ascontiguousarray(values))
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(values.shape[1] * 4), len(values), [None, data])


def as_binary(values: NDArray[np.float16], tokens: NDArray[np.uint8]) -> pa.Array:
    """Ragged tokens as one binary value per item: what Ray Data shuffles without looking inside."""
    width = values.shape[1] * 2
    offsets = np.zeros(len(tokens) + 1, dtype=np.int64)
    np.cumsum(tokens.astype(np.int64) * width, out=offsets[1:])
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(values))]
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(tokens), buffers)


def from_binary(column: pa.ChunkedArray, width: int) -> NDArray[np.float16]:
    """Values [Σ, width] of a column written by `as_binary`."""
    array = column.combine_chunks().cast(pa.large_binary())
    _, offsets_buffer, data = array.buffers()
    offsets = np.frombuffer(offsets_buffer, dtype=np.int64)[array.offset : array.offset + len(array) + 1]
    if data is None or offsets[-1] == offsets[0]:
        return np.zeros((0, width), dtype=np.float16)
    flat = np.frombuffer(data, dtype=np.uint8)[offsets[0] : offsets[-1]].view(np.float16)
    return flat.reshape(-1, width)


__all__ = [
    "BUILT_IN_IMAGE", "BUILT_IN_TEXT", "DISPLAY", "ItemEncoder", "as_binary", "category_paths", "from_binary",
    "item_texts", "skipped_pictures", "strings",
]  # fmt: skip
