"""The semantic IDs as a tree that can be opened code by code, cut to what a page can carry."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np
from numpy.typing import NDArray

from qbrec.report.blocks import Branch

WIDTHS = (64, 16, 8)  # most codes shown below one prefix, by its length
MAX_BYTES = 900_000  # of HTML
WORDS, TITLES, TITLE_LENGTH = 3, 3, 64
_AT_ONCE = 1_000_000  # rows of the table read together
_MARKUP = 110  # bytes of a branch besides its words and titles; twice that where it can be opened
_LETTERS = "abcdefghijklmnopqrstuvwxyz"

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class IdTree:
    """Branches of level 0, how many prefixes are shown, and in words what is not."""

    branches: Sequence[Branch]
    shown: int
    left_out: str


@dataclass
class _Prefix:
    """One prefix with the most popular of its items, and the codes below it that may be shown."""

    codes: tuple[int, ...]
    count: int
    sample: Rows
    total_below: int = 0  # codes in use one level deeper
    below: list[_Prefix] = field(default_factory=list)
    kept: bool = False

    def all(self) -> Iterator[_Prefix]:
        yield self
        for prefix in self.below:
            yield from prefix.all()


def id_tree(
    ids: NDArray[np.unsignedinteger],
    labels: Mapping[str, Sequence[str]],
    *,
    popularity: NDArray[np.int64],
    names_of: Callable[[Rows], list[str]],
    widths: Sequence[int] = WIDTHS,
    max_bytes: int = MAX_BYTES,
) -> IdTree:
    """The largest codes of level 0, the largest below each of them, and so on.

    Holds the rows of one level-0 code at a time, whatever the size of the catalogue.

    Args:
        ids: Semantic IDs [N, L]; may be mapped.
        labels: Words per prefix, from labels.json.
        popularity: Interactions per item [N].
        names_of: Titles of rows.
        widths: Most codes shown below a prefix of 0, 1, … codes.
        max_bytes: Of HTML; the prefixes with the fewest items are left out first.
    """
    depth = min(len(widths), ids.shape[1])
    counts = count_codes(ids, 0)
    roots = []
    for code in _largest(counts, widths[0]):
        rows = np.flatnonzero(ids[:, 0] == code)
        roots.append(_grow((int(code),), rows, ids, popularity, widths[:depth]))
    found = [prefix for root in roots for prefix in root.all()]
    rows = np.unique(np.concatenate([prefix.sample for prefix in found]))
    names = dict(zip(rows.tolist(), names_of(rows), strict=True))
    titles = {prefix.codes: _titles(prefix, names) for prefix in found}
    words = {prefix.codes: _words(prefix.codes, labels) for prefix in found}
    size = 0
    # A prefix has no fewer items than those below it: with ties by length, none is kept without its parent.
    for prefix in sorted(found, key=lambda p: (-p.count, len(p.codes), p.codes)):
        texts = (words[prefix.codes], *titles[prefix.codes])
        size += _MARKUP * (2 if prefix.below else 1) + sum(len(escape(text).encode()) + 4 for text in texts)
        if size > max_bytes:
            break
        prefix.kept = True

    def branch(prefix: _Prefix, largest: int) -> Branch:
        kept = [p for p in prefix.below if p.kept]
        return Branch(
            code=f"{_LETTERS[len(prefix.codes) - 1]}_{prefix.codes[-1]}",
            words=words[prefix.codes],
            count=prefix.count,
            width=max(1, round(100 * prefix.count / largest)),
            titles=titles[prefix.codes],
            branches=[branch(p, kept[0].count) for p in kept],
            more=_more(prefix.total_below, prefix.count, kept),
        )

    shown = [root for root in roots if root.kept]
    branches = [branch(root, shown[0].count) for root in shown]
    in_use = int((counts > 0).sum())
    return IdTree(
        branches=branches,
        shown=sum(prefix.kept for prefix in found),
        left_out=_more(in_use, len(ids), shown) or "every code",
    )


def count_codes(ids: NDArray[np.unsignedinteger], level: int, size: int = 0) -> NDArray[np.int64]:
    """Items per code of a level, int64 [at least `size`], some rows of a mapped table at a time."""
    parts = [ids[start : start + _AT_ONCE, level] for start in range(0, len(ids), _AT_ONCE)]
    size = max(size, *(int(part.max()) + 1 for part in parts))
    counts = np.zeros(size, dtype=np.int64)
    for part in parts:
        counts += np.bincount(part, minlength=size)
    return counts


def _grow(
    codes: tuple[int, ...],
    rows: Rows,
    ids: NDArray[np.unsignedinteger],
    popularity: NDArray[np.int64],
    widths: Sequence[int],
) -> _Prefix:
    prefix = _Prefix(codes, len(rows), _most_popular(rows, popularity))
    if len(codes) == len(widths):
        return prefix
    level = ids[rows, len(codes)]
    counts = np.bincount(level)
    prefix.total_below = int((counts > 0).sum())
    prefix.below = [
        _grow((*codes, int(code)), rows[level == code], ids, popularity, widths)
        for code in _largest(counts, widths[len(codes)])
    ]
    return prefix


def _largest(counts: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    order = np.argsort(-counts, kind="stable")[:most]
    return np.asarray(order[counts[order] > 0])


def _most_popular(rows: Rows, popularity: NDArray[np.int64]) -> Rows:
    """At most `TITLES` rows, most popular first, ties by row; without sorting them all."""
    seen = popularity[rows]
    if len(rows) > TITLES:
        least = np.partition(seen, -TITLES)[-TITLES]
        place = np.concatenate([np.flatnonzero(seen > least), np.flatnonzero(seen == least)[:TITLES]])
        rows, seen = rows[place], seen[place]
    return np.asarray(rows[np.lexsort((rows, -seen))][:TITLES])


def _titles(prefix: _Prefix, names: Mapping[int, str]) -> tuple[str, ...]:
    found = (names[row] for row in prefix.sample.tolist())
    cut = (n if len(n) <= TITLE_LENGTH else n[: TITLE_LENGTH - 1].rstrip() + "…" for n in found)
    return tuple(dict.fromkeys(cut))


def _words(codes: tuple[int, ...], labels: Mapping[str, Sequence[str]]) -> str:
    """The best words of a prefix that none above it leads with."""
    above = {
        word.rstrip("s")
        for length in range(1, len(codes))
        for word in labels.get(".".join(map(str, codes[:length])), ())[:WORDS]
    }
    own = labels.get(".".join(map(str, codes)), ())
    return ", ".join([word for word in own if word.rstrip("s") not in above][:WORDS])


def _more(in_use: int, count: int, kept: Sequence[_Prefix]) -> str:
    codes, items = in_use - len(kept), count - sum(prefix.count for prefix in kept)
    if not codes:
        return ""
    return f"{codes:,} smaller code{'s' * (codes > 1)} with {items:,} item{'s' * (items > 1)} left out"
