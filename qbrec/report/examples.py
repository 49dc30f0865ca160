"""The chapters with items in them: semantic IDs read aloud, recommendations to real users."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qbrec.config import RootConfig
from qbrec.registry.recommend import Recommender
from qbrec.report.blocks import Block, Card, Cell, Item, Part, Row, Section
from qbrec.report.pictures import Thumbnails, thumbnails
from qbrec.storage.artifact import Artifact
from qbrec.storage.catalog_view import CatalogView

SAMPLE_IDS = 12
SAMPLE_USERS = 6
SAMPLE_K = 5
SAMPLE_HISTORY = 6


@dataclass(frozen=True)
class _User:
    """Item rows of one test user: the last ones before the target, the recommended ones, the target."""

    recent: list[int]
    recommended: list[int]
    labels: list[str]
    target: int


def examples(config: RootConfig, artifacts: Mapping[str, Artifact]) -> list[Section]:
    """What the model recommends to some real users, and semantic IDs with their words."""
    if not {"catalog", "quantizer"} <= set(artifacts):
        return []
    catalog = CatalogView(artifacts["catalog"])
    users = _users(config, catalog, artifacts) if "finetune" in artifacts else []
    ids: NDArray[Any] = artifacts["quantizer"].load_npy("semantic_ids.npy")
    popular = _popular(catalog, ids)
    shown = [row for user in users for row in (*user.recent, *user.recommended, user.target)]
    pictures = thumbnails(config, catalog, [*shown, *popular])
    found = [_recommendations(catalog, users, pictures)] if users else []
    return [*found, _semantic_ids(catalog, artifacts["quantizer"], ids, popular, pictures)]


def _popular(catalog: CatalogView, ids: NDArray[Any]) -> list[int]:
    counts = np.asarray(catalog.train_counts)
    rows = np.argsort(-counts, kind="stable")[:SAMPLE_IDS]
    # Neighbours in the order of IDs show what a shared prefix means.
    ordered: list[int] = rows[np.lexsort(np.asarray(ids[rows]).T[::-1])].tolist()
    return ordered


def _semantic_ids(
    catalog: CatalogView, quantizer: Artifact, ids: NDArray[Any], rows: Sequence[int], pictures: Thumbnails
) -> Section:
    from qbrec.quantizer.labels import describe
    from qbrec.sequence.vocabulary import format_semantic_id

    labels = quantizer.load_json("labels.json")
    lines = []
    for row, title in zip(rows, _names(catalog, rows), strict=True):
        codes = [int(code) for code in ids[row]]
        item = Cell(title, picture=pictures.of(row))
        lines.append(Row((item, Cell(format_semantic_id(codes)), Cell(describe(labels, codes)))))
    block = Block(head=("item", "semantic ID", "in words"), rows=lines, code=frozenset({1}))
    text = (
        "The most popular items, sorted by ID. The words are those that set a prefix apart from its siblings."
    )
    return Section("ids", "Semantic IDs read aloud", texts=(text,), blocks=(block,))


def _users(config: RootConfig, catalog: CatalogView, artifacts: Mapping[str, Artifact]) -> list[_User]:
    recommender = Recommender.from_artifacts(artifacts, ranking=config.ranking)
    histories = catalog.load_histories(recommender.domain)
    cut = np.asarray(histories.cut)[:, 1]
    users = np.flatnonzero((cut < histories.rows.lengths) & (cut > 0))
    if not len(users):
        return []
    # Spread over all users, the same for the same data: no cherry-picking.
    users = users[np.linspace(0, len(users) - 1, min(SAMPLE_USERS, len(users))).astype(np.int64)]
    walks = [np.asarray(histories.rows.row(int(u))) for u in users]
    past = [walk[: cut[u]] for walk, u in zip(walks, users, strict=True)]
    k = min(SAMPLE_K, recommender.num_candidates)
    lists = recommender.recommend([catalog.item_ids(rows) for rows in past], k=k)
    lookup = partial(catalog.lookup, domain=recommender.domain)
    return [
        _User(
            recent=rows[-SAMPLE_HISTORY:].tolist(),
            recommended=lookup([item["item_id"] for item in items]).tolist(),
            labels=[item["label"] for item in items],
            target=int(walk[cut[u]]),
        )
        for rows, walk, u, items in zip(past, walks, users, lists, strict=True)
    ]


def _recommendations(catalog: CatalogView, users: Sequence[_User], pictures: Thumbnails) -> Section:
    def items(rows: Sequence[int], labels: Sequence[str] = (), *, mark: int = -1) -> list[Item]:
        return [
            Item(
                title,
                labels[place] if labels else "",
                note="← what came next" if row == mark else "",
                picture=pictures.of(row),
            )
            for place, (row, title) in enumerate(zip(rows, _names(catalog, rows), strict=True))
        ]

    cards = [
        Card(
            f"Test user {number}",
            (
                Part("history, most recent last", items(user.recent)),
                Part("recommended", items(user.recommended, user.labels, mark=user.target)),
                Part("what came next", items([user.target])),
            ),
        )
        for number, user in enumerate(users, start=1)
    ]
    text = "Users are taken at even distances through the test set, not chosen by how well they are served."
    texts = (text, pictures.note) if pictures.note else (text,)
    return Section("examples", "Recommendations", texts=texts, blocks=(Block(cards=cards),))


def _names(catalog: CatalogView, rows: Sequence[int]) -> list[str]:
    """Titles; the item's id where it has none."""
    return [
        title or item_id for title, item_id in zip(catalog.titles(rows), catalog.item_ids(rows), strict=True)
    ]
