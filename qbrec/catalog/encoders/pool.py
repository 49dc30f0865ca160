"""Whether named encoders need a pool of Ray actors."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from qbrec.catalog.encoders.models import check_named, encoders
from qbrec.config.sections import CatalogConfig, ComputeConfig
from qbrec.engine.actor_pool import ActorPool, actor_pool


def encoder_pool(
    config: CatalogConfig,
    compute: ComputeConfig,
    *,
    encoded: Collection[str],
    resources: Mapping[str, float],
    actors: int,
    gpus_per_actor: float,
    cpus_per_actor: int,
) -> ActorPool | None:
    """The pool that encodes the items, or None where the built-in encoders do (plain tasks are enough).

    Args:
        config: The catalogue's configuration.
        compute: Where the run executes.
        encoded: Modalities that are encoded here, not brought as vectors: of `text` and `image`.
        resources: See `actor_pool`.
        actors: See `actor_pool`.
        gpus_per_actor: See `actor_pool`.
        cpus_per_actor: See `actor_pool`.

    Raises:
        ConfigError: A named encoder is not pinned, or its folder is not there.
        LaunchError: See `actor_pool`.
    """
    named = [
        part for name, part, built_in in encoders(config) if name in encoded and part.encoder != built_in
    ]
    if not named:
        return None
    for part in named:
        check_named(part)
    return actor_pool(
        compute,
        resources=resources,
        actors=actors,
        gpus_per_actor=gpus_per_actor,
        cpus_per_actor=cpus_per_actor,
    )
