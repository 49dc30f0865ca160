"""The pictures of a batch of items: read, decoded and encoded, some at a time; why some are left out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from qbrec.catalog.contract import is_list
from qbrec.catalog.encoders.content import hash_sequences
from qbrec.catalog.encoders.fetch import PictureReader
from qbrec.catalog.encoders.fields import flat
from qbrec.catalog.encoders.image import BadImageError, decode_parts, open_picture, picture_tokens
from qbrec.catalog.encoders.models import BUILT_IN_IMAGE
from qbrec.catalog.encoders.named import image_encoder
from qbrec.config.sections import ImageConfig
from qbrec.storage.hashing import hash_bytes

TOO_MANY = "is beyond catalog.image.max_pictures"
_WINDOW = 256  # pictures held at a time where they are small once decoded


@dataclass(frozen=True)
class EncodedPictures:
    """Feature tokens of the pictures of n items.

    Attributes:
        values: float16 [Σ, d], by item, its pictures in their order.
        tokens: Feature tokens of each item, uint8 [n].
        content: Hash of the bytes of its pictures, uint64 [n]; only of items that have some.
        reasons: Why an item is rejected, by item.
        skipped: Why pictures were left out, by item.
    """

    values: NDArray[np.float16]
    tokens: NDArray[np.uint8]
    content: NDArray[np.uint64]
    reasons: dict[int, str]
    skipped: dict[int, list[str]]


class PictureEncoder:
    """Encodes columns of pictures (`image`) or of their places (`image_path`).

    Args:
        config: The image section of the catalogue's configuration.
        reader: Reads the places.
        device: `cpu` or `cuda`, for a named encoder.
    """

    def __init__(self, config: ImageConfig, *, reader: PictureReader, device: str) -> None:
        self._config, self._reader, self._device = config, reader, device

    def encode(self, column: pa.ChunkedArray, *, paths: bool, wanted: NDArray[np.bool_]) -> EncodedPictures:
        """Encode the pictures of n items.

        Args:
            column: Bytes or strings [n], or lists of them; null and empty ones are no pictures.
            paths: Whether they are places.
            wanted: Items worth reading pictures for, bool [n].
        """
        owner, pictures = _pictures(column, wanted)
        counts = np.bincount(owner, minlength=len(wanted))
        place = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
        inside = place < self._config.max_pictures
        skipped: dict[int, list[str]] = {}
        for item in owner[~inside]:
            skipped.setdefault(int(item), []).append(TOO_MANY)
        owner, pictures = owner[inside], pictures.filter(pa.array(inside))
        built_in = self._config.encoder == BUILT_IN_IMAGE
        size = _WINDOW if built_in else self._config.batch_size
        found: list[tuple[np.uint64, NDArray[np.float16]] | BadImageError] = []
        for begin in range(0, len(owner), size):
            found += self._window(pictures.slice(begin, size).to_pylist(), paths)
        reasons: dict[int, str] = {}
        for item, result in zip(owner.tolist(), found, strict=True):
            if isinstance(result, BadImageError):
                if self._config.on_error == "reject":
                    reasons.setdefault(item, str(result))
                else:
                    skipped.setdefault(item, []).append(str(result))
        kept = [
            (item, result)
            for item, result in zip(owner.tolist(), found, strict=True)
            if not isinstance(result, BadImageError) and item not in reasons
        ]
        of = np.array([item for item, _ in kept], dtype=np.int64)
        hashes = np.array([result[0] for _, result in kept], dtype=np.uint64)
        values = [result[1] for _, result in kept]
        tokens = np.bincount(of, minlength=len(wanted)) * self._config.tokens_per_picture
        return EncodedPictures(
            np.concatenate(values) if values else np.zeros((0, 1), np.float16),
            tokens.astype(np.uint8),
            hash_sequences(of, hashes, len(wanted)),
            reasons,
            skipped,
        )

    def _window(
        self, pictures: list[Any], paths: bool
    ) -> list[tuple[np.uint64, NDArray[np.float16]] | BadImageError]:
        """Hash of the bytes and tokens float16 [t, d] of a few pictures, or what is wrong with them."""
        config = self._config
        grid = config.grid if config.tokens == "grid" else None
        if config.encoder == BUILT_IN_IMAGE:
            found = self._decode(
                pictures, paths, partial(decode_parts, max_pixels=config.max_pixels, grid=grid)
            )
            encode: Callable[[list[Any]], NDArray[np.float32]] = picture_tokens
        else:
            encoder = image_encoder(config, self._device)
            found = self._decode(
                pictures, paths, partial(open_picture, max_pixels=config.max_pixels, side=encoder.side)
            )
            encode = partial(encoder.encode, grid=grid)
        good = [result[1] for result in found if not isinstance(result, BadImageError)]
        tokens = iter(encode(good) if good else ())
        return [
            result
            if isinstance(result, BadImageError)
            else (result[0], np.asarray(next(tokens), dtype=np.float16))
            for result in found
        ]

    def _decode(
        self, pictures: list[Any], paths: bool, decoder: Any
    ) -> list[tuple[np.uint64, Any] | BadImageError]:
        def work(data: bytes) -> tuple[np.uint64, Any]:
            if len(data) > self._config.max_bytes:
                raise BadImageError("has more bytes than catalog.image.max_bytes")
            return cast(np.uint64, hash_bytes([data])[0]), decoder(data)

        if paths:
            return self._reader.map(pictures, work)
        found: list[tuple[np.uint64, Any] | BadImageError] = []
        for data in pictures:
            try:
                found.append(work(data))
            except BadImageError as error:
                found.append(error)
        return found


def _pictures(column: pa.ChunkedArray, wanted: NDArray[np.bool_]) -> tuple[NDArray[np.int64], pa.Array]:
    """Item of every picture, ascending, int64 [Σ], and the pictures."""
    if is_list(column.type):
        owner, values = flat(column)
    else:
        owner, values = np.arange(len(column)), column.combine_chunks()
    plain = values.cast(pa.large_string() if _is_path(values.type) else pa.large_binary())
    lengths = np.asarray(pa.compute.fill_null(pa.compute.binary_length(plain), 0))
    there = (lengths > 0) & wanted[owner]
    return owner[there], plain.filter(pa.array(there))


def _is_path(kind: pa.DataType) -> bool:
    return not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind))
