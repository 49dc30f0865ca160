"""Hashed n-grams of text, without a Python loop over words: counts per bucket for a batch of texts.

Words, pairs of neighbouring words, and character n-grams inside words (padded with a space, as scikit-learn's
`char_wb`) are hashed into fixed buckets, so there is no vocabulary and any two machines agree.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy import sparse

from qbrec.storage.hashing import mix64

BUCKET_BITS = 18
NUM_BUCKETS = 1 << BUCKET_BITS
MAX_CHARACTERS = 1_000  # of one text: what a description says first is what it is about
CHAR_SIZES = (3, 4, 5)

# An odd base is invertible modulo 2^64: the hash of any substring is a difference of two prefix sums.
_BASE = 0x9E3779B97F4A7C15
_INVERSE = pow(_BASE, -1, 1 << 64)
_WORD, _PAIR, _CHAR = np.uint64(1 << 60), np.uint64(2 << 60), np.uint64(3 << 60)


def normalise(texts: pa.Array) -> pa.Array:
    """Lower case, no accents, letters and digits in words separated by single spaces; null becomes empty."""
    texts = pc.fill_null(texts.cast(pa.string()), "")
    texts = pc.utf8_normalize(pc.utf8_slice_codeunits(texts, 0, MAX_CHARACTERS), "NFKD")
    texts = pc.replace_substring_regex(pc.utf8_lower(texts), r"\p{M}+", "")
    return pc.utf8_trim_whitespace(pc.replace_substring_regex(texts, r"[^\p{L}\p{N}]+", " "))


def ngram_counts(texts: pa.Array) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """Counts of word n-grams (one and two words) and of character n-grams.

    Args:
        texts: n strings, already `normalise`d.

    Returns:
        Two matrices float32 [n, NUM_BUCKETS] with sorted column indices.
    """
    n = len(texts)
    if not pc.any(pc.not_equal(texts, "")).as_py():
        return tuple(sparse.csr_matrix((n, NUM_BUCKETS), dtype=np.float32) for _ in range(2))
    lengths = pc.utf8_length(texts).to_numpy(zero_copy_only=False).astype(np.int64) + 2
    joined = "".join(f" {text} " for text in texts.to_pylist())
    codes = np.frombuffer(joined.encode("utf-32-le"), dtype=np.uint32)
    document = np.repeat(np.arange(n), lengths)
    space = codes == 32
    with np.errstate(over="ignore"):
        ones = np.ones(len(codes) + 1, dtype=np.uint64)
        power, inverse = ones.copy(), ones.copy()
        power[1:], inverse[1:] = np.uint64(_BASE), np.uint64(_INVERSE)
        power, inverse = np.cumprod(power), np.cumprod(inverse)
        prefix = np.zeros(len(codes) + 1, dtype=np.uint64)
        np.cumsum((codes.astype(np.uint64) + np.uint64(1)) * power[:-1], out=prefix[1:])

        def spans(begin: NDArray[np.int64], end: NDArray[np.int64], kind: np.uint64) -> NDArray[np.uint64]:
            return mix64((prefix[end] - prefix[begin]) * inverse[begin] ^ kind) >> np.uint64(64 - BUCKET_BITS)

        begin = np.flatnonzero(space[:-1] & ~space[1:]) + 1
        end = np.flatnonzero(~space[:-1] & space[1:]) + 1
        owner = document[begin]
        pairs = np.flatnonzero(owner[:-1] == owner[1:])
        words = _count(
            n,
            np.concatenate([owner, owner[pairs]]),
            np.concatenate([spans(begin, end, _WORD), spans(begin[pairs], end[pairs + 1], _PAIR)]),
        )
        spaces_before = np.concatenate([[0], np.cumsum(space)])
        owners, buckets = [], []
        for size in CHAR_SIZES:
            start = np.arange(max(len(codes) - size + 1, 0))
            # A window stays inside one padded word when only its first or last character may be a space.
            start = start[spaces_before[start + size - 1] == spaces_before[start + 1]]
            owners.append(document[start])
            buckets.append(spans(start, start + size, _CHAR))
        chars = _count(n, np.concatenate(owners), np.concatenate(buckets))
    return words, chars


def _count(n: int, document: NDArray[np.int64], bucket: NDArray[np.uint64]) -> sparse.csr_matrix:
    keys, counts = np.unique(document << BUCKET_BITS | bucket.astype(np.int64), return_counts=True)
    offsets = np.searchsorted(keys >> BUCKET_BITS, np.arange(n + 1))
    columns = (keys & (NUM_BUCKETS - 1)).astype(np.int32)
    return sparse.csr_matrix((counts.astype(np.float32), columns, offsets), shape=(n, NUM_BUCKETS))
