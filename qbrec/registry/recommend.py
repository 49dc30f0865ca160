"""Recommend: the same code behind `qbrec recommend`, the served model and the report."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from qbrec.config.stages import RankingConfig
from qbrec.errors import ConfigError, DataError
from qbrec.registry.bundle import open_served, read_bundle, require
from qbrec.storage.artifact import Artifact
from qbrec.storage.id_table import ALIKE, GENERATION, IDS, IdTable, numbered
from qbrec.storage.ragged import Ragged

if TYPE_CHECKING:
    from qbrec.ranking import Scorer
    from qbrec.ranking.recommend import Allowed
    from qbrec.storage.generations import GenerationsView

BATCH = 64  # histories scored at once
_SUGGEST_FROM = 20_000  # ids compared letter by letter for a suggestion


class Recommendation(TypedDict):
    """One recommended item; `label` reads its semantic ID in words."""

    item_id: str
    title: str
    score: float
    semantic_id: str
    label: str


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

        self._catalog, self._ids, self._labels = catalog, semantic_ids, labels
        self.domain = domain
        self._domain_index = catalog.domain_number(domain)
        self._allowed = catalog.candidates(domain)[: len(semantic_ids)]
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
        best, scores = self.rank(self.resolve(histories), k=k, keep_seen=keep_seen, among=among)
        return self.describe(best, scores)

    def resolve(self, histories: Sequence[Sequence[str]], *, suggest_from: int = _SUGGEST_FROM) -> Ragged:
        """Item rows of histories, for `rank`.

        Args:
            histories: See `recommend`.
            suggest_from: Ids that an unknown one is compared with, at most, to suggest another.

        Raises:
            DataError: A history is empty or names an item that the catalogue does not have.
        """
        found = [self._rows(h, position=i, suggest_from=suggest_from) for i, h in enumerate(histories)]
        return Ragged.from_lists([rows.tolist() for rows in found])

    def rank(
        self, histories: Ragged, *, k: int = 10, keep_seen: bool = False, among: Allowed | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The k best items for histories of item rows (`resolve`, `lookup`): no ids, titles or labels.

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
            exclude = None if keep_seen else batch.where(batch.values < len(self._ids))
            found, values = self._ranker.top_k(batch, self._domain_index, k, exclude=exclude, among=among)
            best[begin : begin + BATCH] = found.cpu().numpy()
            scores[begin : begin + BATCH] = values.cpu().numpy()
        return best, scores

    def describe(self, rows: NDArray[np.int64], scores: NDArray[np.float32]) -> list[list[Recommendation]]:
        """What `rank` gave, [B, k] each, in words: B lists."""
        pairs = zip(rows, scores, strict=True)
        return [self._describe(found[found >= 0], score[found >= 0]) for found, score in pairs]

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

    def lookup(self, item_ids: Sequence[str]) -> NDArray[np.int64]:
        """Rows of item ids, int64 [n]; of near-duplicates one stands for all, -1: unknown."""
        rows = np.array(self._catalog.lookup(item_ids, self.domain), np.int64)
        known = rows >= 0
        rows[known] = self._catalog.representatives(rows[known])
        return rows

    def item_ids(self, rows: NDArray[np.int64]) -> list[str]:
        """Item ids of rows, in their order."""
        return self._catalog.item_ids(rows)

    def popular(self, count: int) -> list[str]:
        """Item ids of the domain's most popular items in training."""
        rows = np.flatnonzero(self._allowed)
        best = rows[np.argsort(self._tie_rank[rows], kind="stable")[:count]]
        return self._catalog.item_ids(best)

    def semantic_id(self, row: int) -> str:
        """`<a_12><b_7>…` of one item row."""
        from qbrec.sequence.vocabulary import format_semantic_id

        return format_semantic_id([int(code) for code in self._ids[row]])

    def label(self, row: int) -> str:
        """`[Art] [Paint] [Set]`: the item's semantic ID in words."""
        from qbrec.quantizer.labels import describe

        return describe(self._labels, [int(code) for code in self._ids[row]])

    @cached_property
    def _on_offer(self) -> Allowed:
        """Everything that may be recommended, made ready by the first request."""
        return self._ranker.only(self._allowed)

    def _describe(self, rows: NDArray[np.int64], scores: NDArray[np.float32]) -> list[Recommendation]:
        ids, titles = self._catalog.item_ids(rows), self._catalog.titles(rows)
        return [
            {
                "item_id": item_id,
                "title": title,
                "score": float(score),
                "semantic_id": self.semantic_id(int(row)),
                "label": self.label(int(row)),
            }
            for item_id, title, score, row in zip(ids, titles, scores, rows, strict=True)
        ]

    def _rows(self, history: Sequence[str], *, position: int, suggest_from: int) -> NDArray[np.int64]:
        if len(history) == 0:
            raise DataError(
                "a history is empty: there is nothing to continue",
                where=f"history {position}",
                fix="give at least one item id; for users without a past, recommend what is popular",
            )
        wrong = next((item for item in history if not isinstance(item, str)), None)
        if wrong is not None:
            raise DataError(
                f"an item id is {wrong!r}, not a text",
                where=f"history {position}",
                fix="write item ids as texts",
            )
        rows = self.lookup(list(history))
        if (rows < 0).any():
            unknown = history[int(np.flatnonzero(rows < 0)[0])]
            near = self._nearest(unknown, suggest_from)
            raise DataError(
                f"unknown item id {unknown!r} in domain {self.domain!r}",
                where=f"history {position}",
                fix=f"did you mean {', '.join(near)}?"
                if near
                else "use item ids of the catalogue that was trained on, or appended to it",
            )
        return rows

    def _nearest(self, unknown: str, most: int) -> list[str]:
        """Up to three known ids that look like it; in large catalogues among those of the same beginning."""
        known = self._suggestions
        for length in (0, 2, 4, 6):
            if len(known) <= most:
                break
            start = unknown[:length].lower()
            known = [item for item in known if item.lower().startswith(start)]
        return difflib.get_close_matches(unknown, known[:most], n=3, cutoff=0.6)

    @cached_property
    def _suggestions(self) -> list[str]:
        """Ids that may be meant where an unknown one stands; none where there are millions."""
        rows = np.flatnonzero(self._allowed)
        return self._catalog.item_ids(rows) if len(rows) <= 50 * _SUGGEST_FROM else []
