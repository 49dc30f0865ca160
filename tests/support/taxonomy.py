"""How well level-0 codes and their words recover the category tree of a catalogue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.metrics import normalized_mutual_info_score


@dataclass(frozen=True)
class Recovered:
    """Normalised mutual information over items, 0 to 1 (arithmetic mean of the entropies).

    Attributes:
        top: Of the level-0 code and the top category.
        chance: The same after shuffling the codes.
        words: Of the first word of the code's label and the category below the top one.
        named: Share of items one of whose category names is among the words of its code.
    """

    top: float
    chance: float
    words: float
    named: float


def recovered(
    codes: np.ndarray, labels: Mapping[str, Sequence[str]], categories: Sequence[Sequence[str]]
) -> Recovered:
    """Compare semantic IDs [N, L] and labels.json with the true category paths, root first."""
    first = np.asarray(codes[:, 0])
    top, second = [path[0] for path in categories], [path[1] for path in categories]
    words = [labels[str(code)] for code in first]
    named = [
        bool({name.casefold() for name in path} & set(of)) for path, of in zip(categories, words, strict=True)
    ]
    shuffled = np.random.default_rng(0).permutation(first)
    return Recovered(
        top=float(normalized_mutual_info_score(top, first)),
        chance=float(normalized_mutual_info_score(top, shuffled)),
        words=float(normalized_mutual_info_score(second, [of[0] for of in words])),
        named=float(np.mean(named)),
    )
