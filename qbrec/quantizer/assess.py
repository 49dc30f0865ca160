"""All figures of quality.json, gathered from the tables, the held-out errors and a sample of vectors."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from qbrec.engine.context import StageContext
from qbrec.quantizer.collisions import Resolution
from qbrec.quantizer.kmeans.chunks import stratified
from qbrec.quantizer.quality import PAIR_ROWS, add_residual_energy, bucket_figures, cohesion, level_usage
from qbrec.quantizer.quantizer import Quantizer
from qbrec.quantizer.vectors import take_fused
from qbrec.storage.blocks import BlockSet
from qbrec.storage.catalog_view import CatalogView


def assess(
    ctx: StageContext,
    raw: NDArray[Any],
    resolution: Resolution,
    quantizer: Quantizer,
    *,
    catalog: CatalogView,
    blocks: BlockSet,
    errors: Tensor,
    errors_everywhere: Tensor,
) -> dict[str, Any]:
    """Figures of the codes as encoded (`levels`, `raw`) and of the IDs after collisions were resolved.

    Args:
        ctx: Seeds of the samples.
        raw: Codes as encoded, unsigned [N, L].
        resolution: What became of collisions.
        quantizer: What encoded them.
        catalog: Content groups; retired items, which how IDs are shared leaves out.
        blocks: Of the fusion artifact.
        errors: Squared error of held-out items after 0, 1, … L levels, float64 [L + 1].
        errors_everywhere: The same of all items.
    """
    live = np.flatnonzero(~np.asarray(catalog.retired))
    group, sizes = np.asarray(catalog.duplicate_group)[live], quantizer.sizes
    levels = level_usage(raw, sizes)
    add_residual_energy(levels, held_out=errors.tolist(), everywhere=errors_everywhere.tolist())
    rows = stratified(len(raw), PAIR_ROWS, seed=ctx.sub_seed("quantizer.cohesion"))
    vectors = quantizer.latents(take_fused(blocks, rows, quantizer.mean.device)).cpu().numpy()
    seed = ctx.sub_seed("quantizer.shuffle")
    return {
        "num_items": len(raw),
        "levels": levels,
        **bucket_figures(resolution.codes[live], resolution.sizes, group=group),
        "raw": bucket_figures(raw[live], sizes, group=group),
        "moved": resolution.moved,
        "unresolved": resolution.unresolved,
        "cohesion": cohesion(vectors, resolution.codes[rows], resolution.sizes, seed=seed),
    }


def summary(quality: dict[str, Any]) -> dict[str, Any]:
    """The figures that go into the manifest."""
    if not quality:
        return {}  # not rank 0: its manifest is the one that counts
    names = ("unique_ids", "no_collision_rate", "collision_rate", "largest_bucket", "moved", "unresolved")
    levels = quality["levels"]
    return {
        **{name: quality[name] for name in names},
        "perplexity": [level["perplexity"] for level in levels],
        "r2_held_out": [level["r2_held_out"] for level in levels],
    }
