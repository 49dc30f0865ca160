"""All items for eight users at once: the trie is read once for all of them, and a code costs one vector load.

Tables of log-probabilities are laid out [level, code, user]. Sums of prefixes are shared by everything below
them; a prefix that nobody of the eight can need (see `best_first` for why its bound is safe) is passed over.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qbrec.ranking.kernels.best_first import FEW, FLAT
from qbrec.ranking.kernels.heap import finish, offer, threshold
from qbrec.ranking.kernels.lanes import (
    WIDTH,
    add,
    at_least,
    compiled,
    count_above,
    equal,
    load,
    no_counts,
    store,
)

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


@compiled
def upper_sums(trie: Any, table: Floats, stride: int) -> Floats:
    """Sums of all prefixes of D - 3 codes, flat float32 [n · 8]."""
    sums = np.zeros(WIDTH, np.float32)
    for depth in range(len(trie.code_at) - 3):
        codes, first = trie.code_at[depth], trie.start_at[depth]
        below = np.empty((trie.code_at[depth + 1] - codes) * WIDTH, np.float32)
        for node in range(len(sums) // WIDTH):
            base = load(sums, np.int64(node * WIDTH))
            for child in range(trie.starts[first + node], trie.starts[first + node + 1]):
                place = np.int64(depth * stride + np.int64(trie.codes[codes + child]) * WIDTH)
                store(below, np.int64(child * WIDTH), add(base, load(table, place)))
        sums = below
    return sums


@compiled
def top_together(
    trie: Any, table: Floats, stride: int, most: Floats, floors: Floats, seen: Ints, spans: Any,
    scores: Floats, rows: Ints,
) -> None:  # fmt: skip
    """Top-k of eight users.

    Args:
        trie: A `Trie`.
        table: Log-probabilities, flat float32 [D · K · 8].
        stride: K · 8.
        most: Largest of those that occur, flat float32 [D · 8].
        floors: What an item must reach, float32 [8]; lanes without a user: +inf.
        seen: Item rows that do not compete, int64.
        spans: Where those of each user begin and end, ascending in between, int64 [2, 8].
        scores: float32 [8, k]; out.
        rows: int64 [8, k]; out.
    """
    depth, k = len(trie.code_at), scores.shape[1]
    ties, sizes = np.empty((WIDTH, k), np.int64), np.zeros(WIDTH, np.int64)
    bars, lanes = floors.copy(), np.empty(WIDTH, np.float32)
    bar = load(bars, np.int64(0))
    sums = upper_sums(trie, table, stride)
    starts, codes, tail = trie.starts, trie.codes, trie.tail
    at0, at1, at2 = trie.start_at[depth - 3], trie.start_at[depth - 2], trie.start_at[depth - 1]
    in0, in1, in2 = trie.code_at[depth - 3], trie.code_at[depth - 2], trie.code_at[depth - 1]
    t0, t1, t2 = (depth - 3) * stride, (depth - 2) * stride, (depth - 1) * stride
    most0 = load(most, np.int64((depth - 3) * WIDTH))
    most1, most2 = load(most, np.int64((depth - 2) * WIDTH)), load(most, np.int64((depth - 1) * WIDTH))
    left = np.empty(stride // WIDTH + 1, np.int64)
    for top in range(len(sums) // WIDTH):
        base = load(sums, np.int64(top * WIDTH))
        if at_least(add(add(add(base, most0), most1), most2), bar) == 0:
            continue
        for node in range(starts[at0 + top], starts[at0 + top + 1]):
            upper = add(base, load(table, np.int64(t0 + np.int64(codes[in0 + node]) * WIDTH)))
            if at_least(add(add(upper, most1), most2), bar) == 0:
                continue
            begin, end, count = starts[at1 + node], starts[at1 + node + 1], 0
            if end - begin >= FEW:
                for run in range(begin, end):
                    total = add(upper, load(table, np.int64(t1 + np.int64(codes[in1 + run]) * WIDTH)))
                    left[count] = run
                    count += at_least(add(total, most2), bar) != 0
            if end - begin < FEW or count * FLAT > end - begin:
                for leaf in range(starts[at2 + begin], starts[at2 + end]):
                    total = add(upper, load(table, np.int64(t1 + np.int64(tail[leaf]) * WIDTH)))
                    score = add(total, load(table, np.int64(t2 + np.int64(codes[in2 + leaf]) * WIDTH)))
                    hits = at_least(score, bar)
                    if hits != 0:
                        store(lanes, np.int64(0), score)
                        _take(trie, leaf, hits, lanes, seen, spans, scores, ties, rows, sizes, floors, bars)
                        bar = load(bars, np.int64(0))
                continue
            for i in range(count):
                run = left[i]
                total = add(upper, load(table, np.int64(t1 + np.int64(codes[in1 + run]) * WIDTH)))
                for leaf in range(starts[at2 + run], starts[at2 + run + 1]):
                    score = add(total, load(table, np.int64(t2 + np.int64(codes[in2 + leaf]) * WIDTH)))
                    hits = at_least(score, bar)
                    if hits != 0:
                        store(lanes, np.int64(0), score)
                        _take(trie, leaf, hits, lanes, seen, spans, scores, ties, rows, sizes, floors, bars)
                        bar = load(bars, np.int64(0))
    for user in range(WIDTH):
        finish(scores[user], ties[user], rows[user], sizes[user])


@compiled
def _take(
    trie: Any, leaf: int, hits: int, lanes: Floats, seen: Ints, spans: Any,
    scores: Floats, ties: Any, rows: Ints, sizes: Ints, floors: Floats, bars: Floats,
) -> None:  # fmt: skip
    """Offer a leaf to the users whose bar it reaches, and raise their bars."""
    for user in range(WIDTH):
        if (hits >> user) & 1:
            sizes[user] = offer(
                trie, leaf, lanes[user], seen, spans[0, user], spans[1, user],
                scores[user], ties[user], rows[user], sizes[user],
            )  # fmt: skip
            bars[user] = threshold(scores[user], sizes[user], floors[user])


@compiled
def count_together(
    trie: Any, table: Floats, stride: int, most: Floats, least: Floats, goals: Floats, goal_ties: Ints,
    above: Ints,
) -> None:  # fmt: skip
    """How many items beat eight users' targets: a higher score, or the same and earlier in the order of ties.

    Args:
        trie: A `Trie`.
        table: Log-probabilities, flat float32 [D · K · 8].
        stride: K · 8.
        most: Largest of those that occur, flat float32 [D · 8].
        least: Smallest of those that occur, flat float32 [D · 8].
        goals: Scores of the targets, float32 [8]; lanes without a user: +inf.
        goal_ties: Their places in the order of ties, int64 [8].
        above: int64 [8]; out.
    """
    depth = len(trie.code_at)
    counts, whole, lanes = no_counts(), np.zeros(WIDTH, np.int64), np.empty(WIDTH, np.int32)
    goal = load(goals, np.int64(0))
    sums = upper_sums(trie, table, stride)
    starts, codes, tail, buckets = trie.starts, trie.codes, trie.tail, trie.buckets
    several = len(buckets) > 0
    at0, at1, at2 = trie.start_at[depth - 3], trie.start_at[depth - 2], trie.start_at[depth - 1]
    in0, in1, in2 = trie.code_at[depth - 3], trie.code_at[depth - 2], trie.code_at[depth - 1]
    t0, t1, t2 = (depth - 3) * stride, (depth - 2) * stride, (depth - 1) * stride
    most0 = load(most, np.int64((depth - 3) * WIDTH))
    most1, most2 = load(most, np.int64((depth - 2) * WIDTH)), load(most, np.int64((depth - 1) * WIDTH))
    least1, least2 = load(least, np.int64((depth - 2) * WIDTH)), load(least, np.int64((depth - 1) * WIDTH))
    left, one = np.empty(stride // WIDTH + 1, np.int64), np.int32(1)
    for top in range(len(sums) // WIDTH):
        base = load(sums, np.int64(top * WIDTH))
        if at_least(add(add(add(base, most0), most1), most2), goal) == 0:
            continue
        for node in range(starts[at0 + top], starts[at0 + top + 1]):
            upper = add(base, load(table, np.int64(t0 + np.int64(codes[in0 + node]) * WIDTH)))
            reach = at_least(add(add(upper, most1), most2), goal)
            if reach == 0:
                continue
            begin, end, count = starts[at1 + node], starts[at1 + node + 1], 0
            # Strictly above in every lane that anything below reaches: counted, not looked at.
            low = add(add(upper, least1), least2)
            if reach == at_least(low, goal) and equal(low, goal) == 0:
                items = np.int64(starts[at2 + end]) - starts[at2 + begin]
                if several:
                    items = np.int64(buckets[starts[at2 + end]]) - buckets[starts[at2 + begin]]
                for user in range(WIDTH):
                    whole[user] += items * ((reach >> user) & 1)
                continue
            if end - begin >= FEW:
                for run in range(begin, end):
                    total = add(upper, load(table, np.int64(t1 + np.int64(codes[in1 + run]) * WIDTH)))
                    left[count] = run
                    count += at_least(add(total, most2), goal) != 0
            if end - begin < FEW or count * FLAT > end - begin:
                for leaf in range(starts[at2 + begin], starts[at2 + end]):
                    total = add(upper, load(table, np.int64(t1 + np.int64(tail[leaf]) * WIDTH)))
                    score = add(total, load(table, np.int64(t2 + np.int64(codes[in2 + leaf]) * WIDTH)))
                    step = np.int32(buckets[leaf + 1] - buckets[leaf]) if several else one
                    counts = count_above(counts, score, goal, step)
                    same = equal(score, goal)
                    if same != 0:
                        _count_ties(trie, leaf, same, goal_ties, whole)
                continue
            for i in range(count):
                run = left[i]
                total = add(upper, load(table, np.int64(t1 + np.int64(codes[in1 + run]) * WIDTH)))
                for leaf in range(starts[at2 + run], starts[at2 + run + 1]):
                    score = add(total, load(table, np.int64(t2 + np.int64(codes[in2 + leaf]) * WIDTH)))
                    step = np.int32(buckets[leaf + 1] - buckets[leaf]) if several else one
                    counts = count_above(counts, score, goal, step)
                    same = equal(score, goal)
                    if same != 0:
                        _count_ties(trie, leaf, same, goal_ties, whole)
    store(lanes, np.int64(0), counts)
    for user in range(WIDTH):
        above[user] = whole[user] + lanes[user]


@compiled
def _count_ties(trie: Any, leaf: int, same: int, goal_ties: Ints, whole: Ints) -> None:
    """Count the items of a leaf that tie with a target and come before it."""
    begin, end = leaf, leaf + 1
    if len(trie.buckets) > 0:
        begin, end = trie.buckets[leaf], trie.buckets[leaf + 1]
    for place in range(begin, end):
        tie = trie.ties[trie.rows[place]]
        for user in range(WIDTH):
            whole[user] += ((same >> user) & 1) & (tie < goal_ties[user])
