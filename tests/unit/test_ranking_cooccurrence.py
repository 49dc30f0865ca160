"""The co-occurrence bonus against plain Python, and the choice of its weight."""

from __future__ import annotations

import math

import numpy as np
import torch

from qbrec.ranking.cooccurrence import BonusScorer, Neighbours, co_occurrence, tune_bonus
from qbrec.storage.ragged import Ragged

NUM_ITEMS = 12


def _histories(seed: int, users: int = 30) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, NUM_ITEMS, rng.integers(1, 15)).tolist() for _ in range(users)]


def _brute_co(histories: list[list[int]]) -> np.ndarray:
    co = np.zeros((NUM_ITEMS, NUM_ITEMS))
    for row in histories:
        for a in range(len(row)):
            for b in range(a + 1, min(a + 11, len(row))):
                if row[a] != row[b]:
                    weight = 1 / ((b - a) * math.log(2 + len(row)))
                    co[row[a], row[b]] += weight
                    co[row[b], row[a]] += weight / 2
    return co


def _brute_bonus(histories: list[list[int]], query: list[int], *, decay: float, keep: int) -> np.ndarray:
    counts = np.bincount(np.concatenate(histories), minlength=NUM_ITEMS) + 1.0
    matrix = _brute_co(histories) / np.sqrt(counts)[:, None] / counts**0.1
    for row in matrix:
        row[np.argsort(-row, kind="stable")[keep:]] = 0
    found = np.zeros(NUM_ITEMS)
    for age, item in enumerate(reversed(query[-20:])):
        found += decay**age * matrix[item]
    return np.log1p(10 * found / found[found > 0].mean()) if (found > 0).any() else found


class _Flat:
    """Scores that know nothing."""

    name = "flat"

    def scores(self, histories: Ragged, domain: object) -> torch.Tensor:
        return torch.zeros(len(histories), NUM_ITEMS)


def test_co_occurrence_and_bonus_equal_brute_force() -> None:
    histories, queries = _histories(0), _histories(1, users=9)
    ragged = Ragged.from_lists(histories)
    np.testing.assert_allclose(
        co_occurrence(ragged, num_items=NUM_ITEMS).toarray(), _brute_co(histories), rtol=1e-5
    )
    for keep in (3, NUM_ITEMS):
        neighbours = Neighbours.fit(ragged, num_items=NUM_ITEMS, keep=keep)
        bonus = neighbours.bonus(Ragged.from_lists(queries)).toarray()
        for row, query in zip(bonus, queries, strict=True):
            np.testing.assert_allclose(row, _brute_bonus(histories, query, decay=0.6, keep=keep), rtol=1e-4)


def test_the_bonus_is_added_and_survives_the_disk_form() -> None:
    ragged, queries = Ragged.from_lists(_histories(0)), Ragged.from_lists(_histories(2, users=5))
    fitted = Neighbours.fit(ragged, num_items=NUM_ITEMS, keep=5)
    kept = Neighbours.from_arrays(fitted.arrays(), weight=2.0, decay=0.8)
    scores = BonusScorer(_Flat(), kept).scores(queries, 0)
    np.testing.assert_allclose(scores.numpy(), 2.0 * kept.bonus(queries).toarray(), rtol=1e-6)
    assert (scores >= 0).all()


def test_an_empty_history_and_an_unknown_follower_get_nothing() -> None:
    fitted = Neighbours.fit(Ragged.from_lists([[0, 1], [2]]), num_items=NUM_ITEMS, keep=5)
    assert fitted.bonus(Ragged.from_lists([[], [2]])).nnz == 0


def test_the_weight_is_chosen_on_validation() -> None:
    chain = [[i, (i + 1) % NUM_ITEMS] for i in range(NUM_ITEMS)] * 3
    fitted = Neighbours.fit(Ragged.from_lists(chain), num_items=NUM_ITEMS, keep=5)
    contexts = Ragged.from_lists([[i] for i in range(NUM_ITEMS)])
    ties = np.arange(NUM_ITEMS)
    follow = np.array([(i + 1) % NUM_ITEMS for i in range(NUM_ITEMS)])
    chosen, table = tune_bonus(_Flat(), fitted, [(contexts, follow, np.zeros(NUM_ITEMS))], tie_rank=ties)
    assert chosen.weight > 0
    assert table[f"weight {chosen.weight:g} decay {chosen.decay:g}"] == max(table.values()) == 1.0
    # Where followers only mislead, the bonus is switched off.
    away = np.array([(i + 6) % NUM_ITEMS for i in range(NUM_ITEMS)])
    assert tune_bonus(_Flat(), fitted, [(contexts, away, np.zeros(NUM_ITEMS))], tie_rank=ties)[0].weight == 0
