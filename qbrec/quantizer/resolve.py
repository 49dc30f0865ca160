"""What becomes of items of different content on one ID, by `quantizer.collisions`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from qbrec.config.stages import QuantizerConfig
from qbrec.quantizer.collisions import Resolution, digit, next_nearest, sinkhorn
from qbrec.quantizer.quantizer import Quantizer
from qbrec.quantizer.rvq import residual_before
from qbrec.quantizer.vectors import take_fused
from qbrec.storage.blocks import BlockSet
from qbrec.storage.catalog_view import CatalogView

SPARE_DIGITS = 16  # of the policy `digit`, for items appended later


def resolve(
    raw: NDArray[Any],
    quantizer: Quantizer,
    config: QuantizerConfig,
    *,
    catalog: CatalogView,
    blocks: BlockSet,
    seed: int,
) -> Resolution:
    """Apply the policy of the configuration to the raw codes of the whole catalogue, and shuffle if asked to.

    Args:
        raw: Codes as encoded, unsigned [N, L].
        quantizer: What encoded them.
        config: Policy and what belongs to it.
        catalog: Content groups, popularity and retired items, which take no room from others.
        blocks: Of the fusion artifact.
        seed: Of the shuffling.

    Raises:
        ConfigError: Policy `digit`, and an ID does not fit into 63 bits.
    """
    resolution = _resolved(raw, quantizer, config, catalog=catalog, blocks=blocks)
    if not config.shuffled:
        return resolution
    order = np.random.default_rng(seed).permutation(len(raw))
    return replace(resolution, codes=resolution.codes[order])


def _resolved(
    raw: NDArray[Any],
    quantizer: Quantizer,
    config: QuantizerConfig,
    *,
    catalog: CatalogView,
    blocks: BlockSet,
) -> Resolution:
    sizes = quantizer.sizes
    if config.collisions == "none":
        return Resolution(raw, sizes, 0, 0)
    group, popularity = np.asarray(catalog.duplicate_group), np.asarray(catalog.train_counts)
    retired = np.asarray(catalog.retired)
    if config.collisions == "digit":
        return digit(raw, sizes, group=group, popularity=popularity, retired=retired, spare=SPARE_DIGITS)
    device = quantizer.mean.device

    def residuals(rows: NDArray[np.int64]) -> Tensor:
        latents = quantizer.latents(take_fused(blocks, rows, device))
        return residual_before(len(sizes) - 1, latents, raw[rows], quantizer.books)

    last_level = quantizer.books.levels[-1]
    if config.collisions == "sinkhorn":
        return sinkhorn(
            raw,
            sizes,
            group=group,
            popularity=popularity,
            capacity=config.capacity,
            last_level=last_level,
            residuals=residuals,
            epsilon=config.sinkhorn_epsilon,
            iterations=config.sinkhorn_iterations,
            retired=retired,
        )
    return next_nearest(
        raw,
        sizes,
        group=group,
        popularity=popularity,
        capacity=config.capacity,
        last_level=last_level,
        residuals=residuals,
        retired=retired,
    )
