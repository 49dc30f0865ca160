"""The generations that a run's run.json names, and what its models made of each.

An entry is {key, path, fused, ids, alike}: the generation, and where those things lie that were made of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qbrec.config import RootConfig
from qbrec.errors import DataError
from qbrec.run_record import RunRecord, run_directory
from qbrec.storage.artifact import Artifact, ArtifactStore
from qbrec.storage.generations import current_generations
from qbrec.storage.id_table import ALIKE, GENERATION, IDS, current_alike, current_ids


@dataclass(frozen=True)
class Noted:
    """A generation in run.json: the entry itself, the generation, what there is of its IDs and graph rows."""

    entry: dict[str, Any]
    generation: Artifact
    ids: Artifact | None
    alike: Artifact | None


def with_generations(config: RootConfig, artifacts: Mapping[str, Artifact]) -> dict[str, Artifact]:
    """A run's artifacts by stage, beside them its generations: `generation-1`, `ids-1`, `alike-1`, and so on.

    IDs are there as far as they are of the run's quantizer, graph rows as far as they are of its item graphs.
    Nothing is made, nothing is owned.

    Raises:
        DataError: An artifact is missing or damaged.
    """
    found = dict(artifacts)
    if "catalog" not in artifacts:
        return found
    store = ArtifactStore(Path(config.run.storage).resolve())
    noted = noted_generations(RunRecord.load(run_directory(config)), store, artifacts["catalog"])
    found |= {f"{GENERATION}-{n}": one.generation for n, one in enumerate(noted, 1)}
    if "quantizer" in artifacts:
        ids = current_ids(
            artifacts["quantizer"], [one.generation for one in noted], [one.ids for one in noted]
        )
        found |= {f"{IDS}-{n}": artifact for n, artifact in enumerate(ids, 1)}
        if "neighbours" in artifacts:
            alike = current_alike(artifacts["neighbours"], ids, [one.alike for one in noted])
            found |= {f"{ALIKE}-{n}": artifact for n, artifact in enumerate(alike, 1)}
    return found


def noted_generations(record: RunRecord, store: ArtifactStore, catalog: Artifact) -> list[Noted]:
    """The generations that run.json names, as far as they belong to this catalogue."""
    found = []
    for entry in record.extra.get("generations", []):
        generation = store.open(entry["path"])
        if current_generations(catalog, [generation]):
            ids, alike = (what_is_there(store, entry.get(name)) for name in (IDS, ALIKE))
            found.append(Noted(entry, generation, ids, alike))
    return found


def what_is_there(store: ArtifactStore, place: dict[str, str] | None) -> Artifact | None:
    """An artifact that can be made again, unless it is gone or its manifest cannot be read."""
    try:
        return None if place is None else store.open(place["path"])
    except DataError:
        return None


def place_of(artifact: Artifact) -> dict[str, Any]:
    """What run.json says of an artifact."""
    return {"key": artifact.key, "path": str(artifact.path)}
