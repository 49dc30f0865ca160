"""Variants of a run: their keys are valid and change what they say; differences are paired by user."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qbrec.config import RootConfig, load_config
from qbrec.config.ablations import FULL, VARIANTS
from qbrec.errors import DataError
from qbrec.evaluation.ablation import compare, format_ablation
from qbrec.ranking.metrics import METRICS, metrics_of_ranks
from qbrec.stages import STAGES
from qbrec.storage.artifact import Artifact, ArtifactStore

FIRST_CHANGED = {
    "no-pretraining": "pretrain",
    "no-span": "pretrain",
    "no-tail": "pretrain",
    "no-multi-region": "pretrain",
    "no-gate": "fusion",
    "no-behaviour": "fusion",
    "text-only": "fusion",
    "random-ids": "quantizer",
}


def evaluation(root: Path, name: str, ranks: np.ndarray, users: np.ndarray) -> Artifact:
    writer = ArtifactStore(root).writer("evaluation", name * 64)
    writer.prepare()
    columns = {"user": users, "qbrec_removed": ranks, "qbrec_ids_removed": ranks + 1}
    pq.write_table(pa.table(columns), writer.path / "ranks.parquet")
    return writer.commit(meta={}, inputs={}, config={}, seed=0)


def test_each_variant_changes_its_stage_and_nothing_before_it() -> None:
    data = ["data.domains.shop.items=i", "data.domains.shop.interactions=j"]
    plain = load_config(None, overrides=data)
    assert set(FIRST_CHANGED) == set(VARIANTS) - {FULL}
    for variant, stage in FIRST_CHANGED.items():
        config = load_config(None, overrides=[*data, *VARIANTS[variant][1]])
        changed = [s.name for s in STAGES.values() if s.recipe(config) != s.recipe(plain)]
        assert changed[0] == stage, variant
    assert RootConfig().sequence.pretraining
    without = load_config(None, overrides=[*data, *VARIANTS["no-pretraining"][1]])
    assert not STAGES["pretrain"].wanted(without)


def test_differences_are_paired_by_user(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    users, ranks = np.arange(400), rng.integers(1, 40, 400)
    worse = ranks + rng.integers(0, 5, 400)
    found = compare(
        {FULL: evaluation(tmp_path, "a", ranks, users), "no-gate": evaluation(tmp_path, "b", worse, users)},
        resamples=300,
        seed=0,
    )
    place = METRICS.index("ndcg@10")
    expected = (metrics_of_ranks(worse) - metrics_of_ranks(ranks))[:, place]
    cell = found["no-gate"]["qbrec"]["minus_full"]["ndcg@10"]
    assert cell["mean"] == pytest.approx(expected.mean())
    error = expected.std() / 20
    assert cell["low"] == pytest.approx(expected.mean() - 1.96 * error, abs=0.4 * error)
    assert cell["high"] == pytest.approx(expected.mean() + 1.96 * error, abs=0.4 * error)
    assert "minus_full" not in found[FULL]["qbrec"]
    lines = format_ablation(found).splitlines()
    firsts = [line.split()[0] for line in lines if line[:1].isalpha()]
    assert firsts == ["qbrec", "full", "no-gate", "qbrec_ids", "full", "no-gate"]
    assert "*" in next(line for line in lines if line.startswith("no-gate"))


def test_other_users_cannot_be_compared(tmp_path: Path) -> None:
    ranks = np.arange(1, 11)
    found = {
        FULL: evaluation(tmp_path, "a", ranks, np.arange(10)),
        "no-gate": evaluation(tmp_path, "b", ranks, np.arange(1, 11)),
    }
    with pytest.raises(DataError, match="no-gate was evaluated on other users"):
        compare(found, resamples=10, seed=0)
