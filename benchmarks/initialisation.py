"""What the start of the codebooks is worth: k-means over all items, over one batch, rows at random.

On the fused vectors of a finished run. `dead` are codes of all levels that no item has, `perplexity` is that
of level 0, `error` the share of the held-out variance that is left after all levels; each right after the
start and after training as the default quantizer trains (joint moving averages with restarts of dead codes,
least squares, revival). Means over seeds. The last line is JSON.

    python benchmarks/initialisation.py STORAGE/runs/NAME [--seeds 3] [--batch 1024]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from semantic_ids import open_run

from qbrec.config.stages import QuantizerConfig
from qbrec.quantizer.fit import fit_codebooks, held_out_error
from qbrec.quantizer.kmeans.chunks import Alone, Shard, stratified
from qbrec.quantizer.kmeans.fit import KMeansOptions
from qbrec.quantizer.quality import level_usage
from qbrec.quantizer.quantizer import Quantizer
from qbrec.quantizer.rvq import Codebooks, encode, fit_levels
from qbrec.quantizer.vectors import take_fused
from qbrec.storage.blocks import BlockSet

Figures = dict[str, float]


def figures(shard: Shard, books: Codebooks) -> Figures:
    usage = level_usage(encode(shard.x, books).numpy(), books.sizes)
    assert shard.train is not None
    variance = float(shard.x[~shard.train].square().sum(1).mean())
    return {
        "dead": sum(level["dead"] for level in usage),
        "perplexity": usage[0]["perplexity"],
        "error": held_out_error(shard, books, comm=Alone(), beam=1) / variance,
    }


def starts(batch: int) -> dict[str, KMeansOptions]:
    return {
        "all items": {},
        f"one batch of {batch}": {"max_sample": batch, "full_passes": 0},
        "rows at random": {"seeding": "random", "iterations": 0, "full_passes": 0},
    }


def measure(shard: Shard, sizes: tuple[int, ...], options: KMeansOptions, *, seed: int) -> list[Figures]:
    start = fit_levels(shard, sizes, comm=Alone(), seed=seed, **options)
    config = QuantizerConfig(
        seeding=options.get("seeding", "plus_plus"),
        iterations=options.get("iterations", 20),
        full_passes=options.get("full_passes", 1),
        sample=options.get("max_sample", 1_048_576),
    )
    trained = fit_codebooks(shard, sizes, config=config, comm=Alone(), seed=seed)
    return [figures(shard, start), figures(shard, trained)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("place", type=Path, help="run directory or quantizer artifact")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=1024)
    options = parser.parse_args()
    run = open_run(options.place)
    quantizer, blocks = Quantizer.load(run["quantizer"]), BlockSet.open(run["fusion"], "fused")
    total = blocks.num_samples
    x = quantizer.latents(take_fused(blocks, np.arange(total), torch.device("cpu")))
    train = torch.ones(total, dtype=torch.bool)
    train[torch.from_numpy(stratified(total, total // 20, seed=1))] = False
    shard = Shard(x, 0, total, train)
    table: dict[str, dict[str, Figures]] = {}
    print(f"{total:,} items, levels {' x '.join(map(str, quantizer.sizes))}")
    for name, start in starts(options.batch).items():
        found = [measure(shard, quantizer.sizes, start, seed=seed) for seed in range(options.seeds)]
        for place, when in enumerate(("start", "trained")):
            mean = {k: float(np.mean([one[place][k] for one in found])) for k in found[0][place]}
            table.setdefault(name, {})[when] = mean
            print(
                f"{name:<20} {when:<8} dead {mean['dead']:6.1f}   perplexity {mean['perplexity']:6.1f}   "
                f"error {mean['error']:.4f}"
            )
    print(json.dumps(table))


if __name__ == "__main__":
    main()
