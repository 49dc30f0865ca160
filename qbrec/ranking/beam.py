"""Beam search over semantic IDs that exist: left to right, batched over users, no Python per prefix.

A beam is the number of a prefix in a `CodeIndex`, so its continuations are one contiguous stretch of codes.
A filter is an index of what it allows (`CodeIndex.only`). Whole IDs become items by bucket, without
those that were seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qbrec.errors import DataError
from qbrec.ranking.code_index import CodeIndex
from qbrec.ranking.kernels import native_kernels
from qbrec.ranking.rescore import best_pairs, competes
from qbrec.ranking.scorer import Domain, PrefixScorer
from qbrec.ranking.tables import sorted_rows
from qbrec.ranking.topk import LOWEST, not_a_number
from qbrec.storage.ragged import Ragged

MAX_PREFIXES = 500_000  # evaluations of the model up to which all prefixes are scored


@dataclass(frozen=True)
class Beams:
    """Prefixes of l codes that are still in the race, the best first.

    Attributes:
        nodes: Their numbers in the index, int64 [B, P]; -1: fewer than P.
        scores: Sums of log-probabilities, float32 [B, P]; -inf where there is none.
        codes: The codes, int64 [B, P, l]; 0 where there is none.
    """

    nodes: torch.Tensor
    scores: torch.Tensor
    codes: torch.Tensor

    @property
    def length(self) -> int:
        """Codes of each prefix, l."""
        return self.codes.shape[2]


class BeamSearch:
    """Left-to-right decoding constrained to the IDs of an index.

    Args:
        index: The catalogue, or what a filter leaves of it.
        beam: Prefixes kept per history and level.
    """

    def __init__(self, index: CodeIndex, *, beam: int) -> None:
        assert beam >= 1
        self.index, self.beam = index, beam
        self._levels: dict[tuple[int, torch.device], tuple[torch.Tensor, ...]] = {}

    def start(self, batch: int, *, device: torch.device | str = "cpu") -> Beams:
        """The empty prefix, once for every history."""
        return Beams(
            torch.zeros(batch, 1, dtype=torch.int64, device=device),
            torch.zeros(batch, 1, device=device),
            torch.zeros(batch, 1, 0, dtype=torch.int64, device=device),
        )

    @torch.no_grad()
    def step(self, beams: Beams, log_probs: torch.Tensor) -> Beams:
        """The best `beam` prefixes of one more code.

        Args:
            beams: Prefixes of l codes, [B, P].
            log_probs: Of the code that follows each, float32 [B, P, K_l].

        Returns:
            At most `beam` prefixes per history, best first; of equal scores those of lower codes.

        Raises:
            DataError: The model has too few codes for the index, or gives NaN.
        """
        length, index = beams.length, self.index
        assert length < index.levels
        used = index.used[length]
        if len(used) and log_probs.shape[2] <= used[-1]:
            raise DataError(
                f"level {length} has codes up to {used[-1]}, the model knows {log_probs.shape[2]}",
                where="beam search",
                fix="score with the quantizer artifact the model was trained on",
            )
        width = min(self.beam, max(index.num_prefixes(length + 1), 1))
        kernels = native_kernels(index.num_items)
        if kernels is None or log_probs.device.type != "cpu":
            nodes, scores, parents = self._tensors(beams, log_probs.float(), width)
        else:
            nodes, scores, parents = (
                torch.empty(len(beams.nodes), width, dtype=kind)
                for kind in (torch.int64, torch.float32, torch.int64)
            )
            wrong = kernels.step_beams(
                index.continuations(length), index.last_codes(length + 1), beams.nodes.numpy(),
                beams.scores.numpy(), log_probs.float().contiguous().numpy(),
                nodes.numpy(), scores.numpy(), parents.numpy(),
            )  # fmt: skip
            if wrong:
                raise not_a_number()
        newest, there = torch.zeros_like(nodes), nodes >= 0
        last = index.last_codes(length + 1)[nodes[there].cpu().numpy()]
        newest[there] = torch.from_numpy(last.astype(np.int64)).to(nodes.device)
        earlier = beams.codes.gather(1, parents[..., None].expand(-1, -1, length))
        codes = torch.cat([earlier.masked_fill(~there[..., None], 0), newest[..., None]], 2)
        return Beams(nodes, scores, codes)

    def _tensors(
        self, beams: Beams, log_probs: torch.Tensor, width: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The same step as tensor operations: every prefix gets as many places as the fullest has codes."""
        device = log_probs.device
        starts, codes = self._level(beams.length, device)
        batch = len(beams.nodes)
        missing = (
            torch.full((batch, width), -1, device=device),
            torch.full((batch, width), -torch.inf, device=device),
            torch.zeros(batch, width, dtype=torch.int64, device=device),
        )
        if not len(codes):
            return missing
        # In the order of their numbers, so that a stable sort puts equal scores in the order of codes.
        order = beams.nodes.argsort(dim=1)
        nodes = beams.nodes.gather(1, order)
        begin, end = starts[nodes.clamp_min(0)], starts[nodes.clamp_min(0) + 1]
        end = torch.where(nodes < 0, begin, end)
        place = torch.arange(int((end - begin).max()), device=device)
        child = begin[..., None] + place  # [B, P, C]
        there = child < end[..., None]
        child = child.clamp_max(len(codes) - 1)
        rows = log_probs.gather(1, order[..., None].expand(-1, -1, log_probs.shape[2]))
        total = beams.scores.gather(1, order)[..., None] + rows.gather(2, codes[child])
        total = total.clamp_min(LOWEST).masked_fill(~there, -torch.inf).flatten(1)
        if torch.isnan(total).any():
            raise not_a_number()
        best, found = total.sort(dim=1, descending=True, stable=True)
        best, found = best[:, :width], found[:, :width]
        missing[0][:, : best.shape[1]] = torch.where(
            best == -torch.inf, -1, child.flatten(1).gather(1, found)
        )
        missing[1][:, : best.shape[1]] = torch.where(best == LOWEST, -torch.inf, best)
        missing[2][:, : best.shape[1]] = torch.where(
            best == -torch.inf, 0, order.gather(1, found // max(len(place), 1))
        )
        return missing

    def _level(self, length: int, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Where the continuations of prefixes begin, and their codes; on a GPU they stay."""
        found = self._levels.get((length, device))
        if found is None:
            starts, codes = self.index.continuations(length), self.index.last_codes(length + 1)
            found = tuple(torch.from_numpy(x.astype(np.int64)).to(device) for x in (starts, codes))
            self._levels[length, device] = found
        return found

    def items(
        self, beams: Beams, k: int, *, exclude: Ragged | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Whole IDs as items.

        Args:
            beams: Prefixes of L codes.
            k: How many items.
            exclude: Items taken out per history (the seen ones), B ragged rows.

        Returns:
            rows int64 [B, k] and scores float32 [B, k], best first, ties as in `top_k`. Where the beams hold
            fewer than k items, the rest is row -1 with score -inf.
        """
        index, batch, device = self.index, len(beams.nodes), beams.nodes.device
        assert beams.length == index.levels
        nodes, scores, kernels = (
            beams.nodes.cpu().numpy(),
            beams.scores.cpu().numpy(),
            native_kernels(index.num_items),
        )
        if kernels is not None:
            best, rows = np.full((batch, k), -np.inf, np.float32), np.full((batch, k), -1, np.int64)
            kernels.beam_items(index.trie, nodes, scores, *sorted_rows(exclude, batch), best, rows)
        else:
            ends = index.continuations(index.levels)
            users, places = np.nonzero(nodes >= 0)
            leaves, score = nodes[users, places], scores[users, places]
            counts = ends[leaves + 1] - ends[leaves]
            before = np.cumsum(counts) - counts
            spots = np.arange(int(counts.sum())) + np.repeat(ends[leaves] - before, counts)
            users, score, items = (
                np.repeat(users, counts), np.repeat(score, counts), index.trie.rows[spots].astype(np.int64),
            )  # fmt: skip
            kept = competes(users, rows=items, index=index, exclude=exclude)
            users, score, items = users[kept], score[kept], items[kept]
            rows, best = best_pairs(
                users, rows=items, values=score, ties=index.trie.ties[items], k=k, batch=batch
            )
        return torch.from_numpy(rows).to(device), torch.from_numpy(best).to(device)

    def search(
        self,
        scorer: PrefixScorer,
        histories: Ragged,
        domain: Domain,
        k: int,
        *,
        exclude: Ragged | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode the next items of histories; arguments and result as in `items`.

        Raises:
            DataError: As `step`.
        """
        beams = self.start(len(histories))
        for _ in range(self.index.levels):
            log_probs = scorer.next_code_log_probs(histories, domain, beams.codes.cpu().numpy())
            if beams.nodes.device != log_probs.device:
                beams = self.start(len(histories), device=log_probs.device)
            beams = self.step(beams, log_probs)
        return self.items(beams, k, exclude=exclude)


class AutoregressiveScorer:
    """`score(i) = Σ_l log p(c_l | history, c_<l)` of every item: one evaluation of the model for each prefix.

    For small catalogues, and as what beams approximate: one as wide as the catalogue has prefixes equals it.

    Args:
        prefix_scorer: The model.
        index: All items.
        chunk_prefixes: Prefixes of a history that the model is asked about at once.
    """

    def __init__(self, prefix_scorer: PrefixScorer, *, index: CodeIndex, chunk_prefixes: int = 1024) -> None:
        assert index.allowed is None
        self.prefix_scorer, self.index, self.chunk_prefixes = prefix_scorer, index, chunk_prefixes

    @property
    def name(self) -> str:
        """The name of the model behind it."""
        return self.prefix_scorer.name

    def scores(self, histories: Ragged, domain: Domain) -> torch.Tensor:
        """Scores of the whole catalogue, float32 [B, N] on the model's device.

        Raises:
            DataError: The catalogue has too many prefixes to ask the model about each.
        """
        index, batch = self.index, len(histories)
        asked = batch * sum(index.num_prefixes(length) for length in range(index.levels))
        if asked > MAX_PREFIXES:
            raise DataError(
                f"scoring every item from left to right takes {asked:,} evaluations of the model",
                where="autoregressive scorer",
                fix="use beams, or the factorised scorer, which is exact for any catalogue",
            )
        codes: NDArray[np.int64] = np.zeros((1, 0), np.int64)
        sums = torch.zeros(batch, 1)
        for length in range(index.levels):
            counts = np.diff(index.continuations(length))
            parents = np.repeat(np.arange(len(counts)), counts)
            last = index.last_codes(length + 1).astype(np.int64)
            rows = []
            for begin in range(0, len(codes), self.chunk_prefixes):
                part = codes[begin : begin + self.chunk_prefixes]
                prefixes = np.broadcast_to(part, (batch, *part.shape))
                log_probs = self.prefix_scorer.next_code_log_probs(histories, domain, prefixes)
                mine = (parents >= begin) & (parents < begin + len(part))
                rows.append(
                    log_probs[:, torch.from_numpy(parents[mine] - begin), torch.from_numpy(last[mine])]
                )
            found = torch.cat(rows, 1)
            sums = sums.to(found.device)[:, torch.from_numpy(parents)] + found
            codes = np.concatenate([codes[parents], last[:, None]], 1)
        sizes = np.diff(index.continuations(index.levels))
        scores = torch.empty(batch, index.num_items, device=sums.device)
        leaves = torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes))
        scores[:, torch.from_numpy(index.trie.rows.astype(np.int64))] = sums[:, leaves]
        return scores


def prefix_sums(scorer: PrefixScorer, histories: Ragged, domain: Domain, codes: NDArray[Any]) -> torch.Tensor:
    """Scores from left to right of explicit items: codes [B, P, L] -> float32 [B, P]."""
    codes = codes.astype(np.int64)
    total: torch.Tensor | None = None
    for length in range(codes.shape[2]):
        # Nothing is known of the first code: one row speaks for all.
        prefixes = codes[:, :, :length] if length else codes[:, :1, :0]
        log_probs = scorer.next_code_log_probs(histories, domain, prefixes)
        wanted = torch.from_numpy(codes[:, :, length]).to(log_probs.device)
        log_probs = log_probs.expand(-1, codes.shape[1], -1)
        found = log_probs.gather(2, wanted[..., None])[..., 0]
        total = found if total is None else total + found
    assert total is not None
    return total
