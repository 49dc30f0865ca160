"""IDs of appended items beside those that are taken: only the new ones move, published IDs never do.

A new item of the content that a published ID was made of takes that ID (of several, that of the lowest row),
whatever the item that has it shows now. For all others the run's own policy holds (`quantizer.collisions`):
`none` shares IDs; `next_nearest` looks for room among the last codes; `digit` counts on within the ID;
`sinkhorn`, which assigns whole prefixes anew, cannot leave published IDs alone, so appended items are placed
as by `next_nearest`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from qbrec.config.stages import QuantizerConfig
from qbrec.errors import ConfigError
from qbrec.quantizer.collisions.next_nearest import first_of_content, next_nearest_beside
from qbrec.quantizer.packing import pack
from qbrec.quantizer.quantizer import Quantizer

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Taken:
    """Items with published IDs; collapsed ones, which never come back, are left out.

    Attributes:
        codes: Final IDs, unsigned [T, L], or [T, L + 1] with a digit.
        content: Content that each ID was made of, int64 [T].
    """

    codes: NDArray[Any]
    content: Ints


@dataclass(frozen=True)
class Placed:
    """Final IDs of new items in the type of those taken, [n, L] or [n, L + 1]; and how they came about.

    Attributes:
        codes: The IDs.
        shared: Items that took the ID of a published one of equal content.
        moved: Others whose last code is not the nearest one.
        unresolved: Others left above the capacity.
    """

    codes: NDArray[Any]
    shared: int
    moved: int
    unresolved: int


def place_beside(
    raw: NDArray[Any],
    content: Ints,
    *,
    taken: Taken,
    sizes: Sequence[int],
    quantizer: Quantizer,
    config: QuantizerConfig,
    residuals: Callable[[Ints, NDArray[Any]], Tensor],
) -> Placed:
    """Final IDs of new items.

    Args:
        raw: Codes as encoded, unsigned [n, L].
        content: Content of the new items, int64 [n].
        taken: What was published before.
        sizes: Codes per level of the final IDs; one more than the codebooks where the policy is `digit`.
        quantizer: What encoded them.
        config: Policy and capacity.
        residuals: Rows of `raw` int64 [u] and their codes -> what the levels above the last leave of them,
            float32 [u, D].

    Raises:
        ConfigError: Policy `digit`, and an ID has no digit left.
    """
    _, first, kind = np.unique(content, return_index=True, return_inverse=True)
    raw = raw[first][kind]  # equal content, equal code: whatever rounding made of it
    twin = first_of_content(content, taken.content)
    rest = np.flatnonzero(twin < 0)
    codes: NDArray[Any] = np.empty((len(raw), len(sizes)), taken.codes.dtype)
    codes[twin >= 0] = taken.codes[twin[twin >= 0]]
    unresolved = 0
    depth = len(quantizer.sizes)
    if len(sizes) > depth:
        codes[rest, :depth] = raw[rest]
        codes[rest, depth] = _digits(raw[rest], kind[rest], taken.codes, sizes)
    elif config.collisions == "none" or not len(rest):
        codes[rest] = raw[rest]
    else:
        found = next_nearest_beside(
            raw[rest],
            sizes,
            taken_codes=taken.codes,
            group_new=content[rest],
            group_taken=taken.content,
            popularity_new=np.zeros(len(rest), np.int64),
            capacity=config.capacity,
            last_level=quantizer.books.levels[-1],
            residuals=lambda rows: residuals(rest[rows], raw[rest[rows]]),
        )
        codes[rest], unresolved = found.codes, found.unresolved
    moved = int((codes[rest, :depth] != raw[rest]).any(1).sum())
    return Placed(codes, len(raw) - len(rest), moved, unresolved)


def _digits(raw: NDArray[Any], kind: Ints, taken: NDArray[Any], sizes: Sequence[int]) -> Ints:
    """Last codes int64 [n] of new items under `digit`: the place of their content in its ID, counting on."""
    depth = raw.shape[1]
    ids = pack(raw, sizes)
    buckets, bucket = np.unique(ids, return_inverse=True)
    before = pack(taken[:, :depth], sizes)
    place = np.minimum(np.searchsorted(buckets, before), max(len(buckets) - 1, 0))
    near = np.flatnonzero(buckets[place] == before) if len(buckets) else np.zeros(0, np.int64)
    free = np.zeros(len(buckets), np.int64)  # digits are given out one after the other: those above are free
    np.maximum.at(free, place[near], taken[near, depth].astype(np.int64) + 1)
    # One digit per content, first come first served: equal content has equal codes here.
    _, head, unit = np.unique(kind, return_index=True, return_inverse=True)
    order = np.lexsort((head, bucket[head]))
    owner = bucket[head][order]
    start = np.searchsorted(owner, owner)
    digit = np.empty(len(head), np.int64)
    digit[order] = free[owner] + np.arange(len(owner)) - start
    if len(digit) and digit.max() >= sizes[depth]:
        full = tuple(int(code) for code in raw[head[int(digit.argmax())]])
        raise ConfigError(
            f"the ID {'.'.join(map(str, full))} has no digit left: other items have all {sizes[depth]}",
            where="quantizer.collisions = digit",
            fix="the items are in the catalogue, but without an ID: train on all items under another "
            "run.name, with collisions=next_nearest or more codes per level if items are often appended",
        )
    return digit[unit]
