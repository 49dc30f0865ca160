"""Cold start, measured: a run that was never shown some of the items, which are then appended to it.

It is a run of its own, `<run.name>-coldstart`: the items held out are drawn from the catalogue of the whole
input, whose histories are cut where they come in; what is left is trained on as usual up to fine-tuning.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from qbrec.append_run import Say, append_generation, make_artifact
from qbrec.catalog.append.run import Request
from qbrec.config import RootConfig, parse_config
from qbrec.errors import ConfigError, DataError
from qbrec.evaluation.coldstart import KIND, RESULT, WHOLE
from qbrec.evaluation.held_out import HELD_OUT, INTERACTIONS, ITEMS, HeldOut, write_input
from qbrec.pipeline import Pipeline, finished_artifacts
from qbrec.run_generations import noted_generations, with_generations
from qbrec.run_record import RunRecord, run_directory
from qbrec.storage.artifact import Artifact, ArtifactStore

SUFFIX = "-coldstart"
TRAINED = ("catalog", "fusion", "quantizer", "neighbours", "finetune")


def coldstart_config(config: RootConfig) -> RootConfig:
    """The run without the items: the same configuration over what is left of the target domain's input.

    Raises:
        ConfigError: The run's name leaves no room for the suffix, or several seeds are asked for.
    """
    if config.evaluation.seeds > 1:
        raise ConfigError(
            "cold start is measured with one seed",
            where="evaluation.seeds",
            fix="repeat the command with --set run.seed=… and another run.name",
        )
    tree = config.model_dump(mode="json")
    tree["run"]["name"] = config.run.name + SUFFIX
    tree["run"]["storage"] = str(Path(config.run.storage).resolve())
    cold = parse_config(tree, where=f"run.name{SUFFIX}")
    folder, target = _input(cold), config.data.target_domain
    tree["data"]["target"] = target
    tree["data"]["domains"][target] = {
        "items": str(folder / ITEMS),
        "interactions": str(folder / INTERACTIONS),
    }
    return parse_config(tree, where=f"run.name{SUFFIX}")


def measure_coldstart(
    config: RootConfig, *, share: float, resume: str, say: Say, warn: Say
) -> Artifact | None:
    """Hold items out, train without them, append them, and rank each user's first one.

    Args:
        config: Of the run with all items.
        share: Of the target domain's items, drawn with run.seed.
        resume: `auto`, `must` or `never`, for the run without the items.
        say: For progress.
        warn: For what should be looked into.

    Returns:
        An artifact with `coldstart.json`, which also lies in the run's folder; None on ranks other than 0.

    Raises:
        QbrecError: See `Pipeline`, `append_generation` and `evaluation.coldstart.run`.
    """
    cold = coldstart_config(config)
    with Pipeline(config) as pipeline:
        whole = pipeline.up_to("catalog")
        if pipeline.is_main:
            held = HeldOut.draw(whole, share=share, seed=config.run.seed)
            items = config.data.domains[config.data.target_domain].items
            if write_input(_input(cold), held, items=items, share=share, seed=config.run.seed):
                say(f"{len(held.rows):,} items held out, {len(held.users):,} users have one: {_input(cold)}")
    with Pipeline(cold, resume=resume) as pipeline:
        pipeline.up_to("finetune")
        if not pipeline.is_main:
            return None
    request = Request("", str(_input(cold) / HELD_OUT))
    done = append_generation(cold, request, say=say, warn=warn)
    if done.missing or len(done.view.generations) != 1:
        raise DataError(
            done.missing or "more was appended to this run than the items held out",
            where=str(run_directory(cold)),
            fix="delete that folder and repeat the command: finished stages are used again",
        )
    record = RunRecord.own(cold, resume="must")
    try:
        store = ArtifactStore(cold.run.storage, remote=cold.run.remote)
        found = finished_artifacts(cold)
        found = with_generations(cold, {name: found[name] for name in TRAINED if name in found})
        (noted,) = noted_generations(record, store, found["catalog"])
        inputs = {**found, "fused": store.open(noted.entry["fused"]["path"]), WHOLE: whole}
        recipe = {
            "share": share,
            "evaluation": cold.evaluation.model_dump(mode="json", include={"bootstrap", "max_users"}),
            "ranking": [cold.ranking.scorer, cold.ranking.beam],
        }
        entry = "qbrec.evaluation.coldstart:run"
        artifact = make_artifact(cold, record, store, KIND, entry, recipe, inputs)
        shutil.copyfile(artifact.file(RESULT), record.path / RESULT)
        return artifact
    finally:
        record.close()


def _input(cold: RootConfig) -> Path:
    return run_directory(cold) / "input"
