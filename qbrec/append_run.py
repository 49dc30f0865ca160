"""Generations of a run: appended to its catalogue, and brought to its models, whose weights are frozen.

run.json notes each generation with what the models made of it. What is missing, for whatever reason, is made
up for by the next `qbrec append` and at the end of `qbrec run`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qbrec.config import RootConfig, load_config
from qbrec.errors import DataError
from qbrec.run_generations import noted_generations, place_of, what_is_there
from qbrec.run_record import RunRecord, run_directory
from qbrec.storage.artifact import Artifact, ArtifactStore, artifact_key
from qbrec.storage.generation import KIND as GENERATION_KIND
from qbrec.storage.generations import GenerationsView
from qbrec.storage.id_table import ALIKE_KIND, FUSED_KIND, GENERATION, IDS
from qbrec.storage.id_table import KIND as IDS_KIND

if TYPE_CHECKING:
    from qbrec.catalog.append.run import Request

Say = Callable[[str], object]  # shows one line to the person watching


@dataclass(frozen=True)
class Appended:
    """What `append_generation` did.

    Attributes:
        artifact: The generation.
        view: The catalogue with it.
        new: Whether it was made now.
        ids: Semantic IDs of the generations, oldest first.
        missing: Why some have none; empty where all have.
    """

    artifact: Artifact
    view: GenerationsView
    new: bool
    ids: list[Artifact]
    missing: str


def append_generation(config: RootConfig, request: Request, *, say: Say, warn: Say) -> Appended:
    """Append to the catalogue of a run, note the generation in its run.json, bring it to the run's models.

    Args:
        config: The configuration; it names the run. What made the catalogue is read from its manifest.
        request: What to append; an empty domain means the run's target domain.
        say: For progress.
        warn: For what should be looked into.

    Raises:
        ConfigError, DataError: See `bring_to_models`; the generation is part of the catalogue all the same.
        DataError: There is no finished catalogue, or the input is bad.
        LaunchError: Another process has the run, or Ray fails.
    """
    run_dir = run_directory(config)
    if "catalog" not in RunRecord.load(run_dir).stages:
        raise DataError(
            "the run has no finished catalogue yet",
            where=str(run_dir),
            fix="`qbrec catalog` or `qbrec run` with the same configuration makes it",
        )
    # The run stays what it is: the present configuration only names it and says where to work.
    owned = load_config(run_dir / "config.yaml")
    storage = str(Path(config.run.storage).resolve())
    owned = owned.model_copy(
        update={"run": owned.run.model_copy(update={"storage": storage}), "compute": config.compute}
    )
    if not request.domain:
        request = replace(request, domain=owned.data.target_domain)
    record = RunRecord.own(owned, resume="must")
    try:
        store = ArtifactStore(storage, remote=owned.run.remote)
        store.prepare()
        artifact, view, new = _generation(config, owned, request, record, store, say)
        limit = config.quantizer.quality.max_drift
        ids, missing = bring_to_models(owned, record, store, max_drift=limit, say=say, warn=warn)
        return Appended(artifact, view, new, ids, missing)
    finally:
        record.close()


def bring_to_models(
    config: RootConfig, record: RunRecord, store: ArtifactStore, *, max_drift: float, say: Say, warn: Say
) -> tuple[list[Artifact], str]:
    """Fuse, encode and join to the item graphs those generations of a run that its models have not seen.

    Args:
        config: The run's own configuration.
        record: Of the run, owned; every step is noted in it and saved.
        store: The run's storage.
        max_drift: Drift above which a generation's drift.json says refit.
        say: For progress.
        warn: For drift.

    Returns:
        Semantic IDs of the generations, oldest first; and why there are none, or "".

    Raises:
        ConfigError: Policy `digit`, and an ID has no digit left.
        DataError: An artifact is damaged, or a fused vector is not finite.
    """
    if "catalog" not in record.stages:
        return [], ""
    catalog = store.open(record.stages["catalog"]["path"])
    noted = noted_generations(record, store, catalog)
    if not noted:
        return [], ""
    models = _models(record, store, catalog)
    if isinstance(models, str):
        return [], models
    policy = config.quantizer
    recipe = {"collisions": policy.collisions, "capacity": policy.capacity, "max_drift": max_drift}
    quality = policy.quality.model_copy(update={"max_drift": max_drift})
    config = config.model_copy(update={"quantizer": policy.model_copy(update={"quality": quality})})
    inputs, ids = {"catalog": catalog}, dict[str, Artifact]()
    for number, one in enumerate(noted, 1):
        inputs[f"{GENERATION}-{number}"] = one.generation
        fused = what_is_there(store, one.entry.get("fused"))
        wanted = {**inputs, "fusion": models["fusion"]}
        if fused is None or fused.inputs != _prints(wanted):
            fused = make_artifact(config, record, store, FUSED_KIND, "qbrec.fusion.append:run", {}, wanted)
        wanted = {**inputs, "quantizer": models["quantizer"], "fused": fused, **ids}
        made = one.ids
        if made is None or made.inputs != _prints(wanted):
            made = make_artifact(
                config, record, store, IDS_KIND, "qbrec.quantizer.append.run:run", recipe, wanted
            )
            one.entry.update(fused=place_of(fused), ids=place_of(made))
            record.save()
            if made.meta["num_added"]:
                say(f"✓ generation {number}: {made.meta['num_added']:,} new items have semantic IDs")
            _warn_of_drift(number, made, warn)
        ids[f"{IDS}-{number}"] = made
        wanted = {**inputs, **models, "fused": fused, "ids": made}
        if _has_content(models) and (one.alike is None or one.alike.inputs != _prints(wanted)):
            alike = make_artifact(
                config, record, store, ALIKE_KIND, "qbrec.neighbours.append:run", {}, wanted
            )
            one.entry["alike"] = place_of(alike)
            record.save()
    return list(ids.values()), ""


def _generation(
    config: RootConfig, owned: RootConfig, request: Request, record: RunRecord, store: ArtifactStore, say: Say
) -> tuple[Artifact, GenerationsView, bool]:
    """Write the generation, unless the last one is made of this very input."""
    from qbrec.catalog.append.frozen import frozen_config
    from qbrec.catalog.append.run import build_generation, generation_key, recipe_of
    from qbrec.engine.context import StageContext

    catalog = store.open(record.stages["catalog"]["path"])
    noted = noted_generations(record, store, catalog)
    found = [one.generation for one in noted]
    off = len(record.extra.get("generations", [])) - len(found)
    if off:
        say(f"the catalogue was built anew: {off} generations of the old one are off")
    frozen = owned.model_copy(update={"catalog": frozen_config(catalog, config.catalog)})
    sources = request.sources()
    if found:
        before = GenerationsView(catalog, found[:-1])
        if generation_key(before, request, config=frozen, sources=sources) == found[-1].key:
            return found[-1], GenerationsView(catalog, found), False
    view = GenerationsView(catalog, found)
    key = generation_key(view, request, config=frozen, sources=sources)
    artifact = store.find(GENERATION_KIND, key)
    if artifact is None:
        ctx = StageContext(
            store=store, run_dir=record.path, stage=GENERATION_KIND, key=key, seed=owned.run.seed,
            compute=config.compute, recipe=recipe_of(request, config=frozen), owner=record.owner,
        )  # fmt: skip
        artifact = build_generation(ctx, frozen, view, request, sources=sources)
    artifact.verify()
    store.publish(artifact)
    record.extra["generations"] = [*(one.entry for one in noted), place_of(artifact)]
    record.save()
    return artifact, GenerationsView(catalog, [*found, artifact]), True


def _models(record: RunRecord, store: ArtifactStore, catalog: Artifact) -> dict[str, Artifact] | str:
    """Fusion, quantizer and, if they are there, item graphs of the run's catalogue; or what is missing."""
    found = {"catalog": catalog}
    for stage in ("fusion", "quantizer"):
        if stage not in record.stages:
            return f"the run has no finished {stage} yet"
        artifact = store.open(record.stages[stage]["path"])
        if any(artifact.inputs.get(name) != found[name].fingerprint for name in found):
            return f"the run's {stage} was made before its catalogue was built anew"
        found[stage] = artifact
    if "neighbours" in record.stages:
        graphs = store.open(record.stages["neighbours"]["path"])
        if graphs.inputs == _prints(found):  # else older ones: the next `qbrec run` makes them anew
            found["neighbours"] = graphs
    del found["catalog"]
    return found


def _has_content(models: Mapping[str, Artifact]) -> bool:
    """Whether the run's item graphs have views of content, which alone join new items to others."""
    from qbrec.neighbours.append import content_views

    return "neighbours" in models and bool(content_views(models["neighbours"]))


def make_artifact(
    config: RootConfig,
    record: RunRecord,
    store: ArtifactStore,
    kind: str,
    entry: str,
    recipe: dict[str, Any],
    inputs: Mapping[str, Artifact],
) -> Artifact:
    """Run an entry point in this process, unless what it makes is there: a killed process may have left it.

    Args:
        config: The run's configuration.
        record: Of the run, owned.
        store: Its storage.
        kind: Kind of the artifact.
        entry: `module:function` with the signature `run(ctx, config, inputs) -> Artifact`.
        recipe: What of the configuration shapes it.
        inputs: What it is made of.

    Raises:
        QbrecError: What the entry point raises.
    """
    from qbrec.engine.worker import Order, run_order

    key = artifact_key(kind, config=recipe, seed=config.run.seed, inputs=_prints(inputs))
    found = store.find(kind, key)
    if found is None:
        order: Order = {
            "stage": kind,
            "entry": entry,
            "key": key,
            "config": config.model_dump(mode="json"),
            "recipe": recipe,
            "inputs": {name: str(artifact.path) for name, artifact in inputs.items()},
            "storage": str(store.root),
            "run_dir": str(record.path),
            "owner": record.owner,
            "progress_file": None,
        }
        run_order(order, alone=True)
        found = store.find(kind, key)
        assert found is not None, f"{entry} ended without its artifact"
    found.verify()
    store.publish(found)
    return found


def _warn_of_drift(number: int, ids: Artifact, warn: Say) -> None:
    drift = ids.meta["drift"]
    if drift["refit"]:
        warn(
            f"refit: the new items of generation {number} have {drift['drift']:.2f} times the error of the "
            f"catalogue's under its codebooks (quantizer.quality.max_drift is {drift['max_drift']:g}); "
            f"{drift['share_beyond']:.0%} of {drift['num_new']:,} lie beyond its 95th percentile. Their "
            "semantic IDs say less about them: train on all items under another run.name"
        )


def _prints(inputs: Mapping[str, Artifact]) -> dict[str, str]:
    return {name: artifact.fingerprint for name, artifact in inputs.items()}
