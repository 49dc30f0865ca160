"""The same list for everybody: items by how often they occur in the training part."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qbrec.ranking.scorer import Domain
from qbrec.storage.ragged import Ragged


class Popularity:
    """Scores an item by its number of training interactions, whatever the history.

    Args:
        counts: Training interactions of each item, [N].
    """

    name = "popularity"

    def __init__(self, counts: NDArray[Any]) -> None:
        # float32 merges large counts with their neighbours only; ties go by popularity: the order is exact.
        self._scores = torch.from_numpy(np.asarray(counts).astype(np.float32))

    @classmethod
    def fit(cls, training: Ragged, *, num_items: int) -> Popularity:
        """Count items in the training part of the histories."""
        return cls(np.bincount(training.values, minlength=num_items))

    def scores(self, histories: Ragged, domain: Domain = 0) -> torch.Tensor:
        """Scores float32 [B, N], a view of one row."""
        return self._scores.expand(len(histories), -1)
