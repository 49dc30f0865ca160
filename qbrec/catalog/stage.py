"""Stage 0 on Ray: Parquet in, the catalogue artifact out (DESIGN sections 2 and 3).

read ids → check → encode (Ray Data) → exchange by item hash → items-*.tar, items.arrow, hashes.npy
read interactions → look up rows → exchange by user hash → histories-*.tar, users.arrow, train_counts.npy
histories → items that the same users bought → near_duplicates.npy, and where asked for one item of each group
"""

from __future__ import annotations

from collections.abc import Mapping

from qbrec.catalog.build_histories import build_histories
from qbrec.catalog.build_items import build_items
from qbrec.catalog.contract import read_contract
from qbrec.catalog.duplicates.near_duplicates import build_near_duplicates
from qbrec.config.root import RootConfig
from qbrec.engine.context import StageContext
from qbrec.engine.ray_data import ray_errors
from qbrec.engine.ray_session import ensure_ray
from qbrec.storage.artifact import Artifact


def run(ctx: StageContext, config: RootConfig, inputs: Mapping[str, Artifact]) -> Artifact:
    """Build the catalogue artifact.

    Args:
        ctx: Of the driver: Ray tasks do the work, so there is one rank.
        config: Root configuration.
        inputs: Empty: this stage reads the raw input.

    Raises:
        ConfigError: No domain, unknown encoder, `image_path` without allowed folders.
        DataError: The input breaks the contract, or too many rows are bad.
        LaunchError: Ray cannot be reached or fails.
    """
    assert ctx.world == 1
    assert not inputs
    domains = read_contract(config.data, config.catalog)
    ensure_ray(config.compute)
    writer = ctx.writer()
    with ray_errors("catalog"):
        items = build_items(ctx, config, domains, writer)
        reasons, facts = build_histories(ctx, config, domains, writer, items)
        names = [domain.name for domain in domains]
        facts |= build_near_duplicates(
            ctx,
            config,
            writer,
            domains=names,
            num_interactions=facts["num_interactions"],
        )
    counted = {"items": items.rejected, "interactions": reasons}
    meta = items.meta | facts
    meta |= {
        "domains": names,
        "target_domain": config.data.target_domain,
        "rejected": {
            f"{role}: {reason}": count
            for role, counts in counted.items()
            for reason, count in sorted(counts.items())
        },
    }
    return ctx.commit(writer, meta=meta, inputs={})
