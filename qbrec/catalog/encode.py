"""From a batch of raw items to one row of bytes per item: features and hashes, or why it was rejected."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from qbrec.catalog.contract import Domain, as_vectors
from qbrec.catalog.image import SIDE, BadImageError, decode, open_picture, pixel_statistics
from qbrec.catalog.named import image_encoder, text_encoder
from qbrec.catalog.text import FIELDS, HashedNgramEncoder, normalise
from qbrec.config.sections import CatalogConfig
from qbrec.storage.hashing import SEPARATOR, hash64, hash_bytes

BUILT_IN_TEXT, BUILT_IN_IMAGE = "hashed-ngram", "pixel-statistics"
DISPLAY = "display."
Tokens = tuple[NDArray[np.float16], NDArray[np.uint8]]  # values [Σ, d], tokens of every item [n]


def strings(table: pa.Table, column: str) -> pa.Array:
    """A string column as one array; nulls where the table has no such column."""
    if column not in table.column_names:
        return pa.nulls(table.num_rows, pa.string())
    return table[column].combine_chunks().cast(pa.string())


def category_paths(table: pa.Table) -> list[tuple[str, ...]]:
    """Category path of every item, root first, without empty names."""
    if "categories" not in table.column_names:
        return [()] * table.num_rows
    paths = table["categories"].to_pylist()
    return [tuple(s for name in path if name and (s := name.strip())) if path else () for path in paths]


def item_texts(table: pa.Table, paths: list[tuple[str, ...]]) -> dict[str, pa.Array]:
    """The three text fields as they are: title, description, labels (categories and brand)."""
    brand = pc.fill_null(strings(table, "brand"), "")
    labels = pc.binary_join_element_wise(
        pa.array([" ".join(path) for path in paths], pa.string()), brand, " "
    )
    return {"title": strings(table, "title"), "description": strings(table, "description"), "labels": labels}


class ItemEncoder:
    """Encodes batches of raw items of any domain.

    Args:
        config: The catalogue's configuration.
        modalities: Names of all modalities of the catalogue: every domain's rows carry all of them.
        display: Further columns of all domains together.
        text: The frozen built-in text encoder; None where text is not encoded with it.
    """

    def __init__(
        self,
        config: CatalogConfig,
        *,
        modalities: tuple[str, ...],
        display: pa.Schema,
        text: HashedNgramEncoder | None,
    ) -> None:
        self._config, self._modalities, self._display, self._text = config, modalities, display, text
        self._structure: dict[tuple[str, ...], list[int]] = {}
        self._roots = tuple(os.path.realpath(root) for root in config.image.roots)

    def encode(self, table: pa.Table, domain: Domain, *, file: int, first_row: int) -> pa.Table:
        """One output row per input row; rejected rows have a `reason` and no features.

        Returns:
            hash uint64, item_id, domain int32, file int32, row int64 (in the file), reason (null: good),
            content int64, structure (int32 bytes), by modality `feature.<m>` (float16 bytes) and `tokens.<m>`
            uint8, title, brand, categories and `display.<column>` for the further columns.
        """
        n = table.num_rows
        reasons = np.full(n, None, dtype=object)
        ids = strings(table, "item_id")
        reasons[ids.is_null().to_numpy(zero_copy_only=False)] = "item_id: is null"
        reasons[pc.equal(pc.fill_null(ids, "x"), "").to_numpy(zero_copy_only=False)] = "item_id: is empty"
        hashes = hash64(domain.name, pc.fill_null(ids, "").to_pylist())
        paths = category_paths(table)
        content: list[list[bytes]] = [[] for _ in range(n)]
        features: dict[str, Tokens] = {}
        if domain.encodes_text:
            features["text"] = self._encode_text(table, paths, content)
        if domain.picture_column:
            features["image"] = self._encode_images(table[domain.picture_column], domain, reasons, content)
        for modality, (column, width) in sorted(domain.embeddings.items()):
            vectors, present, fault = as_vectors(table[column], width)
            for code, what in ((1, "has a wrong length"), (2, "holds NaN or a number beyond float16")):
                _reject(reasons, fault == code, f"{column}: {what}")
            present &= fault == 0
            features[modality] = vectors[present], present.astype(np.uint8)
            for i in np.flatnonzero(present):
                content[i].append(modality.encode() + SEPARATOR + vectors[i].tobytes())
        columns = {
            "hash": hashes,
            "item_id": ids,
            "domain": np.full(n, domain.number, dtype=np.int32),
            "file": np.full(n, file, dtype=np.int32),
            "row": np.arange(first_row, first_row + n, dtype=np.int64),
            "reason": pa.array(reasons, pa.string()),
            # An item that shows nothing is equal to no other one.
            "content": np.where(
                [bool(parts) for parts in content],
                hash_bytes(b"\x1e".join(parts) for parts in content),
                hashes,
            ).view(np.int64),
            "structure": _fixed(self.structure(table, paths)),
        }
        for modality in self._modalities:
            values, tokens = features.get(modality, (np.zeros((0, 1), np.float16), np.zeros(n, np.uint8)))
            columns[f"feature.{modality}"] = as_binary(values, tokens)
            columns[f"tokens.{modality}"] = tokens
        columns |= {"title": strings(table, "title"), "brand": strings(table, "brand")}
        columns["categories"] = pa.array([list(path) for path in paths], pa.list_(pa.string()))
        for wanted in self._display:
            own = wanted.name in domain.display.names
            columns[f"{DISPLAY}{wanted.name}"] = (
                table[wanted.name].combine_chunks().cast(wanted.type) if own else pa.nulls(n, wanted.type)
            )
        return pa.table(columns)

    def structure(self, table: pa.Table, paths: list[tuple[str, ...]]) -> NDArray[np.int32]:
        """Buckets of every prefix of the category path and, last, of the brand: int32 [n, S], -1 absent."""
        depth, buckets = self._config.structure_depth, self._config.structure_buckets
        brands = strings(table, "brand").to_pylist()
        out = np.full((len(paths), depth + 1), -1, dtype=np.int32)
        for i, (path, brand) in enumerate(zip(paths, brands, strict=True)):
            if path:
                if path not in self._structure:
                    keys = [
                        "\x1f".join(("category", *path[: d + 1])).encode()
                        for d in range(min(depth, len(path)))
                    ]
                    self._structure[path] = (hash_bytes(keys) % np.uint64(buckets)).astype(int).tolist()
                codes = self._structure[path]
                out[i, : len(codes)] = codes
            if brand and (name := brand.strip().lower()):
                key = ("\x1fbrand", name)
                if key not in self._structure:
                    self._structure[key] = (
                        hash_bytes(["\x1f".join(key).encode()]) % np.uint64(buckets)
                    ).tolist()
                out[i, depth] = self._structure[key][0]
        return out

    def _encode_text(
        self, table: pa.Table, paths: list[tuple[str, ...]], content: list[list[bytes]]
    ) -> Tokens:
        config = self._config.text
        raw = item_texts(table, paths)
        clean = {name: normalise(raw[name]) for name in FIELDS}
        present = np.stack(
            [pc.greater(pc.utf8_length(clean[f]), 0).to_numpy(zero_copy_only=False) for f in FIELDS], axis=1
        )
        for i, texts in enumerate(zip(*(clean[name].to_pylist() for name in FIELDS), strict=True)):
            if any(texts):
                content[i].append(b"text" + SEPARATOR + SEPARATOR.join(text.encode() for text in texts))
        if self._text is not None:
            vectors = np.stack([self._text.encode(clean[f], field=f) for f in FIELDS], axis=1)[present]
            return vectors.astype(np.float16), present.sum(axis=1).astype(np.uint8)
        wanted = np.stack([raw[name].to_pylist() for name in FIELDS], axis=1)[present].tolist()
        if not wanted:
            return np.zeros((0, 1), np.float16), present.sum(axis=1).astype(np.uint8)
        encoder = text_encoder(config.encoder, config.revision, config.batch_size)
        return encoder.encode(wanted).astype(np.float16), present.sum(axis=1).astype(np.uint8)

    def _encode_images(
        self, column: pa.ChunkedArray, domain: Domain, reasons: NDArray[Any], content: list[list[bytes]]
    ) -> Tokens:
        config = self._config.image
        built_in = config.encoder == BUILT_IN_IMAGE
        pictures: list[Any] = []
        tokens = np.zeros(len(reasons), dtype=np.uint8)
        for i, value in enumerate(column.to_pylist()):
            if not value:
                continue
            try:
                data = self._read_picture(value) if domain.picture_column == "image_path" else value
                reader = decode if built_in else open_picture
                pictures.append(reader(data, max_pixels=config.max_pixels))
            except BadImageError as error:
                reasons[i] = reasons[i] or f"{domain.picture_column}: {error}"
                continue
            tokens[i] = 1
            content[i].append(b"image" + SEPARATOR + data)
        if built_in:
            stacked = np.stack(pictures) if pictures else np.zeros((0, SIDE, SIDE, 3), np.uint8)
            return pixel_statistics(stacked).astype(np.float16), tokens
        if not pictures:
            return np.zeros((0, 1), np.float16), tokens
        encoder = image_encoder(config.encoder, config.revision, config.batch_size)
        return encoder.encode(pictures).astype(np.float16), tokens

    def _read_picture(self, path: str) -> bytes:
        if "://" in path:
            raise BadImageError("is a URL")
        fault = "lies outside catalog.image.roots"
        for root in self._roots:
            # Resolved before it is compared, so that neither `..` nor a link leads outside.
            real = os.path.realpath(os.path.join(root, path))
            if os.path.commonpath([root, real]) != root:
                continue
            try:
                with open(real, "rb") as file:
                    return file.read()
            except OSError:
                fault = "cannot be read"  # a relative path may lie below a later root
        raise BadImageError(fault)


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
