"""The auto-encoder around the codebooks: gradients, warm-up, the stage and its resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qbrec.config import RootConfig, parse_config
from qbrec.engine.context import StageContext
from qbrec.engine.launch import process_group
from qbrec.quantizer import rqvae, stage
from qbrec.quantizer.autoencoder import (
    AutoEncoder,
    QuantizedReconstruction,
    rotate,
    straight_through,
)
from qbrec.quantizer.kmeans.chunks import Alone, Shard
from qbrec.quantizer.kmeans.kernels.gemm import TILE
from qbrec.quantizer.quality import level_usage
from qbrec.quantizer.quantizer import Quantizer
from qbrec.quantizer.rvq import encode, fit_levels
from qbrec.storage.artifact import Artifact, ArtifactStore
from tests.support.clusters import clustered
from tests.support.quantizer_inputs import quantizer_inputs

ITEMS = 2400
SMALL = {
    "latent": 8,
    "hidden": [32],
    "warmup": {"epochs": 12, "batch_size": 256, "micro_batch": 256, "learning_rate": 3e-3},
    "train": {"epochs": 6, "batch_size": 256, "micro_batch": 256},
}


def _config(**keys: Any) -> RootConfig:
    rqvae_keys = SMALL | keys
    tree = {"method": "rqvae", "levels": [32, 16, 16], "iterations": 5, "rqvae": rqvae_keys}
    tree["quality"] = {"min_r2_held_out": 0.0}  # some of these are hardly trained
    return parse_config({"quantizer": tree})


def _run(folder: Path, inputs: dict[str, Artifact], name: str, **keys: Any) -> Artifact:
    store = ArtifactStore(folder)
    place = folder / "runs" / name
    ctx = StageContext.local(store, place, stage="quantizer", key=name.ljust(64, "0"), seed=7)
    config = _config(**keys)
    with process_group(config):
        return stage.run(ctx, config, inputs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def inputs(folder: Path) -> dict[str, Artifact]:
    return quantizer_inputs(ArtifactStore(folder), clustered(ITEMS, 24, clusters=200))


@pytest.fixture(scope="module")
def artifact(folder: Path, inputs: dict[str, Artifact]) -> Artifact:
    return _run(folder, inputs, "first")


def test_the_rotation_turns_gradients_with_the_vector() -> None:
    torch.manual_seed(0)
    latent = torch.randn(50, 6, dtype=torch.float64, requires_grad=True)
    code = torch.randn(50, 6, dtype=torch.float64)
    out = rotate(latent, code)
    torch.testing.assert_close(out, code)
    weight = torch.randn(50, 6, dtype=torch.float64)
    (out * weight).sum().backward()
    assert latent.grad is not None
    # The angle between gradient and vector is kept, lengths scale as the vector did (section 4 of the paper).
    cosine = torch.nn.functional.cosine_similarity
    torch.testing.assert_close(cosine(latent.grad, latent.detach()), cosine(weight, code))
    scale = code.norm(dim=1) / latent.detach().norm(dim=1)
    torch.testing.assert_close(latent.grad.norm(dim=1), weight.norm(dim=1) * scale)


def test_straight_through_passes_gradients_as_they_are() -> None:
    latent = torch.randn(5, 3, requires_grad=True)
    out = straight_through(latent, torch.ones(5, 3))
    torch.testing.assert_close(out, torch.ones(5, 3))
    (out * 2).sum().backward()
    assert latent.grad is not None
    assert torch.equal(latent.grad, torch.full((5, 3), 2.0))


def test_gradients_reach_the_encoder_the_decoder_and_the_codes_in_use() -> None:
    torch.manual_seed(0)
    network = AutoEncoder(6, hidden=(8,), latent=4)
    levels = [torch.randn(3, 4), torch.cat([torch.randn(2, 4), torch.full((1, 4), 1e4)])]
    module = QuantizedReconstruction(network, levels, beta=0.25, gradient="rotation")
    module(torch.randn(40, 6)).backward()
    grads = {name: parameter.grad for name, parameter in module.named_parameters()}
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads.values())
    last = grads["level_1"]
    assert last is not None
    assert (last[2] == 0).all(), "a code that no row has is not moved"


def test_latents_do_not_depend_on_the_number_of_threads() -> None:
    network, x = AutoEncoder(24, hidden=(16,), latent=8), torch.randn(TILE + 77, 24)
    threads = torch.get_num_threads()
    both = []
    for count in (1, 2):
        torch.set_num_threads(count)
        both.append(network.encode(x))
    torch.set_num_threads(threads)
    assert torch.equal(*both)
    assert torch.equal(network.encode(x[:5]), both[0][:5])


def test_encoding_keeps_no_graph() -> None:
    network, recorded = AutoEncoder(24, hidden=(16,), latent=8), []
    network.encoder.register_forward_hook(lambda *_: recorded.append(torch.is_grad_enabled()))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    network.encode(torch.randn(3 * TILE, 24))
    torch.set_num_threads(threads)
    assert recorded == [False] * 3


def test_reloaded_it_gives_the_codes_of_the_table(artifact: Artifact, inputs: dict[str, Artifact]) -> None:
    quantizer = Quantizer.load(artifact)
    assert quantizer.network is not None
    assert artifact.meta["network"] == {"width": 24, "hidden": [32], "latent": 8}
    x = clustered(ITEMS, 24, clusters=200).half()
    codes = quantizer.encode(x)
    assert np.array_equal(codes.numpy(), artifact.load_npy("raw_codes.npy"))
    again = quantizer.decode(codes)
    quality = artifact.load_json("quality.json")
    y = (x.float() - quantizer.mean) / quantizer.std
    error = float(((again - quantizer.mean) / quantizer.std - y).square().sum() / y.square().sum())
    assert quality["levels"][-1]["residual_energy"] == pytest.approx(error, rel=1e-3)
    r2 = [level["r2_held_out"] for level in quality["levels"]]
    assert 0.1 < r2[0] < r2[-1] < 1


def test_training_through_the_codebooks_lowers_the_held_out_loss(artifact: Artifact, folder: Path) -> None:
    curves: dict[str, list[float]] = {}
    for line in (folder / "runs/first/metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if "held_out_loss" in entry["metrics"]:
            curves.setdefault(entry["stage"], []).append(entry["metrics"]["held_out_loss"])
    warm, trained = curves["quantizer/warm-up"], curves["quantizer/train"]
    assert len(warm) == 12
    assert len(trained) == 6
    assert warm[-1] < 0.7 * warm[0]
    assert trained[-1] < trained[0]


def test_a_warmed_up_encoder_uses_more_codes_than_an_untrained_one(inputs: dict[str, Artifact]) -> None:
    """Why the warm-up comes first: latents of an untrained encoder hardly differ."""
    x = clustered(ITEMS, 24, clusters=200)
    x = ((x - x.mean(0)) / x.std(0)).contiguous()
    torch.manual_seed(0)
    network = AutoEncoder(24, hidden=(32,), latent=8)

    def spread() -> float:
        """Held-in error of the reconstruction's ideal: how much of x level-0 cells explain."""
        z = Shard(network.encode(x).contiguous(), 0, len(x))
        books = fit_levels(z, (64,), comm=Alone(), seed=0, iterations=10)
        codes = encode(z.x, books)[:, 0]
        assert level_usage(codes[:, None].numpy(), (64,))[0]["dead"] == 0
        means = torch.zeros(64, 24).index_add_(0, codes, x) / torch.bincount(codes, minlength=64)[:, None]
        return float((x - means[codes]).square().sum() / x.square().sum())

    before = spread()
    optimiser = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(150):
        optimiser.zero_grad()
        again: Tensor = network.decoder(network.encoder(x))
        (again - x).square().mean().backward()
        optimiser.step()
    assert spread() < 0.95 * before


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("latent", {"latent": 4}),
        ("hidden", {"hidden": [16]}),
        ("beta", {"beta": 2.0}),
        ("gradient", {"gradient": "straight_through"}),
        ("warmup", {"warmup": SMALL["warmup"] | {"epochs": 1}}),
        ("train", {"train": SMALL["train"] | {"epochs": 1}}),
    ],
)
def test_every_key_counts(
    name: str, keys: dict[str, Any], folder: Path, inputs: dict[str, Artifact], artifact: Artifact
) -> None:
    other = _run(folder, inputs, name, **keys)
    assert not np.array_equal(other.load_npy("raw_codes.npy"), artifact.load_npy("raw_codes.npy"))


@pytest.mark.parametrize("cut", ["warm-up", "level-1", "train"])
def test_a_cut_between_acts_changes_nothing(
    cut: str, folder: Path, inputs: dict[str, Artifact], artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    class Cut(Exception):
        pass

    plain = rqvae._train

    def log(self: StageContext, step: int, metrics: Any) -> None:
        for name in metrics:
            seen.append(name)
            if name.startswith(f"{cut}/"):
                raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(StageContext, "log_metrics", log)
        with pytest.raises(Cut):
            _run(folder, inputs, f"cut-{cut}")
    assert any(name.startswith(cut) for name in seen), "the fault fired"
    acts = []

    def counted(ctx: StageContext, module: Any, *rest: Any, act: str) -> dict[str, float]:
        acts.append((act, sorted(path.name for path in (ctx.checkpoint_dir / act).glob("step-*"))))
        return plain(ctx, module, *rest, act=act)

    monkeypatch.setattr(rqvae, "_train", counted)
    again = _run(folder, inputs, f"cut-{cut}")
    assert acts[0][1], "the warm-up was not done again"
    for name in ("semantic_ids.npy", "codebooks.safetensors", "autoencoder.safetensors"):
        assert again.file(name).read_bytes() == artifact.file(name).read_bytes()
