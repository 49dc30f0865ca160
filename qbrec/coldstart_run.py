"""Cold start, measured: a run that was never shown some of the items, which are then appended to it.

It is a run of its own, `<run.name>-coldstart`: the items held out are drawn from the catalogue of the whole
input, whose histories are cut where they come in; what is left is trained on as usual up to fine-tuning.
"""

from __future__ import annotations

import shutil

from qbrec.append_run import Say, append_generation, make_artifact
from qbrec.catalog.append.run import Request
from qbrec.config import RootConfig
from qbrec.errors import DataError
from qbrec.evaluation.coldstart import KIND, RESULT, WHOLE
from qbrec.evaluation.held_out import HELD_OUT, HeldOut, write_input
from qbrec.pipeline import Pipeline, finished_artifacts
from qbrec.run_coldstart import coldstart_config, coldstart_input
from qbrec.run_generations import noted_generations, place_of, with_generations
from qbrec.run_record import RunRecord, run_directory
from qbrec.storage.artifact import Artifact, ArtifactStore

TRAINED = ("catalog", "fusion", "quantizer", "neighbours", "finetune")


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
    place = coldstart_input(cold)
    with Pipeline(config) as pipeline:
        whole = pipeline.up_to("catalog")
        if pipeline.is_main:
            held = HeldOut.draw(whole, share=share, seed=config.run.seed)
            items = config.data.domains[config.data.target_domain].items
            if write_input(place, held, items=items, share=share, seed=config.run.seed):
                say(f"{len(held.rows):,} items held out, {len(held.users):,} users have one: {place}")
    with Pipeline(cold, resume=resume) as pipeline:
        pipeline.up_to("finetune")
        if not pipeline.is_main:
            return None
    request = Request("", str(place / HELD_OUT))
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
        record.extra[KIND] = place_of(artifact)
        record.save()
        return artifact
    finally:
        record.close()
