"""Runs of further seeds, trained before the run that evaluates them all."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qbrec.config import RootConfig
    from qbrec.pipeline import Pipeline
    from qbrec.storage.artifact import Artifact


def seeded_pipeline(config: RootConfig, *, resume: str) -> Pipeline:
    """The pipeline of a run that is to be evaluated, the models of its further seeds trained and given."""
    from qbrec.pipeline import Pipeline

    further = _train_further_seeds(config, resume=resume)
    # `never` and `must` were asked of the run when its catalogue was made for the further seeds.
    return Pipeline(config, resume="auto" if further else resume, given=further)


def _train_further_seeds(config: RootConfig, *, resume: str) -> dict[str, Artifact]:
    """Train `evaluation.seeds` - 1 further models on the run's own catalogue.

    Each is a run of its own, `<run.name>-seed-<seed>`; one that was cut off goes on.

    Returns:
        Their artifacts, `<stage>@<s>`, as the evaluation reads them.
    """
    from qbrec.pipeline import Pipeline, say

    found: dict[str, Artifact] = {}
    if config.evaluation.seeds == 1:
        return found
    with Pipeline(config, resume=resume) as own:
        catalog = own.up_to("catalog")
    for further in range(1, config.evaluation.seeds):
        seed = config.run.seed + further
        run = config.run.model_copy(update={"seed": seed, "name": f"{config.run.name}-seed-{seed}"})
        evaluation = config.evaluation.model_copy(update={"seeds": 1})
        other = config.model_copy(update={"run": run, "evaluation": evaluation})
        say(f"\nseed {seed}")
        with Pipeline(other, given={"catalog": catalog}) as pipeline:
            trained = pipeline.train()
        found |= {f"{name}@{further}": artifact for name, artifact in trained.items() if name != "catalog"}
    say(f"\nseed {config.run.seed}")
    return found
