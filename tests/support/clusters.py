"""Vectors like those of items: clusters of very different sizes, a spectrum that falls off, outliers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def clustered(num_rows: int, width: int, *, seed: int = 0, clusters: int = 60) -> Tensor:
    """float32 [num_rows, width]."""
    rng = np.random.default_rng(seed)
    spectrum = 1 / np.sqrt(1 + np.arange(width) / 4)
    centres = rng.normal(size=(clusters, width)) * spectrum
    share = 1 / np.arange(1, clusters + 1) ** 0.7
    label = rng.choice(clusters, num_rows, p=share / share.sum())
    rows = centres[label] + 0.4 * rng.normal(size=(num_rows, width)) * spectrum
    rows[rng.random(num_rows) < 0.002] *= 8
    return torch.from_numpy(rows.astype(np.float32))
