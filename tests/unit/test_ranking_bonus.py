"""The bonus of item graphs: weights against scikit-learn, its share by validation, any number of ranks."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from sklearn.linear_model import LogisticRegression

from qbrec.ranking.bonus import SCALES, Bonus, BonusScorer, conditional_logit, tune_bonus
from qbrec.ranking.counted import count_arrows
from qbrec.ranking.graphs import ItemGraphs
from qbrec.ranking.topk import LOWEST
from qbrec.storage.ragged import Ragged

NUM_ITEMS = 12
TIES = np.arange(NUM_ITEMS)


class Flat:
    """Scores that know nothing, of as many rows as wanted."""

    name = "flat"

    def __init__(self, num_items: int = NUM_ITEMS) -> None:
        self.num_items = num_items

    def scores(self, histories: Ragged, domain: object) -> torch.Tensor:
        return torch.zeros(len(histories), self.num_items)


def ring() -> ItemGraphs:
    chain = [[i, (i + 1) % NUM_ITEMS] for i in range(NUM_ITEMS)] * 3
    return ItemGraphs(**count_arrows(Ragged.from_lists(chain), num_items=NUM_ITEMS, keep=5))


def after(steps: int) -> list[tuple[Ragged, np.ndarray, int]]:
    """Users at every place of the ring who go on by so many steps."""
    contexts = Ragged.from_lists([[i] for i in range(NUM_ITEMS)])
    return [(contexts, (np.arange(NUM_ITEMS) + steps) % NUM_ITEMS, 0)]


def test_the_bonus_is_added_to_the_rows_it_knows() -> None:
    graphs = ring()
    bonus = Bonus(graphs, tuple(float(i) for i in range(len(graphs.names))))
    contexts = Ragged.from_lists([[0, 3], []])
    expected = sum(w * path.toarray() for w, path in zip(bonus.weights, graphs.paths(contexts), strict=True))
    scores = BonusScorer(Flat(NUM_ITEMS + 2), bonus).scores(contexts, 0).numpy()
    np.testing.assert_allclose(scores[:, :NUM_ITEMS], expected, rtol=1e-5)
    assert not scores[:, NUM_ITEMS:].any()
    assert (expected >= 0).all()


def test_how_much_of_the_bonus_is_chosen_on_validation() -> None:
    bonus, table = tune_bonus(Flat(), ring(), after(1), tie_rank=TIES)
    assert max(bonus.weights) > 0
    assert max(table.values()) == 1.0
    assert set(table) == {f"{scale:g} of the bonus" for scale in SCALES}


def test_where_the_paths_only_mislead_there_is_no_bonus() -> None:
    # Nobody buys what the paths reach: no target is among what they could lift.
    bonus, table = tune_bonus(Flat(), ring(), after(6), tie_rank=TIES)
    assert not any(bonus.weights)
    assert max(table.values()) == table["0 of the bonus"]


def test_weights_are_those_of_a_conditional_logit() -> None:
    # With two candidates it is a logistic regression on the difference of their features.
    rng = np.random.default_rng(0)
    features = rng.normal(size=(4000, 2, 3)).astype(np.float32)
    true = np.array([2.0, 1.0, 3.0])
    utility = features @ true + rng.gumbel(size=(4000, 2))
    found = utility.argmax(1)
    ours = conditional_logit(features, found)
    difference = features[:, 1] - features[:, 0]
    theirs = LogisticRegression(fit_intercept=False, C=1e6).fit(difference, found).coef_[0]
    np.testing.assert_allclose(ours, theirs[1:] / theirs[0], rtol=0.01)


def test_no_weight_is_negative_and_absent_candidates_do_not_count() -> None:
    rng = np.random.default_rng(1)
    features = rng.random((500, 6, 3)).astype(np.float32)
    found = features[..., 2].argmin(1)  # whoever has the least of the second path
    features[:, 5, 0] = LOWEST
    found[found == 5] = -1
    weights = conditional_logit(features, found)
    assert weights[1] == 0
    assert np.isfinite(weights).all()
    changed = features.copy()
    changed[:, 5, 1:] = 9
    np.testing.assert_allclose(conditional_logit(changed, found), weights, atol=0.02)
    assert not conditional_logit(features, np.full(500, -1)).any()


@pytest.mark.parametrize("world", [2, 5])
def test_any_number_of_ranks_finds_the_same(world: int) -> None:
    contexts, targets, _ = after(1)[0]
    alone = tune_bonus(Flat(), ring(), after(1), tie_rank=TIES)
    meeting, table = Barrier(world), [torch.empty(0)] * world

    def rank_of(rank: int) -> tuple[Bonus, dict[str, float]]:
        def gather(tensor: torch.Tensor) -> list[torch.Tensor]:
            table[rank] = tensor
            meeting.wait()
            found = list(table)
            meeting.wait()
            return found

        mine = np.arange(NUM_ITEMS)[rank::world]
        batch = [(contexts.take(mine), targets[mine], 0)]
        return tune_bonus(Flat(), ring(), batch, tie_rank=TIES, gather=gather)

    with ThreadPoolExecutor(world) as pool:
        for bonus, shares in pool.map(rank_of, range(world)):
            assert shares == alone[1]
            assert bonus.weights == alone[0].weights


def test_the_domain_and_seen_items_are_no_candidates() -> None:
    allowed = np.ones(NUM_ITEMS, bool)
    allowed[1] = False
    bonus, table = tune_bonus(Flat(), ring(), after(1), tie_rank=TIES, allowed=allowed)
    assert max(table.values()) == pytest.approx(11 / 12)
    assert sp.issparse(bonus(Ragged.from_lists([[0]])))


def lists(rows: list[dict[int, float]]) -> sp.csr_matrix:
    dense = np.zeros((len(rows), NUM_ITEMS), np.float32)
    for number, row in enumerate(rows):
        for item, likeness in row.items():
            dense[number, item] = likeness
    return sp.csr_matrix(dense)


def test_an_appended_item_inherits_from_its_nearest_kin() -> None:
    near = [{(i + 5) % NUM_ITEMS: 0.5} for i in range(NUM_ITEMS)]
    graphs = ItemGraphs(
        ring().follows, ring().next, ring().together, {"dull": lists(near), "text": lists(near)}
    )
    grown = graphs.grown(
        {
            "dull": lists([{9: 0.9}, {4: 0.25}, {}, {2: 1.0}]),
            "text": lists([{1: 0.5, 6: 0.25}, {}, {}, {3: 0.1}]),
        }
    )
    weights = [1.0] * len(grown.names)
    weights[grown.names.index("dull")] = 0  # whatever its longer paths weigh
    weights[grown.names.index("follows>dull")] = 5
    contexts = Ragged.from_lists([[0], [3, 11], [8, 2, 7], []])
    own = sum(w * path.toarray() for w, path in zip(weights, grown.paths(contexts), strict=True))
    expected = own.copy()
    # Text is trusted more; the second item has none, the third is like nothing at all.
    for item, (kin, likeness) in {12: (1, 0.5), 13: (4, 0.25), 15: (3, 0.1)}.items():
        expected[:, item] = np.maximum(own[:, item], likeness * own[:, kin])
    bonus = Bonus(grown, tuple(weights))
    np.testing.assert_allclose(bonus(contexts).toarray(), expected, rtol=1e-5)
    assert (expected > own).any()
    assert (expected[:, 12:] == own[:, 12:]).any()
    before = Bonus(graphs, tuple(weights))(contexts).toarray()
    np.testing.assert_array_equal(bonus(contexts).toarray()[:, :NUM_ITEMS], before)
    # No view is trusted, or nothing was appended: nobody speaks for anybody.
    counted = [float(">" not in name and name in ("follows", "next", "together")) for name in grown.names]
    assert Bonus(grown, tuple(counted)).kin is None
    assert Bonus(graphs, tuple(weights)).kin is None
    none = {view: lists([]) for view in graphs.alike}
    np.testing.assert_array_equal(Bonus(graphs.grown(none), tuple(weights))(contexts).toarray(), before)
