from __future__ import annotations

import math

import pytest
import torch

from qbrec.fusion.loss import FUSED, GroupViews, count_anchors, multi_view_loss, pair_weights, view_pairs
from qbrec.fusion.model import ModalitySpec

SPECS = (
    ModalitySpec("image", "dense", 4),
    ModalitySpec("text", "dense", 4),
    ModalitySpec("structure", "bag", 9),
    ModalitySpec("behaviour", "dense", 4),
)
PAIRS = view_pairs(SPECS)
WEIGHTS = pair_weights(SPECS, PAIRS, behaviour=3.0, cross=0.5)


def _group(size: int = 12, seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    present = torch.rand(size, 4, generator=g) > 0.3
    content = torch.randint(0, 5, (size, 4), generator=g)
    return {
        "fused": torch.randn(size, 8, generator=g),
        "views": torch.randn(4, size, 8, generator=g) * present.T[..., None],
        "present": present,
        "content": content,
    }


def _loss(
    group: dict[str, torch.Tensor], weights: tuple[float, ...] = WEIGHTS
) -> tuple[torch.Tensor, torch.Tensor]:
    whole = _views(group, slice(None))
    return multi_view_loss(whole, whole, first=0, pairs=PAIRS, weights=weights, temperature=0.2)


def _views(group: dict[str, torch.Tensor], part: slice) -> GroupViews:
    vectors = torch.cat([group["views"], group["fused"][None]])
    return GroupViews(vectors[:, part], group["present"][part], group["content"][part])


def _brute(group: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Anchor by anchor, from the definition."""
    total, count = 0.0, 0.0
    vector = lambda v, i: group["fused"][i] if v == FUSED else group["views"][v, i]  # noqa: E731
    have = lambda v, i: v == FUSED or bool(group["present"][i, v])  # noqa: E731
    for (left, right), weight in zip(PAIRS, WEIGHTS, strict=True):
        items = [i for i in range(len(group["fused"])) if have(left, i) and have(right, i)]
        count += weight * len(items)
        for i in items:
            for a, b in ((left, right), (right, left)):
                others = [
                    j
                    for j in items
                    if j != i
                    and not any(
                        v != FUSED and group["content"][i, v] == group["content"][j, v] for v in (a, b)
                    )
                ]
                score = lambda j, a=a, b=b, i=i: math.exp(  # noqa: E731
                    float(torch.cosine_similarity(vector(a, i), vector(b, j), dim=0)) / 0.2
                )
                total -= weight * 0.5 * math.log(score(i) / (score(i) + sum(score(j) for j in others)))
    return total, count


@pytest.mark.parametrize("seed", range(4))
def test_loss_is_the_definition(seed: int) -> None:
    group = _group(seed=seed)
    total, _ = _loss(group)
    expected, count = _brute(group)
    assert float(total) == pytest.approx(expected, rel=1e-5)
    assert float(count_anchors(group["present"], pairs=PAIRS, weights=WEIGHTS)) == pytest.approx(count)


def test_pairs_and_weights() -> None:
    assert PAIRS == ((FUSED, 0), (FUSED, 1), (FUSED, 2), (FUSED, 3), (0, 1), (0, 3), (1, 3))
    assert WEIGHTS == (1.0, 1.0, 1.0, 3.0, 0.5, 0.5, 0.5)


def test_per_pair_sums_are_unweighted() -> None:
    total, parts = _loss(_group())
    assert float(total) == pytest.approx(
        sum(w * float(p) for w, p in zip(WEIGHTS, parts, strict=True)), rel=1e-5
    )


def test_absent_views_have_no_influence() -> None:
    group = _group()
    changed = {**group, "views": group["views"].clone(), "content": group["content"].clone()}
    changed["views"][~group["present"].T] = 100.0
    changed["content"][~group["present"]] = -3
    torch.testing.assert_close(_loss(changed), _loss(group))


def test_order_does_not_matter() -> None:
    group = _group()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    moved = {k: v[:, order] if k == "views" else v[order] for k, v in group.items()}
    torch.testing.assert_close(_loss(moved)[0], _loss(group)[0])


def test_an_item_alone_costs_nothing_and_gradients_stay_finite() -> None:
    group = _group()
    group["present"] = torch.zeros_like(group["present"])
    group["present"][4] = True
    group["fused"].requires_grad_()
    total, _ = _loss(group)
    total.backward()
    assert float(total.detach()) == 0.0
    assert torch.isfinite(group["fused"].grad).all()


def test_equal_content_is_no_negative() -> None:
    group = _group()
    group["content"][:] = 1
    assert float(_loss(group)[0]) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("cut", [1, 5, 6])
def test_parts_of_a_group_add_up_to_its_loss_and_gradient(cut: int) -> None:
    results = []
    for parts in ([slice(0, 12)], [slice(0, cut), slice(cut, 12)]):
        group = _group(seed=2)
        group["fused"].requires_grad_()
        whole = _views(group, slice(None))
        total = torch.zeros(())
        for part in parts:
            own = _views(group, part)
            loss, _ = multi_view_loss(
                own, whole, first=part.start, pairs=PAIRS, weights=WEIGHTS, temperature=0.2
            )
            total = total + loss
        total.backward()
        results.append((total.detach(), group["fused"].grad))
    torch.testing.assert_close(results[1], results[0])
