"""A pool of Ray actors: how many the cluster holds, what each takes, where its model runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qbrec.config.sections import ComputeConfig
from qbrec.errors import LaunchError


@dataclass(frozen=True)
class ActorPool:
    """A pool of actors.

    Attributes:
        min_size: Actors that are kept.
        max_size: Actors that may run at once.
        num_gpus: GPUs of one actor; a fraction shares a GPU.
        num_cpus: CPUs of one actor.
        device: `cuda` or `cpu`: where the models of an actor run.
    """

    min_size: int
    max_size: int
    num_gpus: float
    num_cpus: int
    device: str


def actor_pool(
    compute: ComputeConfig,
    *,
    resources: Mapping[str, float],
    actors: int,
    gpus_per_actor: float = 1.0,
    cpus_per_actor: int = 1,
) -> ActorPool:
    """The pool that fits a cluster.

    Args:
        compute: Where the run executes.
        resources: Of the cluster, as `ray.cluster_resources()` says.
        actors: Most actors at once; 0: as many as the cluster holds.
        gpus_per_actor: GPUs of one actor, where GPUs are used.
        cpus_per_actor: CPUs of one actor.

    Raises:
        LaunchError: `compute.device: cuda` on a cluster without GPUs, or not even one actor finds room.
    """
    gpus, cpus = resources.get("GPU", 0.0), resources.get("CPU", 0.0)
    if compute.device == "cuda" and not gpus:
        raise LaunchError(
            "the cluster has no GPU", where="compute.device: cuda", fix="add a GPU node, or set it to auto"
        )
    cuda = gpus > 0 and compute.device != "cpu"
    room = int(cpus // cpus_per_actor)
    if cuda:
        # A GPU serves whole actors only: of 0.4 each it holds two.
        per_gpu = int(1 / gpus_per_actor) if gpus_per_actor <= 1 else 1 / gpus_per_actor
        room = min(room, int(gpus * per_gpu))
    if room < 1:
        raise LaunchError(
            f"no actor fits into the cluster ({cpus:g} CPUs, {gpus:g} GPUs)",
            where=f"{cpus_per_actor} CPUs and {gpus_per_actor:g} GPUs for each",
            fix="ask for less for each, or add nodes",
        )
    size = min(actors, room) if actors else room
    return ActorPool(1, size, gpus_per_actor if cuda else 0.0, cpus_per_actor, "cuda" if cuda else "cpu")
