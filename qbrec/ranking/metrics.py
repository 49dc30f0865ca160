"""HR, NDCG and MRR of a single relevant item, from its rank."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

HR_AT = (1, 5, 10, 20)
NDCG_AT = (5, 10, 20)
METRICS = (*(f"hr@{k}" for k in HR_AT), *(f"ndcg@{k}" for k in NDCG_AT), "mrr")


def metrics_of_ranks(ranks: NDArray[np.int64]) -> NDArray[np.float64]:
    """Metrics of every user; with one relevant item the ideal DCG is 1, so NDCG is `1 / log2(rank + 1)`.

    Args:
        ranks: 1-based ranks, [B].

    Returns:
        float64 [B, len(METRICS)], columns in the order of `METRICS`.
    """
    gain = 1.0 / np.log2(ranks + 1.0)
    columns = [
        *(np.where(ranks <= k, 1.0, 0.0) for k in HR_AT),
        *(np.where(ranks <= k, gain, 0.0) for k in NDCG_AT),
        1.0 / ranks,
    ]
    return np.stack(columns, axis=1)
