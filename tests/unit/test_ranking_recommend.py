"""Serving: the ranker against dense scores and brute force, filters and the command's options."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given
from hypothesis import strategies as st

from qbrec.config.stages import RankingConfig
from qbrec.errors import ConfigError, DataError
from qbrec.ranking import AutoregressiveScorer, FactorisedScorer, tie_rank, top_k
from qbrec.ranking.bonus import BonusScorer
from qbrec.ranking.recommend import Ranker
from qbrec.ranking.rescore import best_pairs
from qbrec.ranking.topk import ranks_both
from qbrec.registry.filters import in_categories, read_ids, with_ids
from qbrec.registry.recommend import Recommender
from qbrec.storage.ragged import Ragged

LEVELS, NUM_ITEMS = (5, 4, 6), 120
RNG = np.random.default_rng(0)
CODES = np.stack([RNG.integers(0, k, NUM_ITEMS) for k in LEVELS], 1).astype(np.uint8)
TIES = tie_rank(RNG.integers(0, 3, NUM_ITEMS))
HISTORIES = Ragged.from_lists([[3, 5], [7], [100, 101, 3], [9, 9]])
ALLOWED = np.arange(NUM_ITEMS) % 4 > 0


class Model:
    """All codes at once, or each from those before it: two tables of random numbers."""

    name = "model"

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.table = torch.randn(NUM_ITEMS, 3, 6, generator=generator)

    def code_log_probs(self, histories: Ragged, domain: object) -> torch.Tensor:
        return self.table[torch.from_numpy(histories.values[histories.offsets[1:] - 1])]

    def next_code_log_probs(self, histories: Ragged, domain: object, prefixes: np.ndarray) -> torch.Tensor:
        level = prefixes.shape[2]
        rows = self.code_log_probs(histories, domain)[:, None, level, : LEVELS[level]]
        shift = torch.from_numpy((prefixes * np.arange(3, 3 + level)).sum(2))  # depends on the prefix
        return torch.stack(
            [rows[b].expand(len(shift[b]), -1) * (1 + shift[b, :, None]) for b in range(len(shift))]
        )


class Extra:
    """A bonus on every seventh item, more for later histories."""

    def __call__(self, histories: Ragged) -> sp.csr_matrix:
        dense = np.zeros((len(histories), NUM_ITEMS - 10), np.float32)  # appended items get none
        dense[:, ::7] = 1.5 + np.arange(len(histories), dtype=np.float32)[:, None]
        return sp.csr_matrix(dense)


def ranker(scorer: str, *, bonus: bool, beam: int = 1000) -> Ranker:
    base = FactorisedScorer(Model(), semantic_ids=CODES)
    config = RankingConfig(scorer=scorer, beam=beam)  # type: ignore[arg-type]
    return Ranker(BonusScorer(base, Extra()) if bonus else base, tie_rank=TIES, config=config)  # type: ignore[arg-type]


def dense_scores(ours: Ranker) -> torch.Tensor:
    if ours.config.scorer == "factorised":
        return ours.scorer.scores(HISTORIES, 0)
    scores = AutoregressiveScorer(Model(), index=ours.index).scores(HISTORIES, 0)
    if ours.bonus is not None:
        scores[:, : NUM_ITEMS - 10] += torch.from_numpy(ours.bonus(HISTORIES).toarray())
    return scores


@pytest.mark.parametrize("scorer", ["factorised", "autoregressive"])
@pytest.mark.parametrize("bonus", [False, True])
@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("k", [1, 10, NUM_ITEMS])
def test_equals_dense_scores(scorer: str, bonus: bool, filtered: bool, k: int) -> None:
    """A beam of all prefixes and all candidates is exact as well."""
    ours = ranker(scorer, bonus=bonus)
    dense = dense_scores(ours)
    rows, scores = ours.top_k(
        HISTORIES, 0, k, exclude=HISTORIES, among=ours.only(ALLOWED) if filtered else None
    )
    expected = top_k(dense, k, tie_rank=TIES, exclude=HISTORIES, allowed=ALLOWED if filtered else None)
    assert torch.equal(rows, expected[0])
    assert torch.equal(scores, expected[1])


@pytest.mark.parametrize("scorer", ["factorised", "autoregressive"])
@pytest.mark.parametrize("bonus", [False, True])
@pytest.mark.parametrize("filtered", [False, True])
def test_targets_stand_where_dense_scores_put_them(scorer: str, bonus: bool, filtered: bool) -> None:
    ours = ranker(scorer, bonus=bonus)
    dense = dense_scores(ours)
    mask = ALLOWED if filtered else None
    among = ours.only(ALLOWED) if filtered else None
    for targets in (np.array([7, 14, 119, 9]), np.array([0, 1, 2, 3])):  # 9 was seen, 0 is not allowed
        found = ours.judge(HISTORIES, 0, targets, 5, among=among)
        kept, removed = ranks_both(dense, targets, tie_rank=TIES, seen=HISTORIES, allowed=mask)
        np.testing.assert_array_equal(found.kept, kept)
        np.testing.assert_array_equal(found.removed, removed)
        best, _ = top_k(dense, 5, tie_rank=TIES, exclude=HISTORIES, allowed=mask)
        np.testing.assert_array_equal(found.best, best.numpy())


def test_what_leaves_the_beam_counts_as_last() -> None:
    wide, narrow = (
        ranker("autoregressive", bonus=False, beam=beam).judge(HISTORIES, 0, np.arange(20, 24), 2)
        for beam in (1000, 3)
    )
    lost = narrow.removed == NUM_ITEMS + 1
    assert lost.any()
    assert (wide.removed <= NUM_ITEMS).all()


def test_the_beam_is_the_configured_one() -> None:
    found = {
        beam: ranker("autoregressive", bonus=False, beam=beam).top_k(HISTORIES, 0, 2) for beam in (2, 1000)
    }
    assert not torch.equal(found[2][1], found[1000][1])
    assert (found[2][1] <= found[1000][1]).all()


def test_scorers_without_semantic_ids_are_ranked_by_dense_scores() -> None:
    scores = torch.randn(4, NUM_ITEMS)
    flat = SimpleNamespace(name="flat", scores=lambda histories, domain: scores)
    ours = Ranker(flat, tie_rank=TIES, config=RankingConfig())
    rows, _ = ours.top_k(HISTORIES, 0, 5, exclude=HISTORIES, among=ours.only(ALLOWED))
    expected, _ = top_k(scores, 5, tie_rank=TIES, exclude=HISTORIES, allowed=ALLOWED)
    assert torch.equal(rows, expected)


@pytest.mark.parametrize("scorer", ["factorised", "autoregressive"])
def test_k_outside_the_catalogue(scorer: str) -> None:
    with pytest.raises(ConfigError, match="catalogue has 120 items"):
        ranker(scorer, bonus=False).top_k(HISTORIES, 0, 121)


@given(
    st.dictionaries(
        st.tuples(st.integers(0, 3), st.integers(0, 9)),
        st.sampled_from([-np.inf, -1.0, 0.5, 2.0]),
        max_size=30,
    ),
    st.integers(1, 8),
)
def test_best_of_explicit_pairs(pairs: dict[tuple[int, int], float], k: int) -> None:
    ties = np.array([3, 9, 1, 0, 7, 2, 8, 4, 6, 5])
    users, rows = np.array(list(pairs), np.int64).reshape(-1, 2).T
    values = np.array(list(pairs.values()), np.float32)
    best, worth = best_pairs(users, rows=rows, values=values, ties=ties[rows], k=k, batch=4)
    for user in range(4):
        mine = sorted((-value, ties[row], row) for (owner, row), value in pairs.items() if owner == user)[:k]
        fewer = k - len(mine)
        assert best[user].tolist() == [row for _, _, row in mine] + [-1] * fewer
        assert worth[user].tolist() == [-value for value, _, _ in mine] + [-np.inf] * fewer


def catalog(with_paths: bool = True) -> SimpleNamespace:
    import pyarrow as pa

    paths = [["Home", "Lamps"], None, ["Home"], [], ["Toys", "Lamps"], ["Toys"]]
    columns = {
        "row": list(range(6)),
        **({"categories": pa.array(paths, pa.list_(pa.string()))} if with_paths else {}),
    }
    table = pa.table(columns)
    names = {f"i{n}": n for n in range(6)}
    return SimpleNamespace(
        display=lambda rows: table.take(pa.array(rows)),
        lookup=lambda ids, domain: [names.get(item, -1) for item in ids],
        representatives=lambda rows: np.where(rows == 1, 0, rows),  # the second is a listing of the first
    )


def recommender(scorer: str = "factorised") -> Recommender:
    """One over a catalogue in memory; item `i<n>` is in the category `c<n % 3>`, every fifth is retired."""
    import pyarrow as pa

    rows = np.arange(NUM_ITEMS)
    view = catalog()
    table = pa.table({"row": rows, "categories": pa.array([["all", f"c{n % 3}"] for n in rows])})
    names = {f"i{n}": n for n in rows.tolist()}
    view.display = lambda rows: table.take(pa.array(rows))
    view.lookup = lambda ids, domain: [names.get(item, -1) for item in ids]
    view.domain_number = lambda domain: 0
    view.candidates = lambda domain: rows % 5 > 0
    view.item_ids = view.titles = lambda rows: [f"i{n}" for n in rows]
    view.representatives = lambda rows: rows
    view.base = SimpleNamespace(num_items=NUM_ITEMS, train_counts=np.argsort(TIES)[::-1])
    return Recommender(
        catalog=view,
        semantic_ids=CODES,
        labels={},
        scorer=FactorisedScorer(Model(), semantic_ids=CODES),
        domain="shop",
        ranking=RankingConfig(scorer=scorer, beam=200),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("scorer", ["factorised", "autoregressive"])
def test_recommending_within_a_filter(scorer: str) -> None:
    ours = recommender(scorer)
    (everything,) = ours.recommend([["i3"]], k=ours.num_candidates, keep_seen=True)
    order = [item["item_id"] for item in everything]
    assert len(order) == ours.num_candidates == 96
    among = ours.only(categories=["c1", "c2"], item_ids=[f"i{n}" for n in range(60)])
    expected = [item for item in order if int(item[1:]) % 3 > 0 and int(item[1:]) < 60]
    for _ in range(2):  # made once, used often
        (found,) = ours.recommend([["i3"]], k=len(expected), keep_seen=True, among=among)
        assert [item["item_id"] for item in found] == expected
    (unseen,) = ours.recommend([["i1"]], k=5, among=among)
    assert "i1" not in {item["item_id"] for item in unseen}
    with pytest.raises(ConfigError, match="that the filter allows"):
        ours.recommend([["i3"]], k=len(expected) + 1, among=among)
    with pytest.raises(DataError, match="leaves nothing"):
        ours.only(item_ids=["i0", "i5"])
    with pytest.raises(DataError, match="category 'c9'"):
        ours.only(categories=["c9"])


def test_the_command_has_the_filters() -> None:
    from click.testing import CliRunner

    from qbrec.cli.recommend import recommend

    helped = CliRunner().invoke(recommend, ["--help"]).output
    assert "--category" in helped
    assert "--only" in helped
    missing = CliRunner().invoke(recommend, ["--only", "/no/such/file"])
    assert missing.exit_code == 2


@pytest.mark.parametrize("chunk", [2, 100])
def test_categories(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr("qbrec.registry.filters._CHUNK", chunk)
    everything = np.arange(6)

    def found(names: list[str], rows: np.ndarray = everything) -> list[int]:
        return np.flatnonzero(in_categories(catalog(), rows, names, num_items=6)).tolist()

    assert found(["Lamps"]) == [0, 4]
    assert found(["Home"]) == [0, 2]
    assert found(["Home", "Toys"]) == [0, 2, 4, 5]
    assert found(["Home"], np.array([1, 2, 5])) == [2]
    with pytest.raises(DataError, match="'Lamp'") as caught:
        found(["Toys", "Lamp"])
    assert "'Lamps'" in str(caught.value)
    with pytest.raises(DataError, match="'Home'"):
        in_categories(catalog(with_paths=False), everything, ["Home"], num_items=6)


def test_item_ids(tmp_path: Path) -> None:
    path = tmp_path / "stock.txt"
    path.write_text("i1\n\n i5 \n", encoding="utf-8")
    assert np.flatnonzero(with_ids(catalog(), read_ids(path), "shop", num_items=5)).tolist() == [0]
    with pytest.raises(DataError, match="'i9'"):
        with_ids(catalog(), ["i1", "i9"], "shop", num_items=6)
    path.write_text("\n")
    with pytest.raises(DataError, match="empty"):
        read_ids(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="cannot be read"):
        read_ids(path)
