"""Where stage 3 does its own differentiation or dropout: the same values and gradients as plain torch."""

from __future__ import annotations

import pytest
import torch

from qbrec.engine.candidates import Candidates
from qbrec.sequence.encoder import Dropout
from qbrec.sequence.objective import item_loss
from qbrec.sequence.packing import HiddenCodes


@pytest.mark.parametrize("repeated", [False, True])
def test_item_loss_has_the_gradient_of_the_plain_formula(repeated: bool) -> None:
    torch.manual_seed(0)
    levels, num_items, hidden = (5, 4), 12, 6
    codes = torch.stack([torch.randint(0, k, (num_items,)) for k in levels], 1)
    logits = [torch.randn(hidden, k, dtype=torch.float64, requires_grad=True) for k in levels]
    targets = torch.tensor([0, 3, 3, 11, 7, 5])
    drawn = torch.tensor([0, 1, 3, 3, 3, 6, 11]) if repeated else torch.arange(num_items)
    weights = 2.5 if repeated else 1.0
    first = torch.ones(len(drawn), dtype=torch.bool)
    first[1:] = drawn[1:] != drawn[:-1]
    copies = (drawn[:, None] == drawn).sum(1)
    ours = item_loss(
        logits,
        target_codes=codes[targets],
        target_rows=targets,
        candidate_codes=codes[drawn],
        candidate_rows=drawn,
        log_weight=torch.where(first, copies * weights, 0.0).double().log() if repeated else None,
    )
    scores = sum(z[:, codes[:, level]] for level, z in enumerate(logits))  # [hidden, N]
    own = scores.gather(1, targets[:, None])
    others = weights * scores.exp()[:, drawn] * (drawn != targets[:, None])
    plain = ((own.exp() + others.sum(1, keepdim=True)).log() - own).sum()
    torch.testing.assert_close(ours, plain)
    for a, b in zip(torch.autograd.grad(ours, logits), torch.autograd.grad(plain, logits), strict=True):
        torch.testing.assert_close(a, b)


def test_scores_far_apart_stay_finite() -> None:
    logits = [torch.tensor([[500.0, -500.0], [-500.0, 500.0]], requires_grad=True)]
    codes, rows = torch.tensor([[0], [1]]), torch.arange(2)
    loss = item_loss(
        logits,
        target_codes=codes[:1].expand(2, 1),
        target_rows=torch.zeros(2, dtype=torch.int64),
        candidate_codes=codes,
        candidate_rows=rows,
        log_weight=None,
    )
    assert float(loss.detach()) == pytest.approx(1000.0)
    assert torch.equal(torch.autograd.grad(loss, logits)[0], torch.tensor([[0.0, 0.0], [-1.0, 1.0]]))


def test_drawn_candidates_ascend_and_stand_for_the_pool() -> None:
    pool = torch.arange(100, 140)
    rows, log_weight = Candidates(pool, count=30, seed=1).draw(torch.tensor([3, 4]), epoch=0)
    assert log_weight is not None
    assert (rows[1:] >= rows[:-1]).all()
    assert len(torch.unique(rows)) < 30, "some row is drawn twice"
    assert float(log_weight.exp().sum()) == pytest.approx(40)
    values, counts = torch.unique(rows, return_counts=True)
    for row, count in zip(values.tolist(), counts.tolist(), strict=True):
        assert float(log_weight[rows == row].exp().sum()) == pytest.approx(count * 40 / 30)


def test_hidden_codes_are_found_by_level() -> None:
    mask = torch.tensor([[True, True], [False, False], [False, True], [True, True]])
    assert [items.tolist() for items in HiddenCodes.find(mask).items] == [[0, 3], [0, 2, 3]]
    none = HiddenCodes.find(torch.zeros(3, 2, dtype=torch.bool))
    assert [len(items) for items in none.items] == [0, 0]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_dropout_drops_its_share_and_keeps_the_mean(share: float) -> None:
    x = torch.full((999, 201), 2.0, requires_grad=True)
    dropout = Dropout(share)
    torch.manual_seed(4)
    y = dropout(x)
    assert float((y == 0).float().mean()) == pytest.approx(share, abs=0.005)
    assert float(y.mean()) == pytest.approx(2, rel=0.01)
    assert len(torch.unique(y)) == 1 + (share > 0)
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, y.detach() / 2)
    # Neighbours are dropped independently of each other, as are words and the places in them.
    kept = (y != 0).double().flatten()
    for lag in (1, 2, 4, 201):
        both = float((kept[lag:] * kept[:-lag]).mean())
        assert both == pytest.approx((1 - share) ** 2, abs=0.01)
    torch.manual_seed(4)
    assert torch.equal(dropout(x), y)
    assert not share or not torch.equal(dropout(x), y)
    assert torch.equal(dropout.eval()(x), x)
