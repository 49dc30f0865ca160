"""A whole semantic ID in one int64, so that tables of IDs are sorted, counted and searched as integers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qbrec.errors import ConfigError


def code_bits(sizes: Sequence[int]) -> tuple[int, ...]:
    """Bits per level, ceil(log2 K_l).

    Raises:
        ConfigError: An ID does not fit into 63 bits.
    """
    bits = tuple(max(int(size) - 1, 0).bit_length() for size in sizes)
    if sum(bits) > 63:
        raise ConfigError(
            f"a semantic ID of levels {tuple(sizes)} takes {sum(bits)} bits; at most 63 fit",
            where="quantizer.levels",
            fix="use fewer or smaller levels",
        )
    return bits


def pack(codes: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Integers that sort like the codes, level 0 first.

    Args:
        codes: Unsigned or signed integers [N, l], l <= L; fewer columns pack a prefix.
        sizes: Codes per level [L].

    Returns:
        int64 [N].
    """
    out = np.zeros(len(codes), dtype=np.int64)
    for level, bits in enumerate(code_bits(sizes)[: codes.shape[1]]):
        out = (out << bits) | codes[:, level].astype(np.int64)
    return out


def unpack(packed: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """The codes int64 [N, L] of packed IDs int64 [N]."""
    bits = code_bits(sizes)
    out = np.empty((len(packed), len(bits)), dtype=np.int64)
    rest = packed.astype(np.int64)
    for level in range(len(bits) - 1, -1, -1):
        out[:, level] = rest & ((1 << bits[level]) - 1)
        rest = rest >> bits[level]
    return out


def code_dtype(sizes: Sequence[int]) -> np.dtype[np.unsignedinteger]:
    """The smallest unsigned type that holds every code."""
    return np.dtype(np.min_scalar_type(max(sizes) - 1))


def bucket_order(packed: np.ndarray, popularity: np.ndarray) -> np.ndarray:
    """Rows sorted by (packed ID, popularity descending, row): int64 [N]."""
    return np.lexsort((np.arange(len(packed)), -popularity.astype(np.int64), packed)).astype(np.int64)
