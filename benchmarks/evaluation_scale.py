"""Evaluation at scale: users a second over the full catalogue, and the memory it takes.

Items, 4 x 256 semantic IDs, histories and the trained encoder are those of `ranking_data.py` (kept in
`--scratch`); item graphs are counted in the histories of all users. `rank_model` then ranks the last item of
`--measured` of them over all items, seen items kept and removed, and the ten best for coverage, exactly as
the stage `evaluation` does on every rank: with the bonus of the graphs, by semantic IDs alone, and, of fewer
users, by dense scores. One thread. The last line is JSON; hours are those that all users would take.

    python benchmarks/evaluation_scale.py --items 1000000 --users 1000000 [--measured 20000]
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
from ranking_data import catalogue, encoder, histories

from qbrec.evaluation.protocol import TestSet, rank_model
from qbrec.ranking.bonus import Bonus, BonusScorer
from qbrec.ranking.counted import count_arrows
from qbrec.ranking.graphs import ItemGraphs
from qbrec.ranking.scorer import FactorisedScorer, Scorer
from qbrec.ranking.topk import tie_rank
from qbrec.sequence.recommender import SequenceRecommender

BATCH_USERS, KEEP, DENSE_USERS = 256, 100, 256


class DenseOf:
    """The same scores without what tells that they are made of semantic IDs."""

    def __init__(self, scorer: Scorer) -> None:
        self.name, self.scores = "dense", scorer.scores


def peak_gib() -> float:
    """Most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--measured", type=int, default=20_000)
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "qbrec-ranking")
    parser.add_argument("--train-seconds", type=float, default=150.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.scratch.mkdir(parents=True, exist_ok=True)
    items = catalogue(options.items, (256,) * 4, scratch=options.scratch)
    module = encoder(items, seconds=options.train_seconds, scratch=options.scratch)
    past = histories(items, options.users, seed=21)
    began = time.perf_counter()
    training = past.prefix(past.lengths - 2)
    graphs = ItemGraphs(**count_arrows(training, num_items=options.items, keep=KEEP))
    counted = time.perf_counter() - began
    print(f"{options.users:,} users, item graphs in {counted:.0f} s, {peak_gib():.1f} GiB", flush=True)
    counts = np.bincount(training.values, minlength=options.items)
    users = np.sort(np.random.default_rng(0).permutation(options.users)[: options.measured])
    test = TestSet(
        users=users,
        domain=np.zeros(len(users), np.uint8),
        contexts=past.prefix(past.lengths - 1).take(users),
        targets=past.values[past.offsets[1:] - 1].astype(np.int64)[users],
        allowed=np.ones(options.items, bool),
        ties=tie_rank(counts),
    )
    few = TestSet(
        test.users[:DENSE_USERS],
        test.domain[:DENSE_USERS],
        test.contexts.slice(0, DENSE_USERS),
        test.targets[:DENSE_USERS],
        test.allowed,
        test.ties,
    )
    ids = FactorisedScorer(SequenceRecommender(module, semantic_ids=items.codes), semantic_ids=items.codes)
    ours = BonusScorer(ids, Bonus(graphs, (1.0,) * len(graphs.names)))
    result = {"items": options.items, "users": options.users, "measured": len(test), "graphs_s": counted}
    ranks = {}
    for name, scorer, asked in (("ids", ids, test), ("qbrec", ours, test), ("dense", DenseOf(ours), few)):
        rank_model(scorer, few, batch_users=BATCH_USERS)  # compiles, and builds the index
        before, began = peak_gib(), time.perf_counter()
        ranks[name] = rank_model(scorer, asked, batch_users=BATCH_USERS)
        seconds = time.perf_counter() - began
        rate = len(asked) / seconds
        result |= {f"{name}_users_per_s": rate, f"{name}_hours": options.users / rate / 3600}
        result |= {f"{name}_peak_gib": peak_gib(), f"{name}_grew_gib": peak_gib() - before}
        print(
            f"{name:<6} {rate:8.1f} users/s, all of them {options.users / rate / 3600:.2f} h on one core; "
            f"peak {peak_gib():.2f} GiB; recall@10 {(ranks[name].removed <= 10).mean():.3f}",
            flush=True,
        )
    for mode in ("kept", "removed"):
        same = ranks["qbrec"].of(mode)[:DENSE_USERS] == ranks["dense"].of(mode)
        assert same.all(), "ranks are those of dense scores"
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in result.items()}))


if __name__ == "__main__":
    main()
