"""The auto-encoder and its codebooks on one rank and on two, under ZeRO 0 and 3."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from qbrec.config import parse_config
from qbrec.engine.context import StageContext
from qbrec.quantizer import stage
from qbrec.storage.artifact import Artifact, ArtifactStore
from tests.support.clusters import clustered
from tests.support.quantizer_inputs import quantizer_inputs
from tests.support.spawn import run_ranks

pytestmark = pytest.mark.dist
ITEMS = 5000  # three grains: two ranks have different numbers of rows


def _run(rank: int, world: int, root: str, key: str, zero: int) -> None:
    store = ArtifactStore(root)
    train = {"epochs": 6, "batch_size": 512, "micro_batch": 128, "learning_rate": 5e-3}
    settings = {"latent": 8, "hidden": [32], "warmup": train, "train": train}
    gates = {"min_r2_held_out": 0.0, "max_collision_rate": 1.0}
    tree = {"method": "rqvae", "levels": [16, 8], "iterations": 4, "rqvae": settings, "quality": gates}
    config = parse_config({"quantizer": tree, "compute": {"zero_stage": zero}})
    ctx = StageContext(
        store=store,
        run_dir=Path(root, "run", key),
        stage="quantizer",
        key=key * 64,
        seed=5,
        rank=rank,
        world=world,
        compute=config.compute,
    )
    inputs = {name: store.find(name, name[0] * 64) for name in ("catalog", "fusion")}
    stage.run(ctx, config, {name: artifact for name, artifact in inputs.items() if artifact is not None})


def build(root: Path, key: str, *, world: int, zero: int) -> Artifact:
    (root / "run" / key).mkdir(parents=True, exist_ok=True)
    run_ranks(_run, world, str(root), key, zero)
    found = ArtifactStore(root).find("quantizer", key * 64)
    assert found is not None
    return found


def test_two_ranks_train_what_one_does(tmp_path: Path) -> None:
    quantizer_inputs(ArtifactStore(tmp_path), clustered(ITEMS, 24, clusters=200))
    one = build(tmp_path, "1", world=1, zero=0)
    errors = [level["residual_energy_held_out"] for level in one.load_json("quality.json")["levels"]]
    weights = one.load_safetensors("autoencoder.safetensors")
    for key, zero in (("2", 0), ("3", 3)):
        two = build(tmp_path, key, world=2, zero=zero)
        for name, weight in two.load_safetensors("autoencoder.safetensors").items():
            torch.testing.assert_close(weight, weights[name], rtol=1e-3, atol=1e-4)
        others = [level["residual_energy_held_out"] for level in two.load_json("quality.json")["levels"]]
        np.testing.assert_allclose(others, errors, rtol=1e-3)
