"""One step of a beam search over the trie, and the items of its last beams."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qbrec.ranking.kernels.heap import finish, offer, push, threshold
from qbrec.ranking.kernels.lanes import compiled

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


@compiled
def step_beams(
    starts: NDArray[np.int32], codes: NDArray[Any], nodes: Ints, scores: Floats, log_probs: Floats,
    out_nodes: Ints, out_scores: Floats, out_parents: Ints,
) -> int:  # fmt: skip
    """The best continuations of each history's beams, best first, of equal ones those of lower code.

    Returns how many continuations have no number for a score; the caller refuses them.

    Args:
        starts: Continuations of the prefixes of l codes, int32 [n_l + 1].
        codes: Their codes, [n_(l+1)].
        nodes: Prefixes by number, -1: none, int64 [B, P].
        scores: Their scores, float32 [B, P].
        log_probs: Of the next code, float32 [B, P, K_l].
        out_nodes: int64 [B, beam]; out: prefixes of l + 1 codes, -1 where there are too few.
        out_scores: float32 [B, beam]; out.
        out_parents: int64 [B, beam]; out: place of each one's prefix in `nodes`.
    """
    beam = out_nodes.shape[1]
    ties, found = np.empty(beam, np.int64), np.empty(beam, np.int64)
    widest = log_probs.shape[2] + 1
    hits, totals = np.empty(widest, np.int64), np.empty(widest, np.float32)
    wrong = 0
    for b in range(nodes.shape[0]):
        size, best = 0, out_scores[b]
        for place in range(nodes.shape[1]):
            node = nodes[b, place]
            if node < 0:
                continue
            # Which continuations reach the worst of the best is found without a branch.
            base, count, need = scores[b, place], 0, threshold(best, size, np.float32(-np.inf))
            row = log_probs[b, place]
            for child in range(starts[node], starts[node + 1]):
                total = base + row[codes[child]]
                hits[count], totals[count] = child, total
                count += total >= need
                wrong += total != total
            for i in range(count):
                if totals[i] >= need:
                    size = push(best, ties, found, size, totals[i], hits[i], place)
                    need = threshold(best, size, np.float32(-np.inf))
        # `finish` sorts three arrays: the number of a prefix is its tie, its parent's place travels along.
        finish(best, ties, found, size)
        for i in range(beam):
            out_nodes[b, i] = ties[i] if i < size else -1
            out_parents[b, i] = found[i] if i < size else 0
    return wrong


@compiled
def beam_items(
    trie: Any, nodes: Ints, scores: Floats, seen: Ints, seen_at: Ints, out_scores: Floats, out_rows: Ints
) -> None:
    """The k best items of whole IDs.

    Args:
        trie: A `Trie`.
        nodes: Leaves, -1: none, int64 [B, P].
        scores: float32 [B, P].
        seen: Item rows that do not compete, user by user, ascending, int64.
        seen_at: Where each user's begin, int64 [B + 1].
        out_scores: float32 [B, k]; out.
        out_rows: int64 [B, k]; out: -1 where there are too few.
    """
    ties = np.empty(out_scores.shape[1], np.int64)
    for b in range(nodes.shape[0]):
        size = 0
        for place in range(nodes.shape[1]):
            if nodes[b, place] >= 0:
                size = offer(
                    trie, nodes[b, place], scores[b, place], seen, seen_at[b], seen_at[b + 1],
                    out_scores[b], ties, out_rows[b], size,
                )  # fmt: skip
        finish(out_scores[b], ties, out_rows[b], size)
