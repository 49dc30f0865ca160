"""Hashes of what items show: equal content gives equal numbers, whatever else its batch holds."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qbrec.storage.hashing import combine64, hash_bytes, mix64


def hash_vectors(vectors: NDArray[np.float16]) -> NDArray[np.uint64]:
    """64-bit hash of the bytes of every row of [n, d]; uint64 [n]."""
    n, width = vectors.shape
    padded = -(-width // 4) * 4
    if padded != width or not vectors.flags.c_contiguous:
        whole = np.zeros((n, padded), dtype=np.float16)
        whole[:, :width] = vectors
        vectors = whole
    # Each word is mixed with its place before the sum: a plain sum of products would not see two flipped
    # signs.
    words = vectors.view(np.uint64)
    places = mix64(np.arange(words.shape[1], dtype=np.uint64))
    with np.errstate(over="ignore"):
        return mix64(mix64(words + places).sum(axis=1, dtype=np.uint64) + np.uint64(width))


def hash_sequences(owner: NDArray[np.int64], tokens: NDArray[np.uint64], n: int) -> NDArray[np.uint64]:
    """One hash per item of the hashes of its tokens, in their order.

    Args:
        owner: Item of each token, ascending, int64 [Σ].
        tokens: Hash of each token, uint64 [Σ].
        n: Number of items.

    Returns:
        uint64 [n]; 0 for an item without a token.
    """
    counts = np.bincount(owner, minlength=n)
    place = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    out = np.zeros(n, dtype=np.uint64)
    with np.errstate(over="ignore"):
        np.add.at(out, owner, combine64(place.astype(np.uint64), tokens))
    return out


class Content:
    """Adds up the content of n items, modality by modality; the order of the modalities changes nothing."""

    def __init__(self, n: int) -> None:
        self._sum = np.zeros(n, dtype=np.uint64)
        self._shown = np.zeros(n, dtype=bool)

    def add(self, modality: str, hashes: NDArray[np.uint64], shown: NDArray[np.bool_]) -> None:
        """Take a modality's hash of every item; `shown` bool [n] says which items have the modality."""
        with np.errstate(over="ignore"):
            self._sum[shown] += combine64(hash_bytes([modality.encode()]), hashes[shown])
        self._shown |= shown

    def numbers(self, identity: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Content of every item, int64 [n]; an item that shows nothing is equal to no other one.

        Args:
            identity: Hash of every item's id, uint64 [n].
        """
        return np.where(self._shown, mix64(self._sum), identity).view(np.int64)
