"""Which kernel is the fastest here: measured on some of the rows at hand, not assumed.

All kernels give the same codes, so ranks need not agree and a run on another machine repeats this one's bits.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable

import torch
from torch import Tensor

from qbrec.quantizer.kmeans.kernels.bfloat16 import Bfloat16
from qbrec.quantizer.kmeans.kernels.gemm import TILE, Float32, Kernel
from qbrec.quantizer.kmeans.kernels.pruned import Pruned, leading_directions

Maker = Callable[[Tensor, Tensor], Kernel]  # of rows [n, D] and their lengths [n]

WORTH = 2_000_000  # rows × passes × codes / 256 from which measuring costs less than it finds
PROBE = 2 * TILE  # rows of one measurement
ROUNDS = 3
SETTLING = 2  # Lloyd iterations on the sample before kernels are measured


def row_norms(x: Tensor) -> Tensor:
    """Lengths of rows, float32 [n], tile by tile."""
    out = torch.empty(len(x), dtype=torch.float32, device=x.device)
    for start in range(0, len(x), TILE):
        out[start : start + TILE] = torch.linalg.vector_norm(x[start : start + TILE], dim=1)
    return out


def candidates(device: torch.device, *, sample: Tensor, centroids: Tensor, passes: int) -> dict[str, Maker]:
    """Kernels that can run on a device, the reference first.

    Args:
        device: Where the rows are.
        sample: Rows float32 [m, D] whose principal directions speak for all.
        centroids: float32 [K, D] about as they will be.
        passes: How often all rows will be assigned; bounds need an earlier pass to start from.
    """
    found: dict[str, Maker] = {"float32": Float32}
    if device.type == "cuda":
        found["bfloat16"] = Bfloat16
        if importlib.util.find_spec("triton") is not None:
            from qbrec.quantizer.kmeans.kernels.fused import Fused

            found["fused"] = Fused
    elif device.type == "cpu":
        if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            found["bfloat16"] = Bfloat16
        if passes > 1 and importlib.util.find_spec("numba") is not None:
            directions = leading_directions(sample, centroids)
            if directions is not None:
                found["pruned"] = lambda x, norms: Pruned(x, norms, directions)
    return found


def choose(x: Tensor, centroids: Tensor, *, passes: int, sample: Tensor) -> Kernel:
    """The kernel that assigns these rows fastest.

    Args:
        x: This rank's rows float32 [n, D].
        centroids: float32 [K, D] to start from.
        passes: How often all rows will be assigned.
        sample: Rows of the whole matrix float32 [m, D].
    """
    norms = row_norms(x)
    if len(x) * passes * len(centroids) < WORTH * 256:
        return Float32(x, norms)
    if passes > 1:
        centroids = _settled(centroids, sample)
    makers = candidates(x.device, sample=sample, centroids=centroids, passes=passes)
    if len(makers) == 1:
        return Float32(x, norms)
    probe, lengths = x[:PROBE], norms[:PROBE]
    seconds = {name: _seconds(make, probe, lengths, centroids, passes) for name, make in makers.items()}
    return makers[min(seconds, key=lambda name: seconds[name])](x, norms)


def _settled(centroids: Tensor, sample: Tensor) -> Tensor:
    """Centroids as later passes will find them: bounds are far tighter than for rows taken at random."""
    for _ in range(SETTLING):
        nearest = Float32(sample, row_norms(sample)).bind(centroids)()
        codes = nearest(slice(0, len(sample)))
        sums = torch.zeros_like(centroids).index_add_(0, codes, sample)
        counts = torch.bincount(codes, minlength=len(centroids))[:, None]
        centroids = torch.where(counts > 0, sums / counts.clamp(min=1), centroids)
    return centroids


def _seconds(make: Maker, x: Tensor, norms: Tensor, centroids: Tensor, passes: int) -> float:
    """Seconds of so many passes in one thread, the best of some rounds; the first one compiles."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    best = float("inf")
    for _ in range(ROUNDS):
        began = _now(x.device)
        nearest = make(x, norms).bind(centroids)()
        nearest(slice(0, len(x)))
        first = _now(x.device)
        nearest(slice(0, len(x)))  # with what it has learned of these rows
        best = min(best, first - began + (passes - 1) * (_now(x.device) - first))
    torch.set_num_threads(threads)
    return best


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.thread_time()  # not the time that other processes take
