"""`qbrec coldstart` from Parquet to its table on a small synthetic shop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner

from qbrec.catalog.synth import generate
from qbrec.cli.coldstart import coldstart
from qbrec.config import RootConfig, load_config
from qbrec.evaluation.held_out import HeldOut
from qbrec.evaluation.results import IDS_ALONE, MODEL
from qbrec.pipeline import finished_artifacts
from qbrec.registry.checks import check_coldstart
from qbrec.registry.recommend import Recommender
from qbrec.run_coldstart import coldstart_config, with_coldstart
from qbrec.run_generations import with_generations
from qbrec.run_record import run_directory
from qbrec.storage.artifact import Artifact
from qbrec.storage.catalog_view import CatalogView
from tests.ray.test_append import TINY

pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.slow]
SHARE = 0.1


def measured(config: Path, *options: str) -> tuple[str, dict[str, Any], RootConfig, dict[str, Artifact]]:
    """What the command prints and writes, and the run that it made."""
    done = CliRunner().invoke(coldstart, ["--config", str(config), "--share", str(SHARE), *options])
    if done.exception is not None:
        raise done.exception
    cold = coldstart_config(load_config(config))
    document = json.loads((run_directory(cold) / "coldstart.json").read_text())
    return done.stdout, document, cold, with_generations(cold, finished_artifacts(cold))


def test_items_never_seen_are_appended_and_found(tmp_path: Path) -> None:
    made = generate(tmp_path / "shop", num_items=200, num_users=250, images=False, seed=5)
    tree = {
        "run": {"name": "shop", "storage": str(tmp_path / "storage")},
        "data": {"domains": {"shop": {"items": str(made.items), "interactions": str(made.interactions)}}},
        "catalog": {"text": {"dim": 16}},
        "evaluation": {"bootstrap": 50},
        "tracking": {"enabled": False},
        **TINY,
    }
    path = tmp_path / "shop.yaml"
    path.write_text(yaml.safe_dump(tree))
    output, document, cold, artifacts = measured(path)

    whole = finished_artifacts(load_config(path))["catalog"]
    held = HeldOut.draw(whole, share=SHARE, seed=cold.run.seed)
    names = set(held.catalog.item_ids(held.rows))
    contexts, targets = held.tests(held.users)
    known = len(np.unique(held.histories.rows.values))
    assert document["protocol"]["num_held_out"] == len(names) == round(SHARE * known)
    assert document["protocol"]["num_users"] == len(held.users) > 20
    # Nothing that was trained on knows them, or what their buyers did from then on.
    base = CatalogView(artifacts["catalog"])
    assert base.num_items == 200 - len(names)
    assert not names & set(base.item_ids(np.arange(base.num_items)))
    learnt = base.load_histories()
    numbers = {name: row for row, name in enumerate(base.user_ids(learnt.user))}
    for place, user in enumerate(held.catalog.user_ids(held.histories.user[held.users])):
        trained = learnt.rows.row(numbers[user])
        assert base.item_ids(trained) == held.catalog.item_ids(contexts.row(place))
    assert artifacts["generation-1"].meta["num_added"] == len(names) == artifacts["alike-1"].meta["num_added"]

    # The ranks are those of the lists that the run serves.
    recommender = Recommender.from_artifacts(artifacts, ranking=cold.ranking)
    histories = [held.catalog.item_ids(contexts.row(place)) for place in range(len(contexts))]
    lists = recommender.recommend(histories, k=10)
    goals = held.catalog.item_ids(targets)
    hits = [goal in [item["item_id"] for item in items] for goal, items in zip(goals, lists, strict=True)]
    models = document["catalogue"]["models"]
    assert models[MODEL]["removed"]["hr@10"]["mean"] == pytest.approx(np.mean(hits))
    alone = recommender.recommend(histories, k=10, among=recommender.only(item_ids=sorted(names)))
    hits = [goal in [item["item_id"] for item in items] for goal, items in zip(goals, alone, strict=True)]
    first = document["held_out"]["models"][MODEL]["removed"]
    assert first["hr@10"]["mean"] == pytest.approx(np.mean(hits))
    assert document["held_out"]["num_candidates"] == len(names)
    assert document["catalogue"]["num_candidates"] == 200
    # What joins them to the graphs is what makes them found; content of a synthetic shop tells much.
    assert models["qbrec_unjoined"]["removed"]["hr@10"]["mean"] < models[MODEL]["removed"]["hr@10"]["mean"]
    assert first["mrr"]["mean"] > document["held_out"]["random"]["mrr"]
    rival = document["catalogue"]["paired"]["content:text recent"]["removed"]["ndcg@10"]
    ours, theirs = (models[name]["removed"]["ndcg@10"]["mean"] for name in (MODEL, "content:text recent"))
    assert rival["mean"] == pytest.approx(ours - theirs)
    for name in (MODEL, "qbrec_unjoined", IDS_ALONE, "content:text mean", "content:fused recent", "random"):
        assert name in output

    # Whoever registers the run finds the figures, and a gate reads them.
    registered = with_coldstart(load_config(path), {"catalog": whole})["coldstart"]
    assert registered.load_json("coldstart.json") == document
    floors = {"held_out/hr@10": first["hr@10"]["mean"], "catalogue/non_duplicate/hr@10": 1.0}
    assert [check.passed for check in check_coldstart(document, floors)] == [False, True]

    # The same command again writes nothing anew.
    stored = tmp_path / "storage" / "artifacts"
    before = {p: p.stat().st_mtime_ns for p in stored.rglob("*") if p.name == "manifest.json"}
    again, _, _, _ = measured(path)
    assert again == output
    assert {p: p.stat().st_mtime_ns for p in stored.rglob("*") if p.name == "manifest.json"} == before
    kept = pq.read_table(run_directory(cold) / "input" / "interactions.parquet")
    assert not names & set(kept["item_id"].to_pylist())
