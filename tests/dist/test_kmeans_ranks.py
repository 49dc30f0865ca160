"""Codebooks and codes are the same, bit for bit, on 1, 2 and 4 ranks, uneven and empty, with any threads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from qbrec.config import parse_config
from qbrec.config.stages import QuantizerConfig
from qbrec.engine.context import StageContext
from qbrec.quantizer.fit import fit_codebooks
from qbrec.quantizer.kmeans.chunks import GRAIN, Shard, split_rows, standardise, stratified
from qbrec.quantizer.kmeans.fit import fit_kmeans
from qbrec.quantizer.kmeans.lloyd import lloyd
from qbrec.quantizer.rvq import encode, prefix_errors
from qbrec.quantizer.stage import run
from qbrec.storage.artifact import ArtifactStore
from tests.support.clusters import clustered
from tests.support.modality_inputs import some_features, with_features
from tests.support.quantizer_inputs import quantizer_inputs
from tests.support.spawn import run_ranks

pytestmark = pytest.mark.dist

CASES = {
    "uneven": 4 * GRAIN + 777,  # 5 grains on 2 and 4 ranks, the last one short
    "empty": GRAIN - 5,  # one grain: all ranks but one have nothing
}


def _fit(rank: int, world: int, num_rows: int, folder: str) -> dict[str, Tensor]:
    comm = StageContext.local(ArtifactStore(folder), folder)
    comm.rank, comm.world = rank, world
    x = clustered(num_rows, 12, seed=5)
    # A clump of equal rows and seeds far outside force empty clusters and ties.
    x[10:200] = x[10]
    start, stop = split_rows(num_rows, rank=rank, world=world)
    held = torch.zeros(num_rows, dtype=torch.bool)
    held[torch.from_numpy(stratified(num_rows, num_rows // 20, seed=1))] = True
    raw = Shard(x[start:stop].clone(), start, num_rows)
    mean, std = standardise(raw, comm)
    rows = raw.x
    shard = Shard(rows, start, num_rows, ~held[start:stop])
    far = torch.full((6, 12), 50.0)
    moved = lloyd(shard, torch.cat([((x[:26] - mean) / std), far]), comm=comm, iterations=4, bound=60.0)
    sampled = fit_kmeans(shard, 16, comm=comm, seed=3, iterations=5, max_sample=1500)
    config = QuantizerConfig(iterations=4, refine_epochs=2, refine_solves=1)
    books = fit_codebooks(shard, (32, 16, 8), config=config, comm=comm, seed=9)
    codes = torch.cat(comm.gather_bytes(encode(shard.x, books)))
    beams = torch.cat(comm.gather_bytes(encode(shard.x, books, beam=3)))
    errors, count = prefix_errors(shard, encode(shard.x, books), books, comm=comm, held_out=True)
    return {
        "mean": mean,
        "std": std,
        "lloyd": moved.centroids,
        "inertia": torch.tensor([moved.inertia, sampled.inertia, moved.reseeded], dtype=torch.float64),
        "sampled": sampled.centroids,
        "codes": codes,
        "beams": beams,
        "errors": errors,
        "count": torch.tensor(count),
        **{f"level{i}": level for i, level in enumerate(books.levels)},
    }


@pytest.mark.parametrize("case", CASES)
def test_same_bits_on_any_number_of_ranks(case: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = str(tmp_path_factory.mktemp("run"))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = _fit(0, 1, CASES[case], folder)
        torch.set_num_threads(3)
        results = {"3 threads": want | _fit(0, 1, CASES[case], folder)}
        assert torch.get_num_threads() == 3, "the workers' setting stays theirs"
    finally:
        torch.set_num_threads(threads)
    assert want["inertia"][2] > 0, "the case must re-seed empty clusters"
    assert want["count"] == CASES[case] // 20
    for world in (2, 4):
        for rank, got in enumerate(run_ranks(_fit, world, CASES[case], folder)):
            results[f"rank {rank} of {world}"] = got
    for where, got in results.items():
        for name, tensor in want.items():
            assert torch.equal(tensor, got[name]), f"{name} differs on {where}"


def _stage(rank: int, world: int, folder: str) -> dict[str, Tensor]:
    store = ArtifactStore(folder)
    inputs = {kind: store.find(kind, kind[0] * 64) for kind in ("catalog", "fusion")}
    ctx = StageContext.local(store, f"{folder}/runs/{world}", stage="quantizer", key=str(world) * 64, seed=2)
    ctx.rank, ctx.world = rank, world
    config = parse_config({"quantizer": {"levels": [16, 300], "iterations": 3, "sample": 1200}})
    artifact = run(ctx, config, {kind: found for kind, found in inputs.items() if found})
    names = sorted(artifact.manifest["files"])
    digest = "".join(artifact.manifest["files"][name]["sha256"] for name in names)
    return {"files": torch.tensor(list(digest.encode()))}


def test_the_whole_artifact_is_the_same_on_two_ranks(tmp_path: Path) -> None:
    quantizer_inputs(ArtifactStore(tmp_path), clustered(2 * GRAIN + 100, 8, clusters=400))
    alone = _stage(0, 1, str(tmp_path))
    for got in run_ranks(_stage, 2, str(tmp_path)):
        assert torch.equal(got["files"], alone["files"])


def _modalities(rank: int, world: int, folder: str) -> dict[str, Tensor]:
    store = ArtifactStore(folder)
    inputs = {"catalog": store.find("catalog", "b" * 64), "fusion": store.find("fusion", "f" * 64)}
    ctx = StageContext.local(
        store, f"{folder}/runs/m{world}", stage="quantizer", key=f"a{world}" * 32, seed=2
    )
    ctx.rank, ctx.world = rank, world
    keys = {"levels": [16, 16], "iterations": 3, "sample": 1200, "refine_epochs": 0, "refine_solves": 0}
    further = {"modalities": ["joint", "text", "image"], "modality_levels": [300, 12]}
    gate = {"collisions": "none", "quality": {"max_collision_rate": 1.0}}
    config = parse_config({"quantizer": keys | further | gate})
    artifact = run(ctx, config, {kind: found for kind, found in inputs.items() if found})
    # Two columns of the text, then those of the image, which many items do not have.
    assert (artifact.load_npy("modality_codes.npy")[:, 2] == 300).mean() > 0.2
    digests = {name: entry["sha256"] for name, entry in artifact.manifest["files"].items()}
    assert "codebooks.image.safetensors" in digests
    return {name: torch.tensor(list(digest.encode())) for name, digest in digests.items()}


@pytest.mark.parametrize("world", [2, 4])
def test_codes_of_modalities_are_the_same_on_several_ranks(world: int, tmp_path: Path) -> None:
    store, count = ArtifactStore(tmp_path), 2 * GRAIN + 100  # on four ranks one has no row at all
    features = {
        "text": some_features(count, 6, missing=0.1, seed=1),
        "image": some_features(count, 5, missing=0.4, seed=2),
    }
    with_features(store, quantizer_inputs(store, clustered(count, 8, clusters=400)), features)
    alone = _modalities(0, 1, str(tmp_path))
    for got in run_ranks(_modalities, world, str(tmp_path)):
        assert got.keys() == alone.keys()
        for name, digest in alone.items():
            assert torch.equal(got[name], digest), name
