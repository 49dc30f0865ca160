"""k-means: parity with scikit-learn, seeding, empty clusters, fixed point, the row grid."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans as SklearnKMeans

from qbrec.quantizer.kmeans import lloyd as lloyd_module
from qbrec.quantizer.kmeans.chunks import (
    GRAIN,
    Alone,
    FixedPoint,
    Shard,
    gather_rows,
    split_rows,
    standardise,
    stratified,
)
from qbrec.quantizer.kmeans.fit import fit_kmeans
from qbrec.quantizer.kmeans.kernels import gemm
from qbrec.quantizer.kmeans.kernels.gemm import row_argmax
from qbrec.quantizer.kmeans.lloyd import assign, farthest_rows, lloyd
from qbrec.quantizer.kmeans.seeding import Seeding, plus_plus, seeds_of
from qbrec.quantizer.kmeans.sums import add_by_code, move_rows
from tests.support.clusters import clustered


def _inertia(x: torch.Tensor, centroids: torch.Tensor) -> float:
    return float(torch.cdist(x.double(), centroids.double()).amin(1).square().mean())


def test_lloyd_equals_scikit_learn() -> None:
    x = clustered(5000, 16)
    start = x[:24].clone()
    ours = lloyd(Shard(x, 0, len(x)), start, comm=Alone(), iterations=7, bound=float(x.abs().max()))
    theirs = SklearnKMeans(24, init=start.double().numpy(), n_init=1, max_iter=7, tol=0, algorithm="lloyd")
    theirs.fit(x.double().numpy())
    assert ours.reseeded == 0
    np.testing.assert_allclose(ours.centroids, theirs.cluster_centers_, atol=2e-5)


def test_assign_is_the_nearest_centroid_and_lowest_on_ties() -> None:
    x = clustered(3000, 8)
    centroids = x[:40].clone()
    assert torch.equal(assign(x, centroids), torch.cdist(x.double(), centroids.double()).argmin(1))
    twice = torch.cat([centroids, centroids])
    assert int(assign(x, twice).max()) < 40
    assert row_argmax(torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 1.0]])).tolist() == [1, 0]


@pytest.mark.parametrize("method", ["parallel", "plus_plus"])
def test_seeding_beats_random_rows_and_spreads(method: Seeding) -> None:
    x = clustered(4000, 12, clusters=50)
    seeds = seeds_of(x, 32, method=method, seed=1)
    random = [
        _inertia(x, x[torch.randperm(4000, generator=torch.Generator().manual_seed(i))[:32]])
        for i in range(5)
    ]
    assert _inertia(x, seeds) < min(random)
    assert torch.equal(seeds, seeds_of(x, 32, method=method, seed=1))
    assert not torch.equal(seeds, seeds_of(x, 32, method=method, seed=2))


@pytest.mark.parametrize("num_codes", [5, 300])
@pytest.mark.parametrize("method", ["parallel", "plus_plus", "random"])
def test_seeding_with_fewer_points_than_codes(num_codes: int, method: Seeding) -> None:
    x = torch.eye(3).repeat(4, 1)
    seeds = seeds_of(x, num_codes, method=method, seed=0)
    assert seeds.shape == (num_codes, 3)
    assert 1 < len(seeds.unique(dim=0)) <= 3
    assert method == "random" or len(seeds.unique(dim=0)) == 3


def test_a_round_that_draws_nothing_is_no_end() -> None:
    x = clustered(300, 4)
    for seed in range(40):
        assert len(seeds_of(x, 1, method="parallel", seed=seed)) == 1


def test_rows_as_near_to_every_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "EXACT_NUMBERS", 100)
    x, centroids = torch.zeros(500, 6), torch.ones(40, 6)
    assert (assign(x, centroids) == 0).all()


def test_inertia_does_not_depend_on_the_number_of_threads() -> None:
    draw = torch.Generator().manual_seed(0)
    sums, counts = torch.randn(512, 128, generator=draw).double(), torch.arange(512)
    centroids, threads, found = torch.randn(512, 128, generator=draw), torch.get_num_threads(), set()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.add(lloyd_module._inertia(1e6, sums, counts, centroids))
    torch.set_num_threads(threads)
    assert len(found) == 1


def test_a_heavy_point_is_drawn_and_a_point_of_no_weight_never() -> None:
    x = torch.arange(20.0)[:, None]
    weights = np.zeros(20, dtype=np.int64)
    weights[[3, 17]] = 5
    for seed in range(20):
        drawn = plus_plus(x, 3, seed=seed, weights=weights).squeeze(1).tolist()
        assert {3.0, 17.0} <= set(drawn)


def test_a_pass_of_mini_batches_comes_near_lloyd() -> None:
    x = clustered(30 * GRAIN, 8, clusters=100)
    shard = Shard(x, 0, len(x))
    settings = {"comm": Alone(), "seed": 0, "max_sample": 4096}
    seeds = fit_kmeans(shard, 16, iterations=0, full_passes=0, **settings)
    batches = fit_kmeans(shard, 16, warmup="mini_batch", full_passes=0, **settings)
    lloyd_20 = fit_kmeans(shard, 16, iterations=20, full_passes=20, **settings)
    start, ours, best = (_inertia(x, f.centroids) for f in (seeds, batches, lloyd_20))
    assert best <= ours < best + 0.3 * (start - best)


def test_batched_seeding_takes_different_points() -> None:
    x = clustered(2000, 8)
    assert len(plus_plus(x, 600, seed=0).unique(dim=0)) == 600  # 600 codes: 3 per round


def test_fit_uses_every_code_and_is_near_scikit_learn() -> None:
    x = clustered(9000, 16, clusters=100)
    ours = fit_kmeans(Shard(x, 0, len(x)), 64, comm=Alone(), seed=0)
    theirs = SklearnKMeans(64, n_init=1, random_state=0, max_iter=20).fit(x.numpy())
    assert _inertia(x, ours.centroids) < 1.02 * theirs.inertia_ / len(x)
    assert len(assign(x, ours.centroids).unique()) == 64


def test_sample_and_full_passes() -> None:
    x = clustered(9000, 8, clusters=100)
    shard = Shard(x, 0, len(x))
    sampled = fit_kmeans(shard, 16, comm=Alone(), seed=0, iterations=5, full_passes=0, max_sample=2000)
    full = fit_kmeans(shard, 16, comm=Alone(), seed=0, iterations=5, full_passes=3, max_sample=2000)
    assert full.iterations == sampled.iterations + 3
    seeds = fit_kmeans(shard, 16, comm=Alone(), seed=0, iterations=0, full_passes=0)
    assert fit_kmeans(shard, 16, comm=Alone(), seed=0, iterations=0, full_passes=2).iterations == 2
    assert seeds.iterations == 0
    assert _inertia(x, full.centroids) < _inertia(x, sampled.centroids)


def test_empty_clusters_move_to_the_farthest_rows() -> None:
    x = torch.cat([torch.zeros(50, 2), torch.tensor([[9.0, 0.0], [9.0, 0.0], [0.0, 7.0], [0.0, 7.0]])])
    start = torch.cat([torch.zeros(1, 2), torch.full((2, 2), -500.0)])
    fit = lloyd(Shard(x, 0, len(x)), start, comm=Alone(), iterations=1, bound=9.0)
    assert fit.reseeded == 2  # the two farthest *different* rows, though (9, 0) comes twice
    assert sorted(map(tuple, fit.centroids.tolist())) == [(0.0, 0.0), (0.0, 7.0), (9.0, 0.0)]


def test_fewer_rows_than_codes_ends() -> None:
    x = torch.tensor([[0.0], [1.0], [1.0]])
    fit = fit_kmeans(Shard(x, 0, 3), 8, comm=Alone(), seed=0)
    assert _inertia(x, fit.centroids) == 0


def test_rows_out_of_the_fit_do_not_count() -> None:
    x = clustered(3000, 6)
    train = torch.ones(3000, dtype=torch.bool)
    train[::3] = False
    noisy = x.clone()
    noisy[::3] = 5.0
    bound = float(torch.maximum(x.abs().max(), noisy.abs().max()))
    start = x[train][:20].clone()
    fits = [
        lloyd(Shard(v, 0, 3000, train), start, comm=Alone(), iterations=3, bound=bound) for v in (x, noisy)
    ]
    assert torch.equal(fits[0].centroids, fits[1].centroids)
    assert fits[0].inertia == fits[1].inertia


def test_farthest_rows_break_ties_by_row() -> None:
    vectors = torch.tensor([[1.0], [2.0], [3.0], [2.0], [4.0]])
    distances = torch.tensor([1.0, 5.0, 5.0, 5.0, 0.0])
    rows = torch.tensor([40, 30, 20, 10, 0])
    got = farthest_rows(rows, vectors, distances, count=3, comm=Alone())
    assert got.squeeze(1).tolist() == [
        2.0,
        3.0,
        1.0,
    ]  # row 10, 20; row 30 equals row 10; row 0 is at distance 0


@given(
    values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=60),
    cut=st.integers(0, 60),
    order=st.randoms(use_true_random=False),
)
def test_fixed_point_sums_know_no_order(values: list[float], cut: int, order: object) -> None:
    bound = max(abs(v) for v in values)
    fixed = FixedPoint.of(len(values), bound)
    whole = fixed.encode(torch.tensor(values, dtype=torch.float64))
    assert int(whole.sum()) == int(whole[:cut].sum() + whole[cut:].sum())
    assert abs(int(whole.sum())) < 2**63
    assert sum(int(v) for v in whole) == int(whole.sum()), "no overflow"
    error = abs(float(fixed.decode(whole.sum())) - math.fsum(values))
    assert error <= len(values) * 2.0**-fixed.shift + 1e-15 * math.fsum(abs(v) for v in values)


def test_sums_by_code_know_no_order_and_follow_rows_that_move() -> None:
    x, codes = clustered(2000, 6), torch.arange(2000) % 7
    codes[::11] = -1
    fixed = FixedPoint.of(2000, float(x.abs().max()))
    total = add_by_code(x, codes, 7, fixed)
    kept = codes >= 0
    want = torch.zeros(7, 6, dtype=torch.float64).index_add_(0, codes[kept], x[kept].double())
    torch.testing.assert_close(fixed.decode(total[:, :6]), want, rtol=1e-12, atol=1e-9)
    assert total[:, 6].tolist() == torch.bincount(codes[kept], minlength=7).tolist()
    back = torch.arange(1999, -1, -1)
    assert torch.equal(total, add_by_code(x[back], codes[back], 7, fixed))
    moved, new = codes.int(), (codes + torch.randint(0, 2, (2000,))).clamp(max=6)
    move_rows(total, x, moved, new, fixed)
    assert torch.equal(total, add_by_code(x, new, 7, fixed))
    assert torch.equal(moved.long(), new)


@given(total=st.integers(0, 10 * GRAIN), world=st.integers(1, 7))
def test_split_rows_covers_everything_once(total: int, world: int) -> None:
    spans = [split_rows(total, rank=r, world=world) for r in range(world)]
    assert [row for span in spans for row in (span[0], span[1]) if span[0] != span[1]] == [
        edge for a, b in spans if a != b for edge in (a, b)
    ]
    assert sum(b - a for a, b in spans) == total
    assert all(b == c for (_, b), (c, _) in itertools.pairwise(spans))
    assert all(a % GRAIN == 0 for a, b in spans if a != b)


@settings(max_examples=50)
@given(total=st.integers(1, 5000), count=st.integers(0, 6000), seed=st.integers(0, 2**62))
def test_stratified_rows_are_sorted_and_unique(total: int, count: int, seed: int) -> None:
    rows = stratified(total, count, seed=seed)
    assert len(rows) == min(total, count)
    assert (np.diff(rows) > 0).all()
    assert len(rows) == 0 or (rows[0] >= 0 and rows[-1] < total)


def test_standardisation_equals_numpy() -> None:
    x = clustered(5000, 5) * torch.tensor([1.0, 100.0, 1e-3, 0.0, 1.0]) + torch.tensor(
        [0.0, 3.0, 0.0, 2.0, -9.0]
    )
    shard = Shard(x.clone(), 0, len(x))
    mean, std = standardise(shard, Alone())
    np.testing.assert_allclose(mean, x.double().mean(0), rtol=1e-5, atol=1e-7)
    want = x.double().std(0, correction=0).numpy()
    want[3] = 1.0  # a dimension that does not vary is left as it is
    np.testing.assert_allclose(std, want, rtol=1e-5)
    assert torch.equal(shard.x, (x - mean) / std)


def test_gather_rows() -> None:
    x = clustered(100, 3)
    rows = np.array([0, 5, 99])
    assert torch.equal(gather_rows(Shard(x, 0, 100), rows, Alone()), x[[0, 5, 99]])
