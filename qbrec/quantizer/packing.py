"""A whole semantic ID in one int64, so that tables of IDs are sorted, counted and searched as integers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qbrec.errors import ConfigError

MAX_BITS = 63  # of a packed ID: an int64 that is never negative


def code_bits(sizes: Sequence[int]) -> tuple[int, ...]:
    """Bits per level, ceil(log2 K_l).

    Raises:
        ConfigError: An ID does not fit into 63 bits.
    """
    if bits_of(sizes) > MAX_BITS:
        raise ConfigError(
            f"a semantic ID of levels {tuple(sizes)} takes {bits_of(sizes)} bits; at most {MAX_BITS} fit",
            where="quantizer.levels",
            fix="use fewer or smaller levels",
        )
    return tuple(_bits(size) for size in sizes)


def bits_of(sizes: Sequence[int]) -> int:
    """Bits of a whole ID, whether it fits or not."""
    return sum(_bits(size) for size in sizes)


def _bits(size: int) -> int:
    return max(int(size) - 1, 0).bit_length()


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
        out <<= bits
        out |= codes[:, level].astype(np.int64)
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
    return lex_order(-popularity.astype(np.int64), packed)


def sort_keys(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sort integers, equal ones in the order they came.

    Args:
        keys: int64 [n].

    Returns:
        The sorted keys and their places before, int64 [n] each.
    """
    import torch

    # A radix sort over all threads: half the time of numpy's, and stable, so threads decide nothing.
    values, places = torch.from_numpy(np.array(keys, dtype=np.int64)).sort(stable=True)
    return values.numpy(), places.numpy()


def lex_order(*keys: np.ndarray) -> np.ndarray:
    """`np.lexsort`: the order int64 [n] by several keys int64 [n], the last one first; ties by place."""
    _, order = sort_keys(keys[0])
    for key in keys[1:]:
        order = order[sort_keys(key[order])[1]]
    return order


def runs(ascending: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where runs of equal values begin in a sorted array, and how long they are: int64 [r] each."""
    fresh = np.ones(len(ascending), dtype=bool)
    fresh[1:] = ascending[1:] != ascending[:-1]
    start = np.flatnonzero(fresh)
    return start, np.diff(start, append=len(ascending))


def dense_ranks(values: np.ndarray) -> tuple[np.ndarray, int]:
    """Number the different values int64 [n] in ascending order: int64 [n], and how many there are."""
    ascending, order = sort_keys(values)
    start, size = runs(ascending)
    out = np.empty(len(values), dtype=np.int64)
    out[order] = np.repeat(np.arange(len(start)), size)
    return out, len(start)
