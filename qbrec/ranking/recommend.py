"""The configured scorer at work: the k best items for histories, and the rank of targets that are known."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from numpy.typing import NDArray

from qbrec.config.stages import RankingConfig
from qbrec.ranking.beam import BeamSearch, prefix_sums
from qbrec.ranking.bonus import Bonus, BonusScorer
from qbrec.ranking.code_index import CodeIndex
from qbrec.ranking.exact import exact_top_k
from qbrec.ranking.rank_of import exact_ranks
from qbrec.ranking.rescore import PairBonus, best_pairs, competes, rescored
from qbrec.ranking.scorer import Domain, FactorisedScorer, PrefixScorer, Scorer
from qbrec.ranking.topk import check_k, ranks_both, top_k
from qbrec.storage.ragged import Ragged

if TYPE_CHECKING:
    import scipy.sparse as sp


class Ranker:
    """Ranks the items of a catalogue, or those of an index made by `only`.

    `factorised` is exact, with and without a bonus. `autoregressive` is a beam search: an item
    whose first codes leave the beam is not found. With a bonus it also scores, from left to right, as many
    candidates as the beam is wide: those of the largest bonus.

    Args:
        scorer: *The model*, as `sequence.bonus.load_scorer` gives it. One that is not made of semantic IDs is
            ranked by its dense scores.
        tie_rank: Order of equal scores, [N].
        config: Which scorer, and how wide its beam is.
    """

    def __init__(self, scorer: Scorer, *, tie_rank: NDArray[np.int64], config: RankingConfig) -> None:
        self.scorer, self.tie_rank, self.config = scorer, tie_rank, config
        base = scorer.base if isinstance(scorer, BonusScorer) else scorer
        self.bonus: Bonus | None = scorer.bonus if isinstance(scorer, BonusScorer) else None
        self._by_ids = base if isinstance(base, FactorisedScorer) else None

    @property
    def by_ids(self) -> bool:
        """Whether items are ranked by their semantic IDs, without dense scores."""
        return self._by_ids is not None

    @cached_property
    def index(self) -> CodeIndex:
        """All items, sorted by semantic ID; built when first asked for."""
        assert self._by_ids is not None
        return CodeIndex.build(self._by_ids.table.semantic_ids, tie_rank=self.tie_rank)

    def only(self, allowed: NDArray[np.bool_]) -> Allowed:
        """Prepare a filter for any number of requests: items that may be returned, bool [N]."""
        if self._by_ids is None:
            return Allowed(allowed, None)
        return Allowed(allowed, self.index if allowed.all() else self.index.only(allowed))

    def top_k(
        self,
        histories: Ragged,
        domain: Domain,
        k: int,
        *,
        exclude: Ragged | None = None,
        among: Allowed | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The k best items of every history.

        Args:
            histories: B rows of item rows, most recent last.
            domain: Domain code of every history, [B] or one for all.
            k: How many.
            exclude: Items taken out per history (the seen ones), B ragged rows.
            among: A filter from `only`; None: all items.

        Returns:
            rows int64 [B, k] and scores float32 [B, k], best first; row -1 and score -inf where there are
            fewer.

        Raises:
            ConfigError: k is below 1 or above the catalogue.
            DataError: A score is NaN, or the semantic IDs are another model's.
        """
        if self._by_ids is None:
            scores = self.scorer.scores(histories, domain)
            allowed = None if among is None else among.mask
            return top_k(scores, k, tie_rank=self.tie_rank, exclude=exclude, allowed=allowed)
        index, bonus = self._index_of(among), None if self.bonus is None else self.bonus(histories)
        if self.config.scorer == "factorised":
            log_probs = self._by_ids.code_scorer.code_log_probs(histories, domain)
            return exact_top_k(log_probs, k, index=index, exclude=exclude, bonus=bonus)
        check_k(k, num_items=index.num_items)
        model = cast(PrefixScorer, self._by_ids.code_scorer)
        return self._beam(model, histories, domain, k, exclude=exclude, index=index, bonus=bonus)

    def judge(
        self,
        histories: Ragged,
        domain: Domain,
        targets: NDArray[np.int64],
        k: int,
        *,
        among: Allowed | None = None,
    ) -> Judgement:
        """Where each history's target stands among all items, and its k best items.

        Args:
            histories: B rows of item rows, most recent last; they are the seen items.
            domain: Domain code of every history, [B] or one for all.
            targets: Item row sought, int64 [B].
            k: How many items, at most as many as there are.
            among: A filter from `only`; None: all items.

        Raises:
            DataError: A score is NaN, or the semantic IDs are another model's.
        """
        if self._by_ids is None:
            scores = self.scorer.scores(histories, domain)
            allowed = None if among is None else among.mask
            kept, removed = ranks_both(
                scores, targets, tie_rank=self.tie_rank, seen=histories, allowed=allowed
            )
            best, _ = top_k(scores, k, tie_rank=self.tie_rank, exclude=histories, allowed=allowed)
        elif self.config.scorer == "factorised":
            index, bonus = self._index_of(among), None if self.bonus is None else self.bonus(histories)
            log_probs = self._by_ids.code_scorer.code_log_probs(histories, domain)
            kept, removed = exact_ranks(log_probs, targets, index=index, seen=histories, bonus=bonus)
            best, _ = exact_top_k(log_probs, k, index=index, exclude=histories, bonus=bonus)
        else:
            # What leaves the beam is not found: such a target counts as last, which is the worst it can be.
            width = min(max(self.config.beam, k), len(self.tie_rank))
            lists = [
                self.top_k(histories, domain, width, exclude=seen, among=among)[0].cpu().numpy()
                for seen in (None, histories)
            ]
            kept, removed = (self._places(rows, targets) for rows in lists)
            return Judgement(kept, removed, lists[1][:, :k])
        return Judgement(kept, removed, best.cpu().numpy())

    def _index_of(self, among: Allowed | None) -> CodeIndex:
        index = self.index if among is None else among.index
        assert index is not None, "a filter of a ranker without semantic IDs"
        return index

    def _places(self, rows: NDArray[np.int64], targets: NDArray[np.int64]) -> NDArray[np.int64]:
        hit = rows == targets[:, None]
        return np.where(hit.any(1), hit.argmax(1) + 1, len(self.tie_rank) + 1)

    def _beam(
        self,
        model: PrefixScorer,
        histories: Ragged,
        domain: Domain,
        k: int,
        *,
        exclude: Ragged | None,
        index: CodeIndex,
        bonus: sp.csr_matrix | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        width = max(self.config.beam, k)
        rows, scores = BeamSearch(index, beam=width).search(model, histories, domain, k, exclude=exclude)
        if bonus is None:
            return rows, scores
        pairs = PairBonus(bonus, index.num_items)
        # Items that may not be returned must not take the place of others among the candidates.
        kept = competes(pairs.users, rows=pairs.rows, index=index, exclude=exclude)
        candidates, _ = best_pairs(
            pairs.users[kept], rows=pairs.rows[kept], values=pairs.values[kept], ties=pairs.rows[kept],
            k=width, batch=len(histories),
        )  # fmt: skip
        there = candidates >= 0
        codes = index.semantic_ids[np.where(there, candidates, 0)]
        sums = prefix_sums(model, histories, domain, codes).cpu().numpy()
        best, values = rescored(
            (np.nonzero(there)[0], candidates[there], sums[there]),
            rows.cpu().numpy(), scores.cpu().numpy(), index=index, exclude=exclude, bonus=pairs,
        )  # fmt: skip
        return torch.from_numpy(best).to(rows.device), torch.from_numpy(values).to(rows.device)


@dataclass(frozen=True)
class Judgement:
    """What a ranker makes of histories whose next item is known.

    Attributes:
        kept: Rank of each target among all candidates, int64 [B]; N + 1: not found.
        removed: The same with the seen items out of the race, int64 [B].
        best: Item rows of the best, seen items removed, int64 [B, k]; -1 where there are fewer.
    """

    kept: NDArray[np.int64]
    removed: NDArray[np.int64]
    best: NDArray[np.int64]


class Allowed:
    """A filter made ready: see `Ranker.only`.

    Attributes:
        mask: Items that may be returned, bool [N].
        index: The same as an index of semantic IDs, where there are any.
        count: How many there are.
    """

    def __init__(self, mask: NDArray[np.bool_], index: CodeIndex | None) -> None:
        self.mask, self.index, self.count = mask, index, int(mask.sum())
