"""What becomes of items of different content on one ID, by `quantizer.collisions`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from qbrec.config.stages import QuantizerConfig
from qbrec.quantizer.collisions import Resolution, next_nearest
from qbrec.quantizer.quantizer import Quantizer
from qbrec.quantizer.rvq import residual_before
from qbrec.quantizer.vectors import take_fused
from qbrec.storage.blocks import BlockSet
from qbrec.storage.catalog_view import CatalogView


def resolve(
    raw: NDArray[Any],
    quantizer: Quantizer,
    config: QuantizerConfig,
    *,
    catalog: CatalogView,
    blocks: BlockSet,
) -> Resolution:
    """Apply the policy of the configuration to the raw codes of the whole catalogue.

    Args:
        raw: Codes as encoded, unsigned [N, L].
        quantizer: What encoded them.
        config: Policy and capacity.
        catalog: Content groups and popularity.
        blocks: Of the fusion artifact.
    """
    if config.collisions == "none":
        return Resolution(raw, 0, 0)
    last = len(quantizer.sizes) - 1
    device = quantizer.mean.device

    def residuals(rows: NDArray[np.int64]) -> Tensor:
        latents = quantizer.latents(take_fused(blocks, rows, device))
        return residual_before(last, latents, raw[rows], quantizer.books)

    return next_nearest(
        raw,
        quantizer.sizes,
        group=np.asarray(catalog.duplicate_group),
        popularity=np.asarray(catalog.train_counts),
        capacity=config.capacity,
        last_level=quantizer.books.levels[-1],
        residuals=residuals,
    )
