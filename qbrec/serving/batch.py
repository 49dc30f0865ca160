"""Recommendations for many users over Ray Data: units of users, a pool of actors, parts that stay."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from qbrec.catalog.sources import list_files
from qbrec.config.sections import ComputeConfig
from qbrec.engine.actor_pool import actor_pool
from qbrec.engine.progress import Progress
from qbrec.engine.ray_data import blocks_of, ray_errors, unit_dataset
from qbrec.engine.ray_session import ensure_ray
from qbrec.errors import ConfigError
from qbrec.serving.model import ServedModel
from qbrec.serving.output import BatchFolder, Counts, total
from qbrec.serving.users import catalogue_units, file_units
from qbrec.serving.worker import BatchJob, RankWorker, Wanted
from qbrec.storage.catalog_view import CatalogView

ALL = "all"
FORMAT = 1


def recommend_users(
    model: ServedModel,
    *,
    users: str,
    out: str,
    wanted: Wanted,
    compute: ComputeConfig,
    warn: Callable[[str], None],
) -> dict[str, Any]:
    """Write the lists of many users; what an earlier call finished is kept.

    The lists depend on neither the number of workers nor on interruptions.

    Args:
        model: What ranks.
        users: `all`: the target domain's users in the catalogue. Else Parquet with `user_id` and perhaps
            `history`: a file, a folder or a glob, local or in an object store.
        out: Folder of the batch, local (on storage that every node sees) or in an object store.
        wanted: What is asked for each user.
        compute: Cluster, number and device of the actors.
        warn: Told what users did not get a list.

    Returns:
        Users, rejected users, unknown items, units, those of them that were there, seconds, users per second.

    Raises:
        ConfigError: The options do not fit the model, or the folder holds another batch.
        DataError: An input or artifact is missing or damaged, or a category or item is unknown.
        LaunchError: Ray cannot be reached, fails, or has no room for an actor.
    """
    start = time.monotonic()
    recommender = model.open()  # here first: what is wrong with the options shows before a cluster is asked
    recommender.check(wanted.k, among=wanted.filter_of(recommender))
    if recommender.num_waiting:
        warn(f"{recommender.num_waiting:,} appended items have no semantic ID yet and are not ranked")
    del recommender
    units, own_histories, source = _units(model, users)
    folder = BatchFolder(out)
    folder.claim(_identity(model, wanted, source=source, units=units))
    done = folder.done()
    left = [unit for unit in units if unit["number"] not in done]
    summary = folder.summary()
    if summary is None or left:
        ranked = 0
        if left:
            job = BatchJob(model, wanted, folder.folder.uri, own_histories)
            fresh = _run(job, units, left, compute)
            ranked, done = total(list(fresh.values()))["users"], done | fresh
        seconds = time.monotonic() - start
        summary = {
            **total(list(done.values())),
            "units": len(units),
            "units_kept": len(units) - len(left),
            "seconds": round(seconds, 3),
            "users_per_second": round(ranked / seconds, 1),
        }
        folder.finish(summary)
    if summary["rejected"]:
        warn(f"{summary['rejected']:,} users got no list: rejected-*.parquet in {out} says why")
    if summary["unknown_items"]:
        warn(f"{summary['unknown_items']:,} items of histories are not in the catalogue and were left out")
    return summary


def _units(model: ServedModel, users: str) -> tuple[list[dict[str, Any]], bool, Any]:
    """Units, whether the catalogue has the histories, and what identifies the users."""
    if users == ALL:
        if model.storage is None:
            raise _without_histories("users")
        return catalogue_units(CatalogView(model.artifact("catalog")).histories()), True, ALL
    files = list_files(users, where="--users")
    units, with_history = file_units(files)
    if not with_history and model.storage is None:
        raise _without_histories("histories")
    return units, not with_history, [asdict(file) for file in files]


def _without_histories(what: str) -> ConfigError:
    return ConfigError(
        f"a registered model carries no {what}",
        where="--users",
        fix="bring Parquet with user_id and history, or leave out --model",
    )


def _identity(
    model: ServedModel, wanted: Wanted, *, source: Any, units: list[dict[str, Any]]
) -> dict[str, Any]:
    only = None
    if wanted.only is not None:
        only = hashlib.sha256(json.dumps(sorted(set(wanted.only))).encode()).hexdigest()
    return {
        "format": FORMAT,
        "model": dict(model.fingerprints),
        "ranking": model.ranking.model_dump(mode="json"),
        "users": source,
        "units": len(units),
        "k": wanted.k,
        "keep_seen": wanted.keep_seen,
        "categories": None if wanted.categories is None else sorted(set(wanted.categories)),
        "only": only,
    }


def _run(
    job: BatchJob, units: list[dict[str, Any]], left: list[dict[str, Any]], compute: ComputeConfig
) -> dict[int, Counts]:
    """Rank the units that are left on a pool of actors; what became of their users."""
    import ray
    import ray.data

    ensure_ray(compute)
    pool = actor_pool(
        compute,
        resources=ray.cluster_resources(),
        actors=compute.max_workers,
        cpus_per_actor=compute.threads_per_worker or 1,
    )
    job = replace(job, device=pool.device, threads=pool.num_cpus)
    every = sum(unit["rows"] for unit in units)
    kept = every - sum(unit["rows"] for unit in left)
    counts: dict[int, Counts] = {}
    with ray_errors("recommend"), Progress(every, "recommending", done=kept) as progress:
        ranked = unit_dataset(left).map_batches(
            RankWorker, fn_constructor_args=(job,), batch_size=None, batch_format="pyarrow",
            num_cpus=pool.num_cpus, num_gpus=pool.num_gpus,
            compute=ray.data.ActorPoolStrategy(min_size=pool.min_size, max_size=pool.max_size),
        )  # fmt: skip
        for reference in blocks_of(ranked):
            for unit in ray.get(reference).to_pylist():
                number, rows = unit.pop("number"), unit.pop("rows")
                counts[number] = unit
                progress.update(rows)
    return counts
