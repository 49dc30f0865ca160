"""SASRec and BERT4Rec as stages, and in the evaluation beside the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from qbrec.baselines import stage
from qbrec.baselines.item_scorer import load_item_scorer
from qbrec.config import RootConfig, parse_config
from qbrec.engine.context import StageContext
from qbrec.engine.launch import process_group
from qbrec.errors import ConfigError, DataError
from qbrec.evaluation.stage import run as evaluate
from qbrec.evaluation.table import format_table
from qbrec.ranking import tie_rank, validation_metrics
from qbrec.sequence.encoder import SequenceEncoder
from qbrec.sequence.recommender import save_encoder
from qbrec.sequence.vocabulary import Vocabulary
from qbrec.stages import STAGES, stages_of
from qbrec.storage.artifact import Artifact, ArtifactStore
from qbrec.storage.catalog_view import CatalogView
from tests.support.sequence_inputs import DOMAINS, ITEMS, LEVELS, make_inputs

TRAINED = ("sasrec", "bert4rec")
TRAIN = {"batch_size": 32, "micro_batch": 16, "learning_rate": 1e-2}
SMALL = {"width": 32, "layers": 1, "heads": 2, "dropout": 0.0, "max_items": 8}


def configured(evaluation: dict[str, Any] | None = None, **baselines: Any) -> RootConfig:
    domains = {name: {"items": "x", "interactions": "x"} for name in DOMAINS}
    settings = {
        "sasrec": {**SMALL, "train": {**TRAIN, "epochs": 20, "evaluate_every": 5}},
        "bert4rec": {**SMALL, "train": {**TRAIN, "epochs": 60, "evaluate_every": 20}},
    }
    for name, changes in baselines.items():
        settings[name] = {**settings[name], **changes}
    return parse_config(
        {
            "data": {"domains": domains, "target": "games"},
            "sequence": {"width": 16, "layers": 1, "heads": 2, "max_items": 6},
            "baselines": settings,
            "evaluation": {"bootstrap": 50, **(evaluation or {})},
        }
    )


def trained(root: Path, name: str, config: RootConfig, inputs: dict[str, Artifact], key: str) -> Artifact:
    context = StageContext.local(ArtifactStore(root), root / f"run-{key}", stage=name, key=key * 64)
    with process_group(config):
        made: Artifact = getattr(stage, name)(context, config, inputs)
    return made


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    root = tmp_path_factory.mktemp("baselines")
    inputs = make_inputs(root)
    catalog = {"catalog": inputs["catalog"]}
    config = configured()
    return inputs | {name: trained(root, name, config, catalog, "e") for name in TRAINED}


@pytest.mark.parametrize("name", TRAINED)
def test_the_artifact_scores_as_the_best_evaluation_did(made: dict[str, Artifact], name: str) -> None:
    artifact, catalog = made[name], CatalogView(made["catalog"])
    assert artifact.kind == name
    artifact.verify()
    curve = artifact.load_json("curve.json")
    best = artifact.meta["best"]
    assert best in curve
    assert best["ndcg@10"] == max(entry["ndcg@10"] for entry in curve)
    assert artifact.meta["epochs"] == curve[-1]["epoch"]
    found = validation_metrics(
        load_item_scorer(artifact),
        catalog.load_histories("games"),
        tie_rank=tie_rank(np.asarray(catalog.train_counts)),
        allowed=catalog.candidates("games"),
    )
    assert found["ndcg@10"] == pytest.approx(best["ndcg@10"], abs=1e-6)
    # Users walk backwards along a ring of 30 items: once that is learnt, the next one is first.
    assert found["hr@1"] > 0.7


def test_evaluation_has_all_four(
    made: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CatalogView, "near_duplicate_group", property(lambda self: np.arange(2 * ITEMS)))
    config = configured()
    torch.manual_seed(0)
    writer = ArtifactStore(tmp_path).writer("finetune", "f" * 64)
    writer.prepare()
    save_encoder(writer, SequenceEncoder(config.sequence, Vocabulary(LEVELS, DOMAINS)))
    inputs = made | {"finetune": writer.commit(meta={}, inputs={}, config={}, seed=0)}
    context = StageContext.local(ArtifactStore(tmp_path), tmp_path / "run", stage="evaluation", key="a" * 64)
    found = evaluate(context, config, inputs)
    metrics = found.load_json("metrics.json")
    names = {"qbrec", "popularity", "itemknn", *TRAINED}
    assert set(metrics["models"]) == set(metrics["coverage"]) == names
    assert set(metrics["paired"]) == names - {"qbrec"}
    table = pq.read_table(found.file("ranks.parquet"))
    popular = metrics["models"]["popularity"]["removed"]["hr@1"]["mean"]
    for name in TRAINED:
        best = made[name].meta["best"]
        assert metrics["settings"][name] == {
            "epochs": made[name].meta["epochs"],
            "best_epoch": best["epoch"],
            "validation_ndcg@10": best["ndcg@10"],
        }
        first = np.mean(table[f"{name}_removed"].to_numpy() == 1)
        assert metrics["models"][name]["removed"]["hr@1"]["mean"] == pytest.approx(first)
        assert first > popular + 0.3
        assert name in format_table(metrics)


def test_a_run_has_the_baselines_that_its_evaluation_names(made: dict[str, Artifact]) -> None:
    every, without = stages_of(configured()), stages_of(configured({"baselines": ["popularity", "bert4rec"]}))
    assert [stage.name for stage in every] == list(STAGES)
    assert every[-1].inputs == STAGES["evaluation"].inputs
    seeds = stages_of(configured({"seeds": 3}))
    own = every[-1].inputs
    assert seeds[-1].inputs == own + tuple(f"{name}@{s}" for s in (1, 2) for name in own if name != "catalog")
    assert [stage.inputs for stage in seeds[:-1]] == [stage.inputs for stage in every[:-1]]
    assert [stage.name for stage in without] == [name for name in STAGES if name != "sasrec"]
    assert without[-1].inputs == tuple(name for name in every[-1].inputs if name != "sasrec")
    with pytest.raises(ConfigError, match="baselines"):
        configured({"baselines": ["gru4rec"]})


def test_a_baseline_is_made_again_only_when_it_changes(made: dict[str, Artifact]) -> None:
    def keys(config: RootConfig) -> dict[str, str]:
        return {name: STAGES[name].key(config, inputs=made, sources="") for name in TRAINED}

    usual = keys(configured())
    assert keys(configured({"bootstrap": 7, "baselines": list(TRAINED)})) == usual
    more = keys(configured(sasrec={"layers": 2}))
    assert more["sasrec"] != usual["sasrec"]
    assert more["bert4rec"] == usual["bert4rec"]
    tree = configured().model_dump(mode="json")
    for change in ({"run": {**tree["run"], "seed": 1}}, {"data": {**tree["data"], "target": "pets"}}):
        other = keys(parse_config(tree | change))
        assert all(other[name] != usual[name] for name in TRAINED)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("sasrec", {"width": 16}),
        ("sasrec", {"layers": 2}),
        ("sasrec", {"heads": 4}),
        ("sasrec", {"dropout": 0.5}),
        ("sasrec", {"max_items": 2}),
        ("sasrec", {"candidates": 7}),
        ("sasrec", {"validation_users": 9}),
        ("bert4rec", {"mask_ratio": 0.9}),
        ("bert4rec", {"tail": 1.0}),
    ],
)
def test_every_setting_matters(
    made: dict[str, Artifact], tmp_path: Path, name: str, change: dict[str, Any]
) -> None:
    once = {"train": {**TRAIN, "epochs": 1}}
    catalog = {"catalog": made["catalog"]}
    curves = []
    for key, settings in (("1", once), ("2", {**once, **change})):
        artifact = trained(tmp_path, name, configured(**{name: settings}), catalog, key)
        curves.append(artifact.load_json("curve.json"))
    assert curves[0] != curves[1]


def test_widths_that_heads_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"baselines.*multiple of heads"):
        configured(bert4rec={"width": 30, "heads": 4})


def test_a_domain_without_histories_says_so(
    made: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CatalogView, "domain_number", lambda self, domain: 7)
    monkeypatch.setattr(CatalogView, "domain_mask", lambda self, domain: np.arange(2 * ITEMS) >= ITEMS)
    with pytest.raises(DataError, match="nothing to learn"):
        trained(tmp_path, "sasrec", configured(), {"catalog": made["catalog"]}, "3")


def test_training_goes_on_where_it_was_cut_off(
    made: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(bert4rec={"dropout": 0.2, "train": {**TRAIN, "epochs": 3}})
    catalog = {"catalog": made["catalog"]}
    whole = trained(tmp_path / "a", "bert4rec", config, catalog, "5")
    evaluations = iter(range(3))

    def cut_off(*args: Any, **kwargs: Any) -> dict[str, float]:
        if next(evaluations) == 1:
            raise KeyboardInterrupt
        return validation_metrics(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("qbrec.ranking.validate.validation_metrics", cut_off)
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path / "b", "bert4rec", config, catalog, "5")
    again = trained(tmp_path / "b", "bert4rec", config, catalog, "5")
    assert again.load_json("curve.json") == whole.load_json("curve.json")
    weights = [a.load_safetensors("item_encoder.safetensors") for a in (whole, again)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
