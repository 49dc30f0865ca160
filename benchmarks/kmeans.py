"""k-means: ours beside faiss (all points, the same start, the same iterations), and our default fit.

Every run is a process of its own, because the thread pools of faiss and torch disturb each other; rounds are
interleaved and medians compared. `inertia_ratio` is ours / faiss over all points; `default_*` compares our
default fit (seeding, Lloyd on a sample, passes over everything) with faiss on all points;
`two_ranks_vs_two_threads` is the time of one process with two threads / two gloo ranks with one each.
Loops are compiled (or read from numba's cache) before the clock starts, as imports are done. The last line is
JSON. Needs faiss-cpu.

    python benchmarks/kmeans.py [--rows 1000000] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

WIDTH, CODES, ITERATIONS, THREADS = 128, 256, 10, 2
VARIANTS = ("faiss", "ours", "ours_default", "two_ranks")


def make_vectors(rows: int, *, width: int = WIDTH, seed: int = 0, part: int = 0) -> np.ndarray:
    """Unit vectors of 2,000 clusters with a Zipf-like size and a spectrum that falls off.

    Args:
        rows: How many.
        width: Dimensions.
        seed: Seeds the clusters.
        part: Seeds the rows as well: parts with other numbers are other rows of the same clusters.
    """
    rng = np.random.default_rng(seed)
    spectrum = (1 / np.sqrt(1 + np.arange(width) / (width / 16))).astype(np.float32)
    centres = rng.standard_normal((2000, width), dtype=np.float32) * spectrum
    rng = np.random.default_rng([seed, part]) if part else rng
    share = 1 / np.arange(1, 2001) ** 0.7
    x = centres[rng.choice(2000, rows, p=share / share.sum())]
    x += 0.6 * rng.standard_normal((rows, width), dtype=np.float32) * spectrum
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def run_faiss(x: np.ndarray, start: np.ndarray) -> np.ndarray:
    import faiss

    faiss.omp_set_num_threads(THREADS)
    fit = faiss.Kmeans(WIDTH, CODES, niter=ITERATIONS, max_points_per_centroid=len(x))
    fit.train(x, init_centroids=start)
    return fit.centroids


def run_ours(x: np.ndarray, start: np.ndarray, *, default: bool) -> np.ndarray:
    import torch

    from qbrec.quantizer.kmeans.chunks import Alone, Shard
    from qbrec.quantizer.kmeans.fit import fit_kmeans
    from qbrec.quantizer.kmeans.kernels.choose import choose
    from qbrec.quantizer.kmeans.lloyd import lloyd

    torch.set_num_threads(THREADS)
    shard, seeds = Shard(torch.from_numpy(x), 0, len(x)), torch.from_numpy(start)
    if default:
        return fit_kmeans(shard, CODES, comm=Alone(), seed=1).centroids.numpy()
    kernel = choose(shard.x, seeds, passes=ITERATIONS, sample=shard.x[:16_384])
    fit = lloyd(shard, seeds, comm=Alone(), iterations=ITERATIONS, bound=1.0, kernel=kernel)
    assert fit.iterations == ITERATIONS
    return fit.centroids.numpy()


def warm_up(x: np.ndarray) -> None:
    """Compile: a short fit of everything."""
    import torch

    from qbrec.quantizer.kmeans.chunks import Alone, Shard
    from qbrec.quantizer.kmeans.kernels import choose as choosing
    from qbrec.quantizer.kmeans.kernels.gemm import NATIVE_ROWS
    from qbrec.quantizer.kmeans.lloyd import lloyd

    few = torch.from_numpy(np.array(x[: NATIVE_ROWS + 1]))
    for make in choosing.candidates(few.device, sample=few[:4096], centroids=few[:256], passes=2).values():
        kernel = make(few, choosing.row_norms(few))
        lloyd(Shard(few, 0, len(few)), few[:16], comm=Alone(), iterations=1, bound=1.0, kernel=kernel)


def _rank(rank: int, folder: str, out: str) -> None:
    import torch
    import torch.distributed as dist

    from qbrec.engine.context import StageContext
    from qbrec.quantizer.kmeans.chunks import Shard, split_rows
    from qbrec.quantizer.kmeans.kernels.choose import choose
    from qbrec.quantizer.kmeans.lloyd import lloyd
    from qbrec.storage.artifact import ArtifactStore

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}.store", rank=rank, world_size=2)
    comm = StageContext.local(ArtifactStore(folder), folder)
    comm.rank, comm.world = rank, 2
    x, start = np.load(f"{folder}/x.npy", mmap_mode="r"), np.load(f"{folder}/start.npy")
    a, b = split_rows(len(x), rank=rank, world=2)
    shard, seeds = Shard(torch.from_numpy(np.array(x[a:b])), a, len(x)), torch.from_numpy(start)
    warm_up(x)
    dist.barrier()
    began = time.perf_counter()
    kernel = choose(shard.x, seeds, passes=ITERATIONS, sample=torch.from_numpy(np.array(x[:16_384])))
    fit = lloyd(shard, seeds, comm=comm, iterations=ITERATIONS, bound=1.0, kernel=kernel)
    if rank == 0:
        np.save(f"{out}.npy", fit.centroids.numpy())
        Path(f"{out}.json").write_text(json.dumps(time.perf_counter() - began))
    dist.barrier()
    dist.destroy_process_group()


def child(variant: str, folder: str, out: str) -> None:
    if variant == "two_ranks":
        import torch.multiprocessing as mp

        mp.spawn(_rank, args=(folder, out), nprocs=2)
        return
    x, start = np.load(f"{folder}/x.npy"), np.load(f"{folder}/start.npy")
    runs = {
        "faiss": lambda: run_faiss(x, start),
        "ours": lambda: run_ours(x, start, default=False),
        "ours_default": lambda: run_ours(x, start, default=True),
    }
    if variant == "faiss":
        import faiss  # noqa: F401 - imports are not part of the time
    else:
        warm_up(x)
    began = time.perf_counter()
    centroids = runs[variant]()
    Path(f"{out}.json").write_text(json.dumps(time.perf_counter() - began))
    np.save(f"{out}.npy", centroids)


def inertia(x: np.ndarray, centroids: np.ndarray) -> float:
    norms, total = (centroids**2).sum(1), 0.0
    for rows in np.array_split(x, max(1, len(x) // 16_384)):
        total += float(((rows**2).sum(1) + (norms - 2 * rows @ centroids.T).min(1)).sum(dtype=np.float64))
    return total / len(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(*options.child)
        return
    with tempfile.TemporaryDirectory() as folder:
        x = make_vectors(options.rows)
        np.save(f"{folder}/x.npy", x)
        np.save(f"{folder}/start.npy", x[np.random.default_rng(7).choice(len(x), CODES, replace=False)])
        times: dict[str, list[float]] = {v: [] for v in VARIANTS}
        for turn in range(options.rounds):
            for variant in VARIANTS:
                out = f"{folder}/{variant}-{turn}"
                subprocess.run([sys.executable, __file__, "--child", variant, folder, out], check=True)
                times[variant].append(json.loads(Path(f"{out}.json").read_text()))
        errors = {v: inertia(x, np.load(f"{folder}/{v}-0.npy")) for v in VARIANTS}
    seconds = {v: statistics.median(t) for v, t in times.items()}
    for v in VARIANTS:
        rounds = [round(t, 2) for t in times[v]]
        print(f"{v:<12} {seconds[v]:6.2f} s   inertia {errors[v]:.5f}   rounds {rounds}")
    result = {
        "speedup_vs_faiss": seconds["faiss"] / seconds["ours"],
        "inertia_ratio": errors["ours"] / errors["faiss"],
        "default_speedup_vs_faiss": seconds["faiss"] / seconds["ours_default"],
        "default_inertia_ratio": errors["ours_default"] / errors["faiss"],
        "two_ranks_vs_two_threads": seconds["ours"] / seconds["two_ranks"],
    }
    print(json.dumps({name: round(value, 4) for name, value in result.items()}))


if __name__ == "__main__":
    main()
