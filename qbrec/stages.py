"""The stages in order: what each needs, what of the configuration shapes it, and where its code lies.

This table is the only place that knows them all; stages themselves meet on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from qbrec.config import RootConfig
from qbrec.storage.artifact import Artifact, artifact_key

CATALOG = "catalog"
BASELINES = ("sasrec", "bert4rec")  # those that are trained


@dataclass(frozen=True)
class Stage:
    """One step of the road.

    Attributes:
        name: Name, and kind of the artifact it writes.
        entry: `module:function` with the signature `run(ctx, config, inputs) -> Artifact`.
        inputs: Stages whose artifacts it reads, those that are not `wanted` excepted.
        recipe: What of the configuration shapes its result.
        distributed: Runs on all workers; otherwise once, on the driver.
        gate: `module:function` called with (artifact, configuration), just made or made earlier, before
            anything is made of it: it raises GateError. What only the gate reads is no part of the recipe, so
            that other thresholds cost nothing.
        wanted: Whether a run of a configuration has this stage.
        every_seed: Reads what the runs of further seeds (`evaluation.seeds`) trained as well: the artifacts
            of the s-th one under `<stage>@<s>`.
    """

    name: str
    entry: str
    inputs: tuple[str, ...]
    recipe: Callable[[RootConfig], dict[str, Any]]
    distributed: bool = True
    gate: str | None = None
    wanted: Callable[[RootConfig], bool] = lambda config: True
    every_seed: bool = False

    def key(self, config: RootConfig, *, inputs: Mapping[str, Artifact], sources: str) -> str:
        """Key of the artifact this stage would write."""
        prints = {name: inputs[name].fingerprint for name in self.inputs} or {"sources": sources}
        return artifact_key(self.name, config=self.recipe(config), seed=config.run.seed, inputs=prints)


def stages_of(config: RootConfig) -> tuple[Stage, ...]:
    """The stages that a run of this configuration has, in order, each with the inputs that there are."""
    wanted = {name: stage for name, stage in STAGES.items() if stage.wanted(config)}
    return tuple(replace(stage, inputs=_inputs(stage, wanted, config)) for stage in wanted.values())


def _inputs(stage: Stage, wanted: Mapping[str, Stage], config: RootConfig) -> tuple[str, ...]:
    own = tuple(name for name in stage.inputs if name in wanted)
    further = range(1, config.evaluation.seeds) if stage.every_seed else ()
    return own + tuple(f"{name}@{s}" for s in further for name in own if name != CATALOG)


def _catalog(config: RootConfig) -> dict[str, Any]:
    return {
        "catalog": _dump(config.catalog),
        "domains": list(config.data.domains),
        "target": config.data.target_domain,
    }


def _quantizer(config: RootConfig) -> dict[str, Any]:
    tree = _dump(config.quantizer)
    del tree["quality"]
    return {"quantizer": tree}


def _neighbours(config: RootConfig) -> dict[str, Any]:
    ranking = config.ranking
    return {"kept": [ranking.neighbours, ranking.alike], "target": config.data.target_domain}


def _pretrain(config: RootConfig) -> dict[str, Any]:
    sequence = _dump(config.sequence)
    for name in ("finetune", "finetune_masks", "finetune_prefix"):
        del sequence[name]
    # The target domain's validation users choose the weights.
    return {"sequence": sequence, "target": config.data.target_domain}


def _finetune(config: RootConfig) -> dict[str, Any]:
    return {
        "sequence": _dump(config.sequence),
        "target": config.data.target_domain,
    }


def _baseline(name: str) -> Stage:
    """A baseline that is trained: over the catalogue alone, and only where the evaluation asks for it."""

    def recipe(config: RootConfig) -> dict[str, Any]:
        return {"baseline": _dump(getattr(config.baselines, name)), "target": config.data.target_domain}

    return Stage(
        name,
        f"qbrec.baselines.stage:{name}",
        (CATALOG,),
        recipe,
        wanted=lambda config: name in config.evaluation.baselines,
    )


def _evaluation(config: RootConfig) -> dict[str, Any]:
    return {
        "evaluation": _dump(config.evaluation),
        "ranking": [config.ranking.scorer, config.ranking.beam],
        "target": config.data.target_domain,
    }


# When a loop writes checkpoints and how many it keeps changes nothing of what it learns.
_CHECKPOINTS = ("checkpoint_every", "keep_checkpoints", "keep_every")


def _dump(section: Any) -> dict[str, Any]:
    def without(tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        return {k: without(v) for k, v in tree.items() if k not in _CHECKPOINTS}

    kept: dict[str, Any] = without(section.model_dump(mode="json"))
    return kept


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(CATALOG, "qbrec.catalog.stage:run", (), _catalog, distributed=False),
        Stage("fusion", "qbrec.fusion.stage:run", (CATALOG,), lambda c: {"fusion": _dump(c.fusion)}),
        Stage(
            "quantizer",
            "qbrec.quantizer.stage:run",
            (CATALOG, "fusion"),
            _quantizer,
            gate="qbrec.quantizer.stage:gate",
        ),
        Stage(
            "neighbours",
            "qbrec.neighbours.stage:run",
            (CATALOG, "fusion", "quantizer"),
            _neighbours,
            wanted=lambda config: config.ranking.neighbours > 0,
        ),
        Stage(
            "pretrain",
            "qbrec.sequence.stage:pretrain",
            (CATALOG, "quantizer"),
            _pretrain,
            wanted=lambda config: config.sequence.pretraining,
        ),
        Stage(
            "finetune",
            "qbrec.sequence.stage:finetune",
            (CATALOG, "quantizer", "pretrain", "neighbours"),
            _finetune,
        ),
        *map(_baseline, BASELINES),
        Stage(
            "evaluation",
            "qbrec.evaluation.stage:run",
            (CATALOG, "quantizer", "neighbours", "finetune", *BASELINES),
            _evaluation,
            every_seed=True,
        ),
    )
}
