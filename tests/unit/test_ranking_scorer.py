"""The factorised scorer against the written-out sum; metrics and validation by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from qbrec.errors import DataError
from qbrec.ranking import METRICS, FactorisedScorer, metrics_of_ranks, tie_rank, top_k, validation_metrics
from qbrec.ranking.validate import contexts_and_targets, validation_users
from qbrec.ranking.validate import test_users as users_with_test
from qbrec.storage.ragged import Ragged


class Codes:
    """A code scorer that answers with fixed random log-probabilities, by the last item of the history."""

    name = "codes"

    def __init__(self, num_items: int, *, levels: tuple[int, ...], seed: int = 0) -> None:
        table = torch.randn(
            num_items, len(levels), max(levels), generator=torch.Generator().manual_seed(seed)
        )
        for level, codes in enumerate(levels):
            table[:, level, codes:] = -torch.inf
        self.table = table.log_softmax(-1)

    def code_log_probs(self, histories: Ragged, domain: object) -> torch.Tensor:
        return self.table[torch.from_numpy(histories.values[histories.offsets[1:] - 1])]


def ids(num_items: int, levels: tuple[int, ...], seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([rng.integers(0, k, num_items) for k in levels], axis=1).astype(np.uint16)


@pytest.mark.parametrize("levels", [(5,), (7, 3), (4, 4, 4, 4), (300, 20, 300)])
@pytest.mark.parametrize("batch", [1, 4, 5, 33])
@pytest.mark.parametrize("chunk", [7, 1000])
def test_is_the_sum_of_log_probabilities(levels: tuple[int, ...], batch: int, chunk: int) -> None:
    num_items = 101
    codes, model = ids(num_items, levels), Codes(num_items, levels=levels)
    histories = Ragged.from_lists([[3, i] for i in range(batch)])
    found = FactorisedScorer(model, semantic_ids=codes, chunk_items=chunk).scores(histories, 0)
    log_probs = model.code_log_probs(histories, 0)
    for b in range(batch):
        for i in range(0, num_items, 9):
            expected = sum(log_probs[b, level, int(code)] for level, code in enumerate(codes[i]))
            assert found[b, i] == pytest.approx(float(expected), rel=1e-6)


def test_same_bits_in_any_batch_and_for_items_that_share_an_id() -> None:
    levels, num_items = (8, 8, 8), 5000  # many times more items than IDs: large buckets
    codes, model = ids(num_items, levels), Codes(num_items, levels=levels)
    histories = Ragged.from_lists([[i] for i in range(64)])
    scorer = FactorisedScorer(model, semantic_ids=codes, chunk_items=640)
    together = scorer.scores(histories, 0)
    assert torch.equal(together[:1], scorer.scores(histories.slice(0, 1), 0))
    assert torch.equal(together[7:17], scorer.scores(histories.slice(7, 17), 0))
    _, bucket = np.unique(codes, axis=0, return_inverse=True)
    for b in (0, 63):
        best = np.full(bucket.max() + 1, -np.inf, np.float32)
        np.maximum.at(best, bucket, together[b].numpy())
        assert (together[b].numpy() == best[bucket]).all()


def test_a_bucket_is_read_by_popularity_then_row() -> None:
    codes = np.array([[0], [1], [0], [0]], np.uint8)
    model = Codes(4, levels=(2,))
    model.table[:] = torch.tensor([-0.1, -3.0])
    rows, _ = top_k(
        FactorisedScorer(model, semantic_ids=codes).scores(Ragged.from_lists([[0]]), 0),
        4,
        tie_rank=tie_rank(np.array([1, 9, 1, 2])),
    )
    assert rows.tolist() == [[3, 0, 2, 1]]


def test_ids_of_another_model() -> None:
    model = Codes(10, levels=(4, 4))
    for wrong in (ids(10, (4, 4, 4)), np.full((10, 2), 4, np.uint8)):
        with pytest.raises(DataError, match="do not fit"):
            FactorisedScorer(model, semantic_ids=wrong).scores(Ragged.from_lists([[0]]), 0)


def test_metrics_by_definition() -> None:
    ranks = np.array([1, 2, 5, 10, 11, 20, 21, 5000])
    values = dict(zip(METRICS, metrics_of_ranks(ranks).T, strict=True))
    assert values["hr@1"].sum() == 1
    assert values["hr@10"].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    assert values["ndcg@5"][1] == pytest.approx(1 / np.log2(3))
    assert values["ndcg@10"][4] == 0
    assert values["ndcg@20"][5] == pytest.approx(1 / np.log2(21))
    assert values["mrr"][7] == pytest.approx(1 / 5000)


def histories_of(lists: list[list[int]], cuts: list[tuple[int, int]]) -> SimpleNamespace:
    return SimpleNamespace(
        rows=Ragged.from_lists(lists),
        cut=np.array(cuts, np.int32),
        domain=np.zeros(len(lists), np.uint8),
    )


def test_who_has_a_target() -> None:
    # leave-one-out; train only; global-time splits: all of it test, no validation, nothing before the test
    data = histories_of(
        [[1, 2, 3], [1, 2], [4, 5], [1, 2, 3, 4], [1, 2, 3]], [(1, 2), (2, 2), (0, 1), (2, 2), (0, 0)]
    )
    assert validation_users(data.cut).tolist() == [0]
    assert users_with_test(data).tolist() == [0, 2, 3]
    contexts, targets = contexts_and_targets(data, np.array([3, 0]), part=1)
    assert [contexts.row(i).tolist() for i in range(2)] == [[1, 2], [1, 2]]
    assert targets.tolist() == [3, 3]


def test_validation_is_the_same_for_any_world_and_batch() -> None:
    rng = np.random.default_rng(0)
    num_items, levels = 60, (6, 6)
    lists = [rng.permutation(num_items)[: rng.integers(3, 12)].tolist() for _ in range(57)]
    data = histories_of(lists, [(len(x) - 2, len(x) - 1) for x in lists])
    scorer = FactorisedScorer(Codes(num_items, levels=levels), semantic_ids=ids(num_items, levels))
    ties = tie_rank(rng.integers(0, 9, num_items))
    allowed = rng.random(num_items) < 0.9
    options = {"tie_rank": ties, "allowed": allowed, "max_users": 40, "seed": 3}
    alone = validation_metrics(scorer, data, **options)
    assert alone["num_users"] == 40
    total = torch.zeros(len(METRICS) + 1, dtype=torch.float64)
    for rank in range(3):
        share: list[torch.Tensor] = []
        validation_metrics(
            scorer,
            data,
            **options,
            rank=rank,
            world=3,
            batch_users=4,
            all_reduce=lambda t, s=share: s.append(t.clone()),
        )
        total += share[0]
    assert total[-1] == 40
    assert (total[:-1] / 40).tolist() == pytest.approx([alone[m] for m in METRICS])
    everybody = validation_metrics(scorer, data, tie_rank=ties)
    assert everybody["num_users"] == 57
    # by hand: the place of the target among the unseen, all scores sorted
    gains = []
    for items in lists:
        scores = scorer.scores(Ragged.from_lists([items[:-2]]), 0)[0].numpy()
        order = [i for i in np.lexsort((ties, -scores)) if i not in items[:-2]]
        place = order.index(items[-2]) + 1
        gains.append(1 / np.log2(place + 1) if place <= 10 else 0.0)
    assert everybody["ndcg@10"] == pytest.approx(np.mean(gains))


def test_validation_without_targets_is_zero() -> None:
    scorer = FactorisedScorer(Codes(3, levels=(2,)), semantic_ids=ids(3, (2,)))
    found = validation_metrics(scorer, histories_of([[0, 1]], [(2, 2)]), tie_rank=np.arange(3))
    assert set(found.values()) == {0.0}
