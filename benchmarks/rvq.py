"""Residual quantizers of 4 x 256 codes: encoding time and held-out error, ours beside faiss.

Every run is a process of its own (thread pools disturb each other), rounds are interleaved, medians compared.
Speed-ups are faiss' encoding time / ours on rows of the fit; error ratios are ours / faiss on items that no
fit has seen: greedy beside faiss beam 1, beam 4 beside faiss beam 5. faiss fits with its defaults but for 10
iterations instead of 25, so `fit_speedup` is a lower bound. Loops are compiled before the clock starts. The
last line is JSON. Needs faiss-cpu.

    python benchmarks/rvq.py [--rows 500000] [--rounds 1]
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

sys.path.insert(0, str(Path(__file__).parent))
from kmeans import THREADS, WIDTH, make_vectors, warm_up

LEVELS, CODES, HELD_OUT = 4, 256, 20_000
ENCODINGS, ENCODED = 3, 100_000  # how often, and how many rows
VARIANTS = ("faiss_beam1", "ours_greedy", "faiss_beam5", "ours_beam4")
Result = dict[str, float]


def run_faiss(x: np.ndarray, test: np.ndarray, *, beam: int) -> Result:
    import faiss

    faiss.omp_set_num_threads(THREADS)
    quantizer = faiss.ResidualQuantizer(WIDTH, LEVELS, 8)
    quantizer.max_beam_size, quantizer.cp.niter = beam, 10
    began = time.perf_counter()
    quantizer.train(x)
    fit = time.perf_counter() - began
    times = []
    for _ in range(ENCODINGS):
        began = time.perf_counter()
        quantizer.compute_codes(x[:ENCODED])
        times.append(time.perf_counter() - began)
    codes = quantizer.compute_codes(test)
    error = ((test - quantizer.decode(codes)) ** 2).sum(1).mean()
    return {"fit_s": fit, "encode_s": statistics.median(times), "error": float(error)}


def run_ours(x: np.ndarray, test: np.ndarray, *, beam: int) -> Result:
    import torch

    from qbrec.config.stages import QuantizerConfig
    from qbrec.quantizer.fit import fit_codebooks
    from qbrec.quantizer.kmeans.chunks import Alone, Shard, stratified
    from qbrec.quantizer.rvq import decode, encode

    torch.set_num_threads(THREADS)
    warm_up(x)
    train = torch.ones(len(x), dtype=torch.bool)
    train[torch.from_numpy(stratified(len(x), len(x) // 20, seed=0))] = False
    shard = Shard(torch.from_numpy(x), 0, len(x), train)
    began = time.perf_counter()
    books = fit_codebooks(shard, (CODES,) * LEVELS, config=QuantizerConfig(beam=beam), comm=Alone(), seed=0)
    fit = time.perf_counter() - began
    rows, times = torch.from_numpy(test), []
    for _ in range(ENCODINGS):
        began = time.perf_counter()
        encode(shard.x[:ENCODED], books, beam=beam)
        times.append(time.perf_counter() - began)
    codes = encode(rows, books, beam=beam)
    error = (rows - decode(codes, books)).square().sum(1).mean()
    return {"fit_s": fit, "encode_s": statistics.median(times), "error": float(error)}


def child(variant: str, folder: str) -> Result:
    x, test = np.load(f"{folder}/x.npy"), np.load(f"{folder}/test.npy")
    run = run_faiss if variant.startswith("faiss") else run_ours
    beam = {"faiss_beam1": 1, "faiss_beam5": 5, "ours_greedy": 1, "ours_beam4": 4}[variant]
    return run(x, test, beam=beam)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(*options.child)))
        return
    results: dict[str, list[Result]] = {v: [] for v in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        x = make_vectors(options.rows + HELD_OUT)
        np.save(f"{folder}/x.npy", x[: options.rows])
        np.save(f"{folder}/test.npy", x[options.rows :])
        for _ in range(options.rounds):
            for variant in VARIANTS:
                command = [sys.executable, __file__, "--child", variant, folder]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                results[variant].append(json.loads(done.stdout.splitlines()[-1]))
    middle = {v: {k: statistics.median(r[k] for r in rs) for k in rs[0]} for v, rs in results.items()}
    for v, r in middle.items():
        per_item = r["encode_s"] / ENCODED * 1e6
        print(f"{v:<12} fit {r['fit_s']:6.1f} s   {per_item:6.2f} us/item   held-out error {r['error']:.4f}")
    pairs = {"beam1": ("faiss_beam1", "ours_greedy"), "beam5": ("faiss_beam5", "ours_beam4")}
    speed = {k: middle[rival]["encode_s"] / middle[ours]["encode_s"] for k, (rival, ours) in pairs.items()}
    error = {k: middle[ours]["error"] / middle[rival]["error"] for k, (rival, ours) in pairs.items()}
    result = {
        "encode_speedup_vs_faiss_beam1": speed["beam1"],
        "error_ratio_vs_faiss_beam1": error["beam1"],
        "beam_speedup_vs_faiss_beam5": speed["beam5"],
        "beam_error_ratio_vs_faiss_beam5": error["beam5"],
        "fit_speedup_vs_faiss_beam1": middle["faiss_beam1"]["fit_s"] / middle["ours_greedy"]["fit_s"],
    }
    print(json.dumps({name: round(value, 4) for name, value in result.items()}))


if __name__ == "__main__":
    main()
