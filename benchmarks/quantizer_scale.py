"""The quantizer at scale: seconds of each part and peak memory, on all cores of this machine.

Residual k-means with 10 iterations per level over all items (no sample), greedy encoding, `next_nearest`
collisions, and the table of IDs written to disk. Vectors are 64-dimensional mixtures as in `kmeans.py`. The
last line is JSON; memory is the peak of the process.

    python benchmarks/quantizer_scale.py --items 1000000 [--codes 256] [--levels 4]
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from kmeans import make_vectors

from qbrec.quantizer.collisions import Resolution, next_nearest
from qbrec.quantizer.kmeans.chunks import Alone, Shard
from qbrec.quantizer.packing import bucket_order, code_dtype, pack
from qbrec.quantizer.rvq import Codebooks, encode, fit_levels, residual_before

WIDTH, ITERATIONS, CHUNK = 64, 10, 250_000


def vectors(items: int) -> torch.Tensor:
    """float32 [items, WIDTH], made in chunks so that nothing else is in memory."""
    out = torch.empty(items, WIDTH)
    for start in range(0, items, CHUNK):
        stop = min(start + CHUNK, items)
        out[start:stop] = torch.from_numpy(make_vectors(stop - start, width=WIDTH, seed=1, part=start))
    return out


def without_collisions(
    x: torch.Tensor, codes: np.ndarray, sizes: tuple[int, ...], *, books: Codebooks, popularity: np.ndarray
) -> Resolution:
    """Every item on a semantic ID of its own, from codes [N, L] of vectors [N, D]."""
    return next_nearest(
        codes,
        sizes,
        group=np.arange(len(x)),
        popularity=popularity,
        capacity=1,
        last_level=books.levels[-1],
        residuals=lambda rows: residual_before(len(sizes) - 1, x[torch.from_numpy(rows)], codes[rows], books),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--codes", type=int, default=256)
    parser.add_argument("--levels", type=int, default=4)
    options = parser.parse_args()
    x, sizes = vectors(options.items), (options.codes,) * options.levels
    seconds: dict[str, float] = {}
    began = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal began
        seconds[name] = time.perf_counter() - began
        print(f"{name:<12} {seconds[name]:8.1f} s   peak {peak_gb():.2f} GB", flush=True)
        began = time.perf_counter()

    books = fit_levels(
        Shard(x, 0, len(x)), sizes, comm=Alone(), seed=0, iterations=0, full_passes=ITERATIONS,
        on_level=lambda level, r: print(
            f"  level {level}: inertia {r.inertia:.5f} after {r.iterations} iterations", flush=True
        ),
    )  # fmt: skip
    lap("fit_s")
    codes = encode(x, books).numpy().astype(code_dtype(sizes))
    lap("encode_s")
    popularity = np.random.default_rng(0).zipf(1.5, len(x)).clip(max=1_000_000)
    began = time.perf_counter()
    resolution = without_collisions(x, codes, sizes, books=books, popularity=popularity)
    lap("collisions_s")
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/semantic_ids.npy", resolution.codes)
        np.save(f"{folder}/bucket_order.npy", bucket_order(pack(resolution.codes, sizes), popularity))
    lap("write_s")
    print(f"moved {resolution.moved:,}, unresolved {resolution.unresolved:,}")
    result = {"items": len(x), "codes": options.codes, **seconds, "peak_gb": peak_gb()}
    print(json.dumps({k: round(v, 2) if isinstance(v, float) else v for k, v in result.items()}))


def peak_gb() -> float:
    """Largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


if __name__ == "__main__":
    main()
