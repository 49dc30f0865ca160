"""Loops over rows, compiled by numba on first use; the compiled code is kept beside this file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Kernel = TypeVar("Kernel", bound=Callable[..., object])
_ROUND = 1.5 * 2.0**52
# Sums may be reordered, so that they are vectorised: every decision below allows for their error.
_FAST = {"nnan", "ninf", "nsz", "contract", "reassoc"}


def compiled(function: Kernel, **options: Any) -> Kernel:
    """`function` compiled, to run without the interpreter's lock; kept on disk where that can be written."""
    try:
        return numba.njit(function, nogil=True, cache=True, **options)  # type: ignore[no-any-return]
    except RuntimeError:  # installed read-only and no home: each process compiles for itself, some seconds
        return numba.njit(function, nogil=True, **options)  # type: ignore[no-any-return]


def fast(function: Kernel) -> Kernel:
    """`compiled`, with sums in any order."""
    return compiled(function, fastmath=_FAST)


@compiled
def gather_flagged(flags: NDArray[np.uint8], words: NDArray[np.uint64], found: NDArray[np.int64]) -> int:
    """Write the places of flags that are 1 to `found` and tell how many; `words` are the flags by eights."""
    n = 0
    for w in range(len(words)):
        if words[w] != 0:
            for k in range(8 * w, 8 * w + 8):
                found[n] = k
                n += flags[k]
    return n


@fast
def settle(
    partial: Floats, x: Floats, tail: Floats, slack: Floats, centroids: Floats, half: Floats,
    centroid_tail: Floats, codes: NDArray[np.int32],
) -> None:  # fmt: skip
    """Nearest centroids from scores of a few directions: bound the rest, look closely where it may matter.

    Args:
        partial: Scores over the leading directions, float32 [b, K]: x₁·c₁ - |c|²/2.
        x: Rows float32 [b, D].
        tail: Upper bound of the length of each row outside those directions, float32 [b].
        slack: Twice the largest error of a float32 score, per row [b].
        centroids: float32 [K, D].
        half: |c|²/2, float32 [K].
        centroid_tail: As `tail`, of the centroids, float32 [K].
        codes: int32 [b]; in: a guess; out: the nearest, lowest on ties.
    """
    num_codes, width = centroids.shape
    # Eight flags are tested as one word; codes beyond the last one are never flagged.
    flags = np.zeros((num_codes + 7) // 8 * 8, dtype=np.uint8)
    words = flags.view(np.uint64)
    found = np.empty(len(flags) + 1, dtype=np.int64)
    for r in range(x.shape[0]):
        guess = codes[r]
        dot = np.float32(0)
        for j in range(width):
            dot += x[r, j] * centroids[guess, j]
        best, best_code, close = dot - half[guess], guess, False
        margin, reach = slack[r], tail[r]
        floor = best - margin
        for k in range(num_codes):
            flags[k] = partial[r, k] + reach * centroid_tail[k] >= floor
        flags[guess] = 0
        n = gather_flagged(flags, words, found)
        for i in range(n):
            k = found[i]
            dot = np.float32(0)
            for j in range(width):
                dot += x[r, j] * centroids[k, j]
            score = dot - half[k]
            if score >= best - margin:
                # A new best may leave the earlier ones behind by more than the margin.
                close = score <= best + margin
                if score > best:
                    best, best_code = score, k
        if close:
            found[n] = guess
            best_code = exact_nearest(x[r], centroids, found[: n + 1])
        codes[r] = best_code


@compiled
def exact_nearest(x: Floats, centroids: Floats, codes: NDArray[np.int64]) -> int:
    """The nearest of some centroids to a row, in float64, the lowest on ties."""
    best, best_code = -np.inf, -1
    for k in codes:
        score = 0.0
        for j in range(len(x)):
            c = np.float64(centroids[k, j])
            score += c * (np.float64(x[j]) - 0.5 * c)
        if score > best or (score == best and k < best_code):
            best, best_code = score, k
    return best_code


@fast
def decide(scores: Floats, x: Floats, slack: Floats, centroids: Floats, codes: NDArray[np.int64]) -> None:
    """Code of the best exact score of each row.

    Args:
        scores: Float32 scores [b, K].
        x: Rows float32 [b, D].
        slack: Twice the largest error of a score, per row [b].
        centroids: float32 [K, D].
        codes: int64 [b]; in: of the best float32 score; out: of the best exact one.
    """
    num_codes = scores.shape[1]
    flags = np.zeros((num_codes + 7) // 8 * 8, dtype=np.uint8)
    words = flags.view(np.uint64)
    found = np.empty(len(flags) + 1, dtype=np.int64)
    for r in range(scores.shape[0]):
        floor = scores[r, codes[r]] - slack[r]
        for k in range(num_codes):
            flags[k] = scores[r, k] >= floor
        n = gather_flagged(flags, words, found)
        if n > 1:
            codes[r] = exact_nearest(x[r], centroids, found[:n])


@compiled
def move_rows(
    x: Floats, old: NDArray[np.int32], new: NDArray[np.int64], scale: float, total: NDArray[np.int64]
) -> None:
    """Take rows out of the sums of their old codes and add them to those of their new ones.

    Args:
        x: Rows float32 [b, D], |x| scale <= 2^50.
        old: Their codes so far int32 [b]; -1: in no sum. Out: the new codes.
        new: Their new codes int64 [b]; -1: in no sum.
        scale: A power of two.
        total: int64 [K, D + 1], sums of rint(x scale) per code; the last column counts.
    """
    width = x.shape[1]
    # Added to this number, a double is rounded to an integer in its lowest bits: vectorised, unlike a cast.
    shifted = np.empty(width, dtype=np.float64)
    bits = shifted.view(np.int64)
    zero = np.full(1, _ROUND).view(np.int64)[0]
    for r in range(x.shape[0]):
        if old[r] != new[r]:
            for j in range(width):
                shifted[j] = np.float64(x[r, j]) * scale + _ROUND
            if old[r] >= 0:
                k = old[r]
                total[k, width] -= 1
                for j in range(width):
                    total[k, j] -= bits[j] - zero
            if new[r] >= 0:
                k = new[r]
                total[k, width] += 1
                for j in range(width):
                    total[k, j] += bits[j] - zero
            old[r] = new[r]


@fast
def subtract(x: Floats, centroids: Floats, codes: NDArray[np.int64], norms: Floats) -> None:
    """Take from each row the centroid of its code, in place, and tell the lengths of what is left.

    Args:
        x: Rows float32 [b, D].
        centroids: float32 [K, D].
        codes: int64 [b].
        norms: float32 [b]; out.
    """
    for r in range(x.shape[0]):
        k, square = codes[r], np.float32(0)
        for j in range(x.shape[1]):
            left = x[r, j] - centroids[k, j]
            x[r, j] = left
            square += left * left
        norms[r] = np.sqrt(square)
