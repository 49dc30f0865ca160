"""Words that say what a code means: class-based TF-IDF (after Grootendorst 2022) of titles and categories.

A prefix is a class, its siblings are the corpus: the label of a prefix is made of the words that set its
items apart from the other items of the prefix above it, so that an ID reads `[Art] [Paint] [Set] [Acrylic]`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from qbrec.quantizer.packing import pack

WORDS = 5  # per prefix
MAX_PREFIXES = 262_144  # a level with more prefixes is left without labels: nobody reads them
MIN_ITEMS = 2  # a word must be on so many items of the catalogue: a brand-new word says nothing about a code

_TOKEN = re.compile(r"[^\W\d_][\w'’-]+")
_STOP_WORDS = """
the and for with from your our you are all new one two per not any can has its into this that these those only
also more most very each off out over under plus inch inches pack count size color colour item items
product products brand com www http https amp quot
"""
_STOP = frozenset(_STOP_WORDS.split())


def words_of(title: str, categories: Sequence[str]) -> list[str]:
    """What an item can be called: its category names as they stand and the words of its title, each once."""
    found = {name.strip().casefold(): None for name in categories if name.strip()}
    for token in _TOKEN.findall(title.casefold()):
        if len(token) > 2 and token not in _STOP:
            found[token] = None
    return list(found)


def make_labels(
    codes: np.ndarray, sizes: Sequence[int], titles: Sequence[str], categories: Sequence[Sequence[str]]
) -> dict[str, list[str]]:
    """Label every prefix of every ID.

    Args:
        codes: Semantic IDs [n, L].
        sizes: Codes per level.
        titles: Title per item; "" where there is none.
        categories: Category names per item, root first.

    Returns:
        `{"12": [words], "12.7": [words], ...}`, best word first. Prefixes without any text are left out.
    """
    vocabulary: dict[str, int] = {}
    item, term = [], []
    for row, (title, names) in enumerate(zip(titles, categories, strict=True)):
        for found in words_of(title, names):
            term.append(vocabulary.setdefault(found, len(vocabulary)))
            item.append(row)
    if not term:
        return {}
    terms, items = np.array(term, dtype=np.int64), np.array(item, dtype=np.int64)
    common = np.bincount(terms)[terms] >= MIN_ITEMS
    terms, items = terms[common], items[common]
    names_of = np.array(list(vocabulary), dtype=object)
    out: dict[str, list[str]] = {}
    parent = np.zeros(len(codes), dtype=np.int64)
    for depth in range(1, codes.shape[1] + 1):
        keys, first, prefix = np.unique(pack(codes[:, :depth], sizes), return_index=True, return_inverse=True)
        if len(keys) > MAX_PREFIXES:
            break
        group, word = _best_words(prefix, parent, items, terms, len(vocabulary))
        starts = (
            np.flatnonzero(np.append(True, group[1:] != group[:-1])) if len(group) else np.empty(0, np.int64)
        )
        for begin, end in zip(starts, np.append(starts[1:], len(group)), strict=True):
            name = ".".join(str(int(c)) for c in codes[first[group[begin]], :depth])
            out[name] = [str(w) for w in names_of[word[begin:end]]]
        parent = prefix.astype(np.int64)
    return out


def _best_words(
    prefix: np.ndarray, parent: np.ndarray, items: np.ndarray, terms: np.ndarray, num_terms: int
) -> tuple[np.ndarray, np.ndarray]:
    """(prefix, term) of at most `WORDS` words per prefix, sorted by prefix, best first.

    The score of word t in prefix p is f(t, p) log(f(t, p) / f(t, parent)), where f is the share of items that
    have the word: frequent in the prefix and rarer above it. Words rarer in the prefix than above it are left
    out.
    """
    pairs, count = np.unique(prefix[items].astype(np.int64) * num_terms + terms, return_counts=True)
    group, word = pairs // num_terms, pairs % num_terms
    above, above_count = np.unique(parent[items] * num_terms + terms, return_counts=True)
    parent_of = np.zeros(int(prefix.max()) + 1, dtype=np.int64)
    parent_of[prefix] = parent
    size, parent_size = np.bincount(prefix), np.bincount(parent)
    share = count / size[group]
    up = parent_of[group]
    wider = above_count[np.searchsorted(above, up * num_terms + word)] / parent_size[up]
    # An only child has nothing to be set apart from: there the words rare in the whole catalogue come first.
    anywhere = np.bincount(terms, minlength=num_terms)[word] / len(prefix)
    score = share * np.log(share / wider) + 1e-3 * share * np.log(share / anywhere)
    order = np.lexsort((word, -score, group))
    order = order[score[order] > 0]
    if not len(order):
        return group[:0], word[:0]
    fresh = np.append(True, group[order][1:] != group[order][:-1])
    start = np.flatnonzero(fresh)
    place = np.arange(len(order)) - np.repeat(start, np.diff(np.append(start, len(order))))
    kept = order[place < WORDS]
    return group[kept], word[kept]


def describe(labels: Mapping[str, Sequence[str]], codes: Sequence[int]) -> str:
    """Read a semantic ID: `[Art] [Paint] [Set] [Acrylic]`.

    At each level the best word that no level above has used; `[code 12]` where there is none.

    Args:
        labels: From `make_labels` or labels.json.
        codes: One ID, or a prefix of one.
    """
    used: set[str] = set()
    parts = []
    for depth in range(1, len(codes) + 1):
        words = labels.get(".".join(str(int(c)) for c in codes[:depth]), ())
        word = next((w for w in words if w.rstrip("s") not in used), None)
        if word is None:
            parts.append(f"[code {int(codes[depth - 1])}]")
        else:
            used.add(word.rstrip("s"))  # "paint" after "paints" adds nothing
            parts.append(f"[{word[:1].upper() + word[1:]}]")
    return " ".join(parts)
