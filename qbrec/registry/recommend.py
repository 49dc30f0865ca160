"""Recommend: the same code behind `qbrec recommend`, the served model and the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qbrec.config.stages import RankingConfig
from qbrec.errors import ConfigError, DataError
from qbrec.registry.bundle import open_served, read_bundle, require
from qbrec.registry.item_names import ItemNames, Recommendation
from qbrec.storage.artifact import Artifact
from qbrec.storage.id_table import ALIKE, GENERATION, IDS, IdTable, numbered
from qbrec.storage.ragged import Ragged

if TYPE_CHECKING:
    from qbrec.ranking import Scorer
    from qbrec.ranking.recommend import Allowed
    from qbrec.storage.generations import GenerationsView

BATCH = 64  # histories scored at once


class Recommender:
    """Ranks the whole target domain for histories of item ids.

    Args:
        catalog: The catalogue and its generations.
        semantic_ids: Codes of the items that have an ID, unsigned [N, L]; items that generations added after
            these are known but not ranked.
        labels: Words per code prefix (`"12"`, `"12.7"`, …), most telling first.
        scorer: Scores every item for histories.
        domain: The domain that histories and recommendations belong to.
        ranking: How the scorer is searched.

    Attributes:
        names: Item ids, titles and labels of its item rows.
        num_candidates: Items that can be recommended.
        num_waiting: Appended items on offer that have no ID yet, so that they cannot.
    """

    def __init__(
        self,
        *,
        catalog: GenerationsView,
        semantic_ids: NDArray[np.unsignedinteger[Any]],
        labels: Mapping[str, Sequence[str]],
        scorer: Scorer,
        domain: str,
        ranking: RankingConfig | None = None,
    ) -> None:
        from qbrec.ranking import tie_rank
        from qbrec.ranking.recommend import Ranker

        self._catalog, self._num_ids = catalog, len(semantic_ids)
        self.domain = domain
        self._domain_index = catalog.domain_number(domain)
        self._allowed = catalog.candidates(domain)[: len(semantic_ids)]
        self.names = ItemNames(
            catalog, domain=domain, semantic_ids=semantic_ids, labels=labels, offered=self._allowed
        )
        popularity = np.zeros(len(semantic_ids), np.int64)  # nobody was trained on an appended item
        popularity[: catalog.base.num_items] = catalog.base.train_counts
        self._tie_rank = tie_rank(popularity)
        self._ranker = Ranker(scorer, tie_rank=self._tie_rank, config=ranking or RankingConfig())
        self.num_candidates = int(self._allowed.sum())
        self.num_waiting = int(catalog.candidates(domain)[len(semantic_ids) :].sum())

    @classmethod
    def load(cls, folder: str | Path, *, device: str = "cpu") -> Recommender:
        """Open a bundle.

        Args:
            folder: Written by `write_bundle`.
            device: Where the encoder shall run.

        Raises:
            DataError: It is no bundle, or a file of it is damaged.
        """
        folder = Path(folder)
        document = read_bundle(folder)
        ranking = RankingConfig.model_validate(document["ranking"])
        artifacts = open_served(folder)
        return cls.from_artifacts(artifacts, domain=document["domain"], ranking=ranking, device=device)

    @classmethod
    def from_artifacts(
        cls,
        artifacts: Mapping[str, Artifact],
        *,
        ranking: RankingConfig,
        domain: str | None = None,
        device: str = "cpu",
    ) -> Recommender:
        """Build it from a run's artifacts.

        Args:
            artifacts: `catalog`, `quantizer`, `finetune`, `neighbours` where the run has them, and the
                generations appended since: `generation-1`, `ids-1`, `alike-1`, `generation-2`, …
            ranking: The run's ranking configuration.
            domain: None: the catalogue's target domain.
            device: Where the encoder shall run.

        Raises:
            DataError: An artifact is missing or damaged, or the model was not trained on the domain.
        """
        from qbrec.sequence.bonus import load_scorer
        from qbrec.storage.generations import GenerationsView

        catalog = GenerationsView(require(artifacts, "catalog"), numbered(artifacts, GENERATION))
        quantizer = require(artifacts, "quantizer")
        table = IdTable(quantizer, numbered(artifacts, IDS))
        domain = domain or str(catalog.base.artifact.meta["target_domain"])
        if catalog.domain_number(domain) >= len(catalog.base.domains):
            raise DataError(
                f"the model was not trained on the domain {domain!r}: it was appended later",
                where=str(catalog.path),
                fix=f"recommend for {', '.join(catalog.base.domains)}, or train a run on all domains",
            )
        finetune = require(artifacts, "finetune")
        return cls(
            catalog=catalog,
            semantic_ids=table.codes,
            labels=quantizer.load_json("labels.json"),
            scorer=load_scorer(
                finetune,
                artifacts.get("neighbours"),
                appended=numbered(artifacts, ALIKE),
                semantic_ids=table.tokens,
                chunk_items=ranking.chunk_items,
                device=device,
            ),
            domain=domain,
            ranking=ranking,
        )

    def only(
        self, *, categories: Sequence[str] | None = None, item_ids: Sequence[str] | None = None
    ) -> Allowed:
        """Make a filter ready for any number of requests: what may be recommended.

        Args:
            categories: Names; an item is in a category that its path goes through. None: all items.
            item_ids: The items in stock, say; all of them in the catalogue. None: all items.

        Raises:
            DataError: A category or item is unknown, or nothing is left to recommend.
        """
        from qbrec.registry.filters import in_categories, with_ids

        mask = self._allowed.copy()
        if categories is not None:
            mask &= in_categories(self._catalog, np.flatnonzero(mask), categories, num_items=len(mask))
        if item_ids is not None:
            mask &= with_ids(self._catalog, item_ids, self.domain, num_items=len(mask))
        if not mask.any():
            raise DataError(
                "the filter leaves nothing to recommend",
                where=self.domain,
                fix="name categories and items that are on offer and have a semantic ID",
            )
        return self._ranker.only(mask)

    def recommend(
        self,
        histories: Sequence[Sequence[str]],
        *,
        k: int = 10,
        keep_seen: bool = False,
        among: Allowed | None = None,
    ) -> list[list[Recommendation]]:
        """The k best items of the domain for every history, best first.

        Args:
            histories: Item ids, most recent last. The model reads the last ones it was trained for; the
                filter of seen items reads all.
            k: Items per history; fewer come back where everything else was seen.
            keep_seen: Also recommend what the history holds.
            among: A filter from `only`; None: the whole domain.

        Raises:
            DataError: A history is empty or names an item that the catalogue does not have; or every item is
                retired or has no semantic ID yet.
            ConfigError: k is below 1 or above the number of items of the domain.
        """
        rows = self.names.resolve(histories)
        best, scores = self.rank(rows, k=k, keep_seen=keep_seen, among=among)
        return self.names.describe(best, scores)

    def rank(
        self, histories: Ragged, *, k: int = 10, keep_seen: bool = False, among: Allowed | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The k best items for histories of item rows (see `names`): no ids, titles or labels.

        Args:
            histories: B rows of item rows, none empty, most recent last.
            k: See `recommend`.
            keep_seen: See `recommend`.
            among: See `recommend`.

        Returns:
            Item rows int64 [B, k] and scores float32 [B, k], best first; row -1 where there are fewer.

        Raises:
            DataError: Every item is retired or has no semantic ID yet.
            ConfigError: k is below 1 or above the number of items of the domain.
        """
        self.check(k, among=among)
        among = among or self._on_offer
        best = np.full((len(histories), k), -1, np.int64)
        scores = np.full((len(histories), k), -np.inf, np.float32)
        for begin in range(0, len(histories), BATCH):
            batch = histories.slice(begin, min(begin + BATCH, len(histories)))
            # Rows without an ID yet are in no race that they could be taken out of.
            exclude = None if keep_seen else batch.where(batch.values < self._num_ids)
            found, values = self._ranker.top_k(batch, self._domain_index, k, exclude=exclude, among=among)
            best[begin : begin + BATCH] = found.cpu().numpy()
            scores[begin : begin + BATCH] = values.cpu().numpy()
        return best, scores

    def check(self, k: int, *, among: Allowed | None = None) -> None:
        """Whether k items can be recommended to anybody; raises what `rank` would."""
        if not self.num_candidates:
            raise DataError(
                f"the domain {self.domain!r} has nothing to recommend: {self.num_waiting:,} items wait for "
                "semantic IDs, all others are retired",
                where=self.domain,
                fix="append items, or end the run with `qbrec run`, which gives the waiting ones their IDs",
            )
        count = self.num_candidates if among is None else among.count
        if not 1 <= k <= count:
            raise ConfigError(
                f"k is {k}, but the domain {self.domain!r} has {count:,} items"
                + ("" if among is None else " that the filter allows"),
                where="k",
                fix=f"choose k between 1 and {count}",
            )

    def popular(self, count: int) -> list[str]:
        """Item ids of the domain's most popular items in training."""
        rows = np.flatnonzero(self._allowed)
        best = rows[np.argsort(self._tie_rank[rows], kind="stable")[:count]]
        return self._catalog.item_ids(best)

    @cached_property
    def _on_offer(self) -> Allowed:
        """Everything that may be recommended, made ready by the first request."""
        return self._ranker.only(self._allowed)
