"""Ranking by semantic IDs at catalogue scale: exact top-k, ranks, filters and beams, beside their rivals.

Semantic IDs from our quantizer on clustered vectors (4 x 256 and 3 x 8192) and log-probabilities from our
encoder, trained on histories that follow the clusters (`ranking_data.py`; both kept in `--scratch`). All in
one thread, in its processor time, rivals in turns with ours, user by user, each result compared with the
exhaustive one, rows and bits:

* `exact`: `exact_top_k`, k 20, the history's items removed, one user at a time;
* `dense`: torch gathers all scores of the items that the filter leaves, then `top_k`;
* `fused`: our kernel for eight users at once, told that nothing may be skipped, with one user in it;
* cases: all items; the same with all levels but the last two nearly flat; 1 % and .1 % of the items in stock,
  drawn at random; 1 % in a hundred sub-categories.

Ranks: milliseconds a user of `exact_ranks`, beside dense scores and `ranks_both`. Beams: the four steps of a
beam of 50 for 32 users, beside a table of 256³ offsets into the sorted IDs (4 x 256 only), and beside the
encoder's forwards for those beams. The last line is JSON: ratios of beams are ours / rival, of `speedup`
rival / ours. Peak memory is that of the process.

    python benchmarks/ranking.py --items 10000000 [--users 64] [--scratch FOLDER] [--train-seconds 150]
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from ranking_data import CATEGORIES, SUBCATEGORIES, Catalogue, catalogue, encoder, histories

from qbrec.ranking.beam import BeamSearch
from qbrec.ranking.code_index import CodeIndex
from qbrec.ranking.exact import exact_top_k
from qbrec.ranking.kernels import native
from qbrec.ranking.rank_of import exact_ranks
from qbrec.ranking.scorer import CodeTable
from qbrec.ranking.tables import Tables, in_lanes, sorted_rows
from qbrec.ranking.topk import ranks_both, tie_rank, top_k
from qbrec.sequence.recommender import SequenceRecommender
from qbrec.storage.ragged import Ragged

LAYOUTS = {"4x256": (256,) * 4, "3x8192": (8192,) * 3}
K, BATCH, BEAM, ROUNDS = 20, 32, 50, 15


def timed(body: Callable[[], Any]) -> tuple[Any, float]:
    """Result, and milliseconds of this thread: not the time that other processes take."""
    began = time.thread_time()
    found = body()
    return found, (time.thread_time() - began) * 1e3


class Dense:
    """Dense scores of the items that a filter leaves, and `top_k`."""

    def __init__(self, index: CodeIndex) -> None:
        rows = np.arange(index.num_items) if index.allowed is None else np.flatnonzero(index.allowed)
        self.rows = torch.from_numpy(rows)
        self.place = np.full(index.num_items, -1)
        self.place[rows] = np.arange(len(rows))
        self.table = CodeTable(np.ascontiguousarray(index.semantic_ids[rows]))
        self.ties = index.trie.ties[rows].argsort().argsort()

    def __call__(self, log_probs: torch.Tensor, seen: Ragged) -> tuple[torch.Tensor, torch.Tensor]:
        places = self.place[seen.values]
        inside = places >= 0
        mine = Ragged.from_lengths(places[inside], np.bincount(seen.row_ids[inside], minlength=len(seen)))
        found, scores = top_k(self.table.scores_of(log_probs), K, tie_rank=self.ties, exclude=mine)
        return torch.where(found < 0, -1, self.rows[found]), scores


def fused(index: CodeIndex, log_probs: torch.Tensor, seen: Ragged) -> tuple[np.ndarray, np.ndarray]:
    """All items for up to eight users: bounds of +inf skip nothing."""
    tables, users = Tables.of(log_probs, index), np.arange(len(log_probs))
    values, begins = sorted_rows(seen, len(users))
    floors = np.where(np.arange(native.WIDTH) < len(users), -np.inf, np.inf).astype(np.float32)
    spans = np.zeros((2, native.WIDTH), np.int64)
    spans[:, : len(users)] = begins[:-1], begins[1:]
    scores, rows = np.empty((native.WIDTH, K), np.float32), np.empty((native.WIDTH, K), np.int64)
    native.top_together(
        index.trie, in_lanes(tables.log_probs, users), log_probs.shape[2] * native.WIDTH,
        np.full(index.depth * native.WIDTH, np.inf, np.float32), floors, values, spans, scores, rows,
    )  # fmt: skip
    return rows[: len(users)], scores[: len(users)]


def race(
    index: CodeIndex, dense: Dense, log_probs: torch.Tensor, seen: Ragged, *, size: int
) -> dict[str, np.ndarray]:
    """Milliseconds a user of each engine, for users in groups of `size`; all must give the same."""
    engines: dict[str, Callable[[torch.Tensor, Ragged], Any]] = {
        "exact": lambda given, past: exact_top_k(given, K, index=index, exclude=past),
        "dense": dense,
        "fused": lambda given, past: fused(index, given, past),
    }
    times: dict[str, list[float]] = {name: [] for name in engines}
    groups = list(range(0, len(log_probs) - size + 1, size))
    for turn, begin in enumerate([groups[0], *groups]):  # the first one is for warming up
        given, past = log_probs[begin : begin + size], seen.slice(begin, begin + size)
        found = {}
        # Who comes first finds nothing in the caches: in turns.
        for name in sorted(engines, reverse=bool(turn % 2)):
            found[name], ms = timed(lambda body=engines[name], g=given, p=past: body(g, p))
            if turn:
                times[name].append(ms / size)
        for rows, scores in found.values():
            assert np.array_equal(rows, found["dense"][0])
            assert np.array_equal(scores, found["dense"][1])
    return {name: np.array(values) for name, values in times.items()}


def compare_exact(name: str, index: CodeIndex, log_probs: torch.Tensor, seen: Ragged) -> dict[str, float]:
    """Exact against exhaustive search, user by user and eight at once."""
    dense = Dense(index)
    one, eight = (race(index, dense, log_probs, seen, size=size) for size in (1, 8))
    median = {key: float(np.median(value)) for key, value in one.items()}
    batch = {key: float(np.median(value)) for key, value in eight.items()}
    result = {
        "exact_ms_median": median["exact"],
        "exact_ms_p95": float(np.percentile(one["exact"], 95)),
        "dense_ms": median["dense"],
        "fused_ms": median["fused"],
        "exact_speedup_vs_exhaustive": min(median["dense"], median["fused"]) / median["exact"],
        "batch8_ms_per_user": batch["exact"],
        "batch8_speedup_vs_exhaustive": min(batch["dense"], batch["fused"]) / batch["exact"],
    }
    print(
        f"{name:<22} exact {result['exact_ms_median']:8.3f} ms, p95 {result['exact_ms_p95']:8.3f} | dense "
        f"{median['dense']:8.2f} fused {median['fused']:8.2f} | speedup "
        f"{result['exact_speedup_vs_exhaustive']:6.1f} x | eight at once, per user: exact "
        f"{batch['exact']:7.3f} dense {batch['dense']:7.2f} fused {batch['fused']:7.3f}",
        flush=True,
    )
    return result


def compare_ranks(
    name: str, index: CodeIndex, log_probs: torch.Tensor, seen: Ragged, target: np.ndarray
) -> dict[str, float]:
    """Exact ranks of all users, and of the first eight through dense scores."""
    exact_ranks(log_probs[:8], target[:8], index=index, seen=seen.slice(0, 8))
    found, ours = timed(lambda: exact_ranks(log_probs, target, index=index, seen=seen))
    eight, slow = timed(
        lambda: ranks_both(
            CodeTable(index.semantic_ids).scores_of(log_probs[:8]),
            target[:8],
            tie_rank=index.trie.ties,
            seen=seen.slice(0, 8),
        )
    )
    for a, b in zip(found, eight, strict=True):
        assert np.array_equal(a[:8], b)
    ours, slow = ours / len(target), slow / 8
    print(
        f"{name:<22} rank of a target {ours:.3f} ms, dense {slow:.2f}: {slow / ours:.0f} x; median rank "
        f"{int(np.median(found[0])):,}",
        flush=True,
    )
    return {"rank_ms_per_user": ours, "rank_speedup_vs_dense": slow / ours}


class Radix:
    """The rival: 256³ offsets into the sorted IDs and their last byte; masked rows of 256 continuations."""

    def __init__(self, keys: np.ndarray) -> None:
        counts = np.bincount(keys >> 8, minlength=1 << 24)
        self.offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))
        self.last = torch.from_numpy((keys & 255).astype(np.uint8))
        pairs = self.offsets[::256]
        self.first, self.second = pairs[::256].diff() > 0, (pairs.diff() > 0).view(256, 256)
        self.fullest = int(counts.max())
        self.nbytes = sum(t.nbytes for t in (self.offsets, self.last, self.first, self.second))

    def step(
        self, level: int, prefix: torch.Tensor, scores: torch.Tensor, log_probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Prefixes int64 [B, P] and scores [B, P] of one more code; at the last level places of IDs."""
        batch = len(prefix)
        if level == 0:
            best, found = torch.where(self.first, log_probs[:, 0], -torch.inf).topk(BEAM)
            return found, best
        if level < 3:
            if level == 1:
                exist = self.second[prefix]
            else:
                exist = self.offsets[prefix[..., None] * 256 + torch.arange(257)].diff(dim=-1) > 0
            total = (scores[..., None] + log_probs).masked_fill_(~exist, -torch.inf).view(batch, -1)
            best, found = total.topk(BEAM)
            return prefix.gather(1, found // 256) * 256 + found % 256, best
        begin = self.offsets[prefix]
        count, place = self.offsets[prefix + 1] - begin, torch.arange(self.fullest)
        where = (begin[..., None] + place).clamp_(max=len(self.last) - 1)
        total = scores[..., None] + log_probs.gather(2, self.last[where].long())
        best, found = total.masked_fill_(place >= count[..., None], -torch.inf).view(batch, -1).topk(BEAM)
        return where.view(batch, -1).gather(1, found), best


def compare_beams(
    name: str, items: Catalogue, index: CodeIndex, recommender: SequenceRecommender
) -> dict[str, float]:
    """Beam steps against the radix table and against the encoder."""
    past = histories(items, BATCH, seed=77)
    log_probs = recommender.code_log_probs(past, 0)
    levels, search = len(items.sizes), BeamSearch(index, beam=BEAM)
    rival = None
    if name == "4x256":
        rival = Radix(np.unique(items.codes.astype(np.int64) @ (256 ** np.arange(3, -1, -1))))
    ours: list[list[float]] = []
    theirs: list[list[float]] = []
    for _ in range(ROUNDS):
        beams, steps = search.start(BATCH), []
        for level, codes in enumerate(items.sizes):
            wide = log_probs[:, level, None, :codes].expand(-1, beams.nodes.shape[1], -1).contiguous()
            beams, ms = timed(lambda beams=beams, wide=wide: search.step(beams, wide))
            steps.append(ms)
        ours.append(steps)
        if rival is not None:
            prefix, scores, steps = torch.zeros(BATCH, 1, dtype=torch.int64), torch.zeros(BATCH, 1), []
            for level in range(levels):
                wide = log_probs[:, level, None, :256].expand(-1, prefix.shape[1], -1).contiguous()
                (prefix, scores), ms = timed(
                    lambda level=level, p=prefix, s=scores, w=wide: rival.step(level, p, s, w)
                )
                steps.append(ms)
            theirs.append(steps)
            assert torch.equal(scores, beams.scores), "both find beams of the same scores"
    mine = np.median(np.array(ours), 0)
    result = {"beam_steps_ms": float(mine.sum()), "bytes_per_item": index.nbytes / index.num_items}
    text = f"{name:<22} beam steps {mine.sum():.2f} ms ({', '.join(f'{x:.2f}' for x in mine)})"
    if rival is not None:
        other = np.median(np.array(theirs), 0)
        result |= {
            "radix_steps_ms": float(other.sum()),
            "beam_step_vs_radix_reference": float(mine.sum() / other.sum()),
            "radix_bytes_per_item": rival.nbytes / index.num_items,
        }
        text += f", radix table {other.sum():.2f} ms ({', '.join(f'{x:.2f}' for x in other)})"
    beams, forward = search.start(BATCH), 0.0
    for _ in range(levels):
        wide, ms = timed(lambda beams=beams: recommender.next_code_log_probs(past, 0, beams.codes.numpy()))
        forward += ms
        beams = search.step(beams, wide)
    result["beam_steps_vs_encoder"] = float(mine.sum() / forward)
    print(
        f"{text}; the encoder's forwards {forward:.0f} ms; {result['bytes_per_item']:.1f} bytes an item",
        flush=True,
    )
    return result


def measure(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Everything for one layout."""
    items = catalogue(options.items, LAYOUTS[name], scratch=options.scratch)
    index, built = timed(lambda: CodeIndex.build(items.codes, tie_rank=tie_rank(items.popularity)))
    print(
        f"\n{name}: {options.items:,} items, index in {built / 1e3:.1f} s; prefixes by length "
        f"{[index.num_prefixes(length) for length in range(1, len(items.sizes) + 1)]}",
        flush=True,
    )
    module = encoder(items, seconds=options.train_seconds, scratch=options.scratch)
    recommender = SequenceRecommender(module, semantic_ids=items.codes)
    past = histories(items, options.users, seed=99)
    target, seen = past.values[past.offsets[1:] - 1].astype(np.int64), past.prefix(past.lengths - 1)
    log_probs = recommender.code_log_probs(seen, 0)
    found: dict[str, float] = {f"{name}_index_s": built / 1e3}
    rng = np.random.default_rng(1)
    shelves = np.isin(
        items.group, rng.permutation(CATEGORIES * SUBCATEGORIES)[: CATEGORIES * SUBCATEGORIES // 100]
    )
    cases = {
        "plain": None,
        "flat": None,
        "in stock 1%": rng.random(options.items) < 0.01,
        "in stock .1%": rng.random(options.items) < 0.001,
        "categories 1%": shelves,
    }
    for case, allowed in cases.items():
        part = index
        if allowed is not None:
            part, ms = timed(lambda allowed=allowed: index.only(allowed))
            if case == "in stock 1%":
                _, ms = timed(lambda allowed=allowed: index.only(allowed))  # the first one compiles
                found[f"{name}_only_ms"] = ms
        given = log_probs.clone()
        if case == "flat":
            given[:, :-2] *= 0.02
        result = compare_exact(f"{name} {case}", part, given, seen)
        found |= {f"{name} {case} {key}": value for key, value in result.items()}
    found |= {f"{name} {k}": v for k, v in compare_ranks(name, index, log_probs, seen, target).items()}
    found |= {f"{name} {k}": v for k, v in compare_beams(name, items, index, recommender).items()}
    print(f"{name:<22} a filter of 1 % asked for once: {found[f'{name}_only_ms']:.0f} ms", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--items", type=int, default=10_000_000)
    parser.add_argument("--users", type=int, default=64)
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "qbrec-ranking")
    parser.add_argument("--train-seconds", type=float)
    options = parser.parse_args()
    if options.train_seconds is None:
        options.train_seconds = 150.0 if options.items >= 1_000_000 else 10.0
    torch.set_num_threads(1)
    options.scratch.mkdir(parents=True, exist_ok=True)
    found: dict[str, float] = {}
    for name in LAYOUTS:
        found |= measure(name, options)
    main_keys = ("exact_ms_median", "exact_ms_p95", "exact_speedup_vs_exhaustive")
    result: dict[str, Any] = {"items": options.items, "users": options.users, "k": K}
    result |= {key: found[f"4x256 plain {key}"] for key in main_keys}
    result["beam_step_vs_radix_reference"] = found["4x256 beam_step_vs_radix_reference"]
    slowest = min(v for k, v in found.items() if k.endswith("exact_speedup_vs_exhaustive"))
    result["smallest_speedup_of_any_case"] = slowest
    result |= {key.replace(" ", "_"): value for key, value in found.items()}
    result["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in result.items()}))


if __name__ == "__main__":
    main()
