"""Every kernel gives the nearest centroid, the lowest on ties: the same codes as float64 by brute force."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qbrec.quantizer.kmeans.chunks import Alone, FixedPoint, Shard
from qbrec.quantizer.kmeans.kernels import choose as choosing
from qbrec.quantizer.kmeans.kernels.bfloat16 import Bfloat16
from qbrec.quantizer.kmeans.kernels.choose import candidates, choose, row_norms
from qbrec.quantizer.kmeans.kernels.gemm import TILE, Float32, Gemm, Kernel
from qbrec.quantizer.kmeans.kernels.pruned import Pruned, leading_directions
from qbrec.quantizer.kmeans.lloyd import lloyd
from qbrec.quantizer.kmeans.sums import add_by_code, move_rows
from tests.support.clusters import clustered

Maker = Callable[[Tensor, Tensor], Kernel]


def _pruned(x: Tensor, norms: Tensor) -> Kernel:
    directions = torch.linalg.qr(x.T @ x).Q  # any: they decide what it costs, not what comes out
    return Pruned(x, norms, directions[:, : x.shape[1] // 3].contiguous())


KERNELS: dict[str, Maker] = {"float32": Float32, "bfloat16": Bfloat16, "pruned": _pruned}


def brute(x: Tensor, centroids: Tensor) -> Tensor:
    """The definition, in float64, term by term."""
    c = centroids.double()
    scores = torch.stack([(c * (row.double() - 0.5 * c)).sum(1) for row in x])
    return torch.from_numpy(scores.numpy().argmax(1))  # numpy's is the first of equals


def codes_of(kernel: Kernel, centroids: Tensor, count: int) -> Tensor:
    return kernel.bind(centroids)()(slice(0, count))


@pytest.fixture(params=KERNELS)
def make(request: pytest.FixtureRequest) -> Maker:
    return KERNELS[request.param]


@pytest.mark.parametrize("num_codes", [1, 3, 40, 300])
def test_codes_are_those_of_brute_force_as_centroids_move(make: Maker, num_codes: int) -> None:
    x = clustered(TILE + 300, 32)
    kernel = make(x, row_norms(x))
    centroids = x[:num_codes].clone()
    for step in range(3):
        assert torch.equal(codes_of(kernel, centroids, len(x)), brute(x, centroids)), f"step {step}"
        centroids = centroids + 0.1 * torch.randn(
            centroids.shape, generator=torch.Generator().manual_seed(step)
        )


def test_equal_centroids_go_to_the_lowest_and_near_ones_are_told_apart(make: Maker) -> None:
    x = clustered(500, 48)
    centroids = x[:20].clone()
    near = centroids * (1 + 2e-7)  # one rounding away
    both = torch.cat([near, centroids, near])
    codes = codes_of(make(x, row_norms(x)), both, len(x))
    assert torch.equal(codes, brute(x, both))
    assert int(codes.max()) < 40
    assert len(codes[codes < 20]) > 0 < len(codes[codes >= 20])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), scale=st.sampled_from([1e-12, 1e-3, 1.0, 1e6]), integers=st.booleans())
def test_any_scale_and_exact_ties(seed: int, scale: float, integers: bool) -> None:
    rng = np.random.default_rng(seed)
    draw = rng.integers(-2, 3, (60, 24)) if integers else rng.normal(size=(60, 24))
    x = torch.from_numpy((draw * scale).astype(np.float32))
    centroids = x[:17].clone()
    want = brute(x, centroids)
    for name, make in KERNELS.items():
        assert torch.equal(codes_of(make(x, row_norms(x)), centroids, len(x)), want), name


def test_compiled_loops_and_torch_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums and decisions are the same bits with and without numba."""
    from qbrec.quantizer.kmeans import sums
    from qbrec.quantizer.kmeans.kernels import gemm, native

    x, codes = clustered(3000, 20), torch.arange(3000) % 9 - 1
    fixed = FixedPoint.of(3000, float(x.abs().max()))
    centroids = torch.cat([x[:40], x[:3]])

    def everything() -> list[Tensor]:
        total, old = add_by_code(x, codes, 8, fixed), codes.int()
        move_rows(total, x, old, codes.flip(0), fixed)
        return [total, old, Gemm(centroids).nearest(x[:TILE])]

    monkeypatch.setattr(gemm, "native_loops", lambda rows: native)
    monkeypatch.setattr(sums, "native_loops", lambda rows: native)
    compiled = everything()
    monkeypatch.setattr(gemm, "native_loops", lambda rows: None)
    monkeypatch.setattr(sums, "native_loops", lambda rows: None)
    for one, other in zip(compiled, everything(), strict=True):
        assert torch.equal(one, other)


def test_lloyd_is_the_same_with_every_kernel() -> None:
    x = clustered(3 * TILE, 40)
    shard, start, bound = Shard(x, 0, len(x)), x[:30].clone(), float(x.abs().max())
    fits = [
        lloyd(shard, start, comm=Alone(), iterations=6, bound=bound, kernel=make(x, row_norms(x)))
        for make in KERNELS.values()
    ]
    assert all(torch.equal(fits[0].centroids, fit.centroids) for fit in fits)
    assert len({fit.inertia for fit in fits}) == 1


def test_the_measured_choice_is_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    x = clustered(4 * TILE, 32)
    seconds = {"float32": 2.0, "pruned": 1.0}
    measured = []

    def timed(make: Maker, rows: Tensor, norms: Tensor, centroids: Tensor, passes: int) -> float:
        kernel = make(rows, norms)
        measured.append(kernel.name)
        assert passes == 5
        return seconds.get(kernel.name, 3.0)

    monkeypatch.setattr(choosing, "_seconds", timed)
    assert choose(x, x[:16], passes=5, sample=x).name == "float32"
    assert not measured, "too little work to be worth measuring"
    monkeypatch.setattr(choosing, "WORTH", 1)
    assert choose(x, x[:16], passes=5, sample=x).name == "pruned"
    assert {"float32", "pruned"} <= set(measured)
    seconds["float32"] = 0.5
    assert choose(x, x[:16], passes=5, sample=x).name == "float32"


def test_candidates_are_measured_for_real(monkeypatch: pytest.MonkeyPatch) -> None:
    x = clustered(2 * TILE, 32)
    monkeypatch.setattr(choosing, "WORTH", 1)
    kernel = choose(x, x[:16], passes=2, sample=x)
    assert kernel.name in candidates(x.device, sample=x, centroids=x[:16], passes=2)
    assert torch.equal(codes_of(kernel, x[:16], len(x)), brute(x, x[:16]))


def test_as_many_directions_as_pay() -> None:
    x = clustered(2000, 64)
    x[:, 16:] *= 0.01
    directions = leading_directions(x, x[:100])
    assert directions is not None
    assert directions.shape in {(64, 8), (64, 16)}
    assert torch.allclose(directions.T @ directions, torch.eye(directions.shape[1]), atol=1e-5)
    assert float((x @ directions).square().sum() / x.square().sum()) > 0.7
    alike = torch.nn.functional.normalize(torch.randn(2000, 64, generator=torch.Generator().manual_seed(0)))
    assert leading_directions(alike, alike[:100]) is None, "no direction says more than another"
    assert leading_directions(x[:, :8], x[:100, :8]) is None


@pytest.mark.parametrize(("num_codes", "width"), [(1, 8), (3, 32), (70, 48), (300, 20)])
def test_the_fused_kernel(num_codes: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA as it is, elsewhere through Triton's interpreter."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton", reason="Triton is not installed: it comes with CUDA builds of torch")
    from qbrec.quantizer.kmeans.kernels.fused import Fused

    x = clustered(400, width)
    centroids = torch.cat([x[:num_codes], x[:2]])
    placed = x.to(device)
    codes = codes_of(Fused(placed, row_norms(placed)), centroids.to(device), len(x))
    assert torch.equal(codes.cpu(), brute(x, centroids))
