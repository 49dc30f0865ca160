"""Exact top-k of one user by branch and bound over the trie.

A prefix is worth a look only if its bound, its own sum plus the largest log-probability that occurs at each
of the levels left, reaches the k-th best score so far. The bound adds in the very order in which scores are
added. Rounding keeps order (a <= b implies fl(a + c) <= fl(b + c)), so no score below a prefix exceeds its
bound, to the last bit, and nothing that ties or wins is ever cut: no margin is needed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qbrec.ranking.kernels.heap import finish, offer, threshold
from qbrec.ranking.kernels.lanes import compiled

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

SORTING = 64  # continuations that could be looked at in the time that it takes to sort one prefix
FEW = 4  # continuations below which they are not asked about, but scored with all that follows
FLAT = 3  # one of so many prefixes above the leaves is left: all leaves are scored without asking


@compiled
def expand(
    trie: Any, depth: int, nodes: Ints, sums: Floats, count: int, log_probs: Floats, best: Floats, floor: Any,
    out_nodes: Ints, out_sums: Floats, out_bounds: Floats,
) -> int:  # fmt: skip
    """Continuations whose bound reaches `floor`; how many. The outputs have room for all, and one more."""
    found = 0
    first, codes = trie.start_at[depth], trie.code_at[depth]
    for i in range(count):
        base = sums[i]
        for child in range(trie.starts[first + nodes[i]], trie.starts[first + nodes[i] + 1]):
            total = base + log_probs[depth, trie.codes[codes + child]]
            bound = total
            for level in range(depth + 1, len(best)):
                bound = bound + best[level]
            out_nodes[found], out_sums[found], out_bounds[found] = child, total, bound
            found += bound >= floor
    return found


@compiled
def scan(
    trie: Any, nodes: Ints, sums: Floats, bounds: Floats, order: Ints, descending: bool,
    log_probs: Floats, best: Floats, floor: Any, seen: Ints, first: int, last: int,
    scores: Floats, ties: Ints, rows: Ints, size: int, left: Ints, totals: Floats,
) -> int:  # fmt: skip
    """Offer what lies below prefixes of D - 2 codes; the new size of the heap.

    One call for all of them: handing the arrays on costs more than a small prefix.
    """
    depth = len(best)
    above, leaves = trie.start_at[depth - 2], trie.start_at[depth - 1]
    upper, lower = trie.code_at[depth - 2], trie.code_at[depth - 1]
    starts, codes, tail = trie.starts, trie.codes, trie.tail
    table, last_table, most = log_probs[depth - 2], log_probs[depth - 1], best[depth - 1]
    need = threshold(scores, size, floor)
    for i in order:
        if bounds[i] < need:
            if descending:
                break
            continue
        base, node = sums[i], nodes[i]
        begin, end = starts[above + node], starts[above + node + 1]
        count = 0
        if end - begin >= FEW:
            for run in range(begin, end):
                total = base + table[codes[upper + run]]
                left[count], totals[count] = run, total
                count += total + most >= need
        if end - begin < FEW or count * FLAT > end - begin:
            for leaf in range(starts[leaves + begin], starts[leaves + end]):
                score = (base + table[tail[leaf]]) + last_table[codes[lower + leaf]]
                if score >= need:
                    size = offer(trie, leaf, score, seen, first, last, scores, ties, rows, size)
                    need = threshold(scores, size, floor)
            continue
        for j in range(count):
            run, total = left[j], totals[j]
            if total + most < need:
                continue
            for leaf in range(starts[leaves + run], starts[leaves + run + 1]):
                score = total + last_table[codes[lower + leaf]]
                if score >= need:
                    size = offer(trie, leaf, score, seen, first, last, scores, ties, rows, size)
                    need = threshold(scores, size, floor)
    return size


@compiled
def probe(
    trie: Any, log_probs: Floats, best: Floats, width: int, seen: Ints, first: int, last: int,
    scores: Floats, ties: Ints, rows: Ints, nodes: Ints, sums: Floats, bounds: Floats,
    left: Ints, totals: Floats,
) -> Any:  # fmt: skip
    """A score that the k-th best item certainly reaches: that of the best below a few good prefixes.

    At every level the `width` prefixes with the highest bounds go on, so the work does not grow with the
    catalogue. -inf where there are fewer than k items below them.
    """
    depth = len(best)
    kept, kept_sums = np.zeros(width, np.int64), np.zeros(width, np.float32)
    count = 1
    nothing = np.float32(-np.inf)
    for d in range(depth - 2):
        found = expand(trie, d, kept, kept_sums, count, log_probs, best, nothing, nodes, sums, bounds)
        cut = np.float32(-np.inf)
        if found > width:
            cut = np.partition(bounds[:found], found - width)[found - width]
        count = 0
        for i in range(found):
            if count < width and bounds[i] >= cut:
                kept[count], kept_sums[count] = nodes[i], sums[i]
                count += 1
    size = scan(
        trie, kept, kept_sums, np.full(count, np.inf, np.float32), np.arange(count), False,
        log_probs, best, nothing, seen, first, last, scores, ties, rows, 0, left, totals,
    )  # fmt: skip
    return threshold(scores, size, nothing)


@compiled
def survivors(
    trie: Any, log_probs: Floats, best: Floats, floor: Any,
    nodes: Ints, sums: Floats, bounds: Floats, spare: Ints, spare_sums: Floats,
) -> int:  # fmt: skip
    """Prefixes of D - 2 codes whose bound reaches `floor`, into the first three arrays; how many."""
    nodes[0], sums[0] = 0, np.float32(0)
    count = 1
    for d in range(len(best) - 2):
        spare[:count], spare_sums[:count] = nodes[:count], sums[:count]
        count = expand(trie, d, spare, spare_sums, count, log_probs, best, floor, nodes, sums, bounds)
    return count


@compiled
def best_first(
    trie: Any, log_probs: Floats, best: Floats, seen: Ints, seen_at: Ints, width: int, limit: float,
    scores: Floats, rows: Ints, floors: Floats, shares: Floats,
) -> None:  # fmt: skip
    """Top-k of some users, one after the other; those for whom too much is left are put off.

    Args:
        trie: A `Trie`.
        log_probs: float32 [B, D, K].
        best: Largest of those that occur, float32 [B, D].
        seen: Item rows that do not compete, user by user, ascending, int64.
        seen_at: Where each user's begin, int64 [B + 1].
        width: Prefixes that the first look follows.
        limit: Share of the catalogue from which a user is put off; above 1: never.
        scores: float32 [B, k]; out.
        rows: int64 [B, k]; out.
        floors: float32 [B]; out: what an item must reach.
        shares: float32 [B]; out: share of the prefixes of D - 1 codes that are left after the first look. A
            user of a share above `limit` has no scores and rows yet.
    """
    batch, depth = best.shape
    k = scores.shape[1]
    room, runs = 2, 0
    for d in range(1, depth):
        end = trie.code_at[d]
        room, runs = max(room, runs + 1), end - trie.code_at[d - 1]
    widest = log_probs.shape[2] + 1
    nodes, spare = np.empty(room, np.int64), np.empty(room, np.int64)
    sums, spare_sums, bounds = (
        np.empty(room, np.float32), np.empty(room, np.float32), np.empty(room, np.float32),
    )  # fmt: skip
    left, totals = np.empty(widest, np.int64), np.empty(widest, np.float32)
    ties = np.empty(k, np.int64)
    above = trie.start_at[depth - 2]
    for user in range(batch):
        table, most = log_probs[user], best[user]
        first, last = seen_at[user], seen_at[user + 1]
        floor = probe(
            trie, table, most, width, seen, first, last,
            scores[user], ties, rows[user], nodes, sums, bounds, left, totals,
        )  # fmt: skip
        count = survivors(trie, table, most, floor, nodes, sums, bounds, spare, spare_sums)
        remaining = 0
        for i in range(count):
            remaining += trie.starts[above + nodes[i] + 1] - trie.starts[above + nodes[i]]
        floors[user], shares[user] = floor, remaining / max(runs, 1)
        if shares[user] > limit:
            continue
        # Sorting pays where it spares many a look.
        sort = count * SORTING < remaining
        order = np.argsort(-bounds[:count]) if sort else np.arange(count)
        size = scan(
            trie, nodes, sums, bounds, order, sort,
            table, most, floor, seen, first, last, scores[user], ties, rows[user], 0, left, totals,
        )  # fmt: skip
        finish(scores[user], ties, rows[user], size)
