"""Vocabulary and masks of stage 3."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qbrec.config.stages import MaskConfig
from qbrec.errors import DataError
from qbrec.sequence.masks import draw_masks, prefix_lengths, uniform
from qbrec.sequence.vocabulary import Vocabulary, format_semantic_id

LEVELS = 4


def config(kind: str, **changes: object) -> MaskConfig:
    mixture = {name: float(name == kind) for name in ("span", "tail", "multi_region")}
    return MaskConfig(**{**mixture, "partial": 0.0, **changes})


def draw(
    lengths: list[int], masks: MaskConfig, *, seed: int = 3, epoch: int = 0, first: int = 0
) -> list[np.ndarray]:
    sizes = torch.tensor(lengths)
    samples = torch.arange(first, first + len(lengths))
    hidden = draw_masks(sizes, samples, masks, num_levels=LEVELS, seed=seed, epoch=epoch)
    return [part.numpy() for part in hidden.split(lengths)]


def test_vocabulary_gives_every_token_its_own_id() -> None:
    vocabulary = Vocabulary((3, 5, 2), ("pets", "games"))
    ids = [vocabulary.pad, vocabulary.mask]
    for level, num_codes in enumerate(vocabulary.levels):
        codes = torch.zeros(num_codes, 3, dtype=torch.int64)
        codes[:, level] = torch.arange(num_codes)
        ids += vocabulary.tokens(codes)[:, level].tolist()
    ids += vocabulary.domain_tokens(torch.arange(2)).tolist()
    assert ids == list(range(vocabulary.size))
    names = [vocabulary.name(token) for token in ids]
    assert len(set(names)) == vocabulary.size
    assert names[:3] == ["<pad>", "<mask>", "<a_0>"]
    assert names[5] == "<b_0>"
    assert names[-1] == "<domain:games>"
    assert format_semantic_id([12, 7]) == "<a_12><b_7>"
    with pytest.raises(ValueError, match="outside"):
        vocabulary.name(vocabulary.size)


@pytest.mark.parametrize(
    ("levels", "domains"), [((), ("a",)), ((4, 0), ("a",)), ((4,), ()), ((4,), ("a", "a"))]
)
def test_vocabulary_refuses_what_cannot_be(levels: tuple[int, ...], domains: tuple[str, ...]) -> None:
    with pytest.raises(DataError):
        Vocabulary(levels, domains)


def test_uniform_numbers_are_uniform_and_independent_of_each_other() -> None:
    samples = torch.arange(40_000)
    base = {"seed": (1 << 63) - 5, "epoch": 7, "purpose": 2}
    draws = [uniform(samples, **base, index=index) for index in range(3)]
    draws += [
        uniform(samples, **{**base, key: value}) for key, value in (("seed", 4), ("epoch", 8), ("purpose", 3))
    ]
    for u in draws:
        assert float(u.min()) >= 0
        assert float(u.max()) < 1
        counts = np.histogram(u.numpy(), bins=20, range=(0, 1))[0]
        assert ((counts - 2000) ** 2 / 2000).sum() < 60  # chi-square, 19 degrees of freedom
    assert np.abs(np.corrcoef(torch.stack(draws).numpy()) - np.eye(len(draws))).max() < 0.03
    neighbours = np.corrcoef(draws[0][:-1].numpy(), draws[0][1:].numpy())[0, 1]
    assert abs(neighbours) < 0.03


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=30),
    st.sampled_from(["span", "tail", "multi_region"]),
    st.integers(0, 1000),
    st.floats(0.0, 1.0),
)
def test_each_sample_is_masked_as_if_it_were_alone(
    lengths: list[int], kind: str, epoch: int, ratio: float
) -> None:
    masks = config(kind, partial=0.3, ratio=ratio)
    together = draw(lengths, masks, epoch=epoch)
    for index, length in enumerate(lengths):
        alone = draw([length], masks, epoch=epoch, first=index)[0]
        np.testing.assert_array_equal(together[index], alone)
        assert alone.any()
        # Whole items or their deeper levels: once hidden, every deeper level is hidden too.
        assert (alone[:, 1:] >= alone[:, :-1]).all()


def test_tail_hides_the_last_item_and_nothing_else() -> None:
    for length, hidden in zip([1, 2, 9], draw([1, 2, 9], config("tail")), strict=True):
        expected = np.zeros((length, LEVELS), bool)
        expected[-1] = True
        np.testing.assert_array_equal(hidden, expected)


def test_multi_region_hides_separate_items() -> None:
    for epoch in range(20):
        for hidden in draw([4, 5, 7, 10, 33, 50], config("multi_region", ratio=0.3), epoch=epoch):
            items = hidden[:, 0]
            assert not (items[1:] & items[:-1]).any()
            assert items.sum() == max(2, round(0.3 * len(items)))


def test_every_position_is_hidden_at_times() -> None:
    for kind in ("span", "multi_region"):
        rate = np.mean(
            [draw([8] * 200, config(kind, ratio=0.25), epoch=epoch) for epoch in range(5)], (0, 1)
        )[:, 0]
        assert (rate > 0.05).all(), (kind, rate)


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.6])
def test_spans_hide_the_configured_share_in_runs(ratio: float) -> None:
    hidden = np.stack(draw([50] * 2000, config("span", ratio=ratio)))[:, :, 0]
    assert abs(hidden[:, 10:].mean() - ratio) < 0.03
    singles = np.stack(draw([50] * 2000, config("span", ratio=ratio, max_span=1)))[:, :, 0]
    assert abs(singles.mean() - ratio) < 0.03
    # Runs: a hidden item's neighbour is hidden far more often than at random.
    assert hidden[:, 1:][hidden[:, :-1]].mean() > singles[:, 1:][singles[:, :-1]].mean() + 0.1


def test_mixture_and_partial_levels_follow_the_configuration() -> None:
    masks = MaskConfig(span=0.0, tail=0.5, multi_region=0.5, partial=0.25)
    drawn = np.stack(draw([10] * 4000, masks))
    is_tail = drawn[:, :, -1].sum(1) == 1
    assert abs(is_tail.mean() - 0.5) < 0.03
    tails = drawn[is_tail, -1]
    assert abs((~tails[:, 0]).mean() - 0.25) < 0.03
    first_levels = tails[~tails[:, 0]].argmax(1)
    assert set(first_levels.tolist()) == {1, 2, 3}


def test_epochs_and_seeds_draw_anew() -> None:
    masks = config("multi_region")
    base = np.concatenate(draw([20] * 50, masks))
    assert (base != np.concatenate(draw([20] * 50, masks, epoch=1))).any()
    assert (base != np.concatenate(draw([20] * 50, masks, seed=4))).any()


def test_one_level_has_no_deeper_one() -> None:
    hidden = draw_masks(
        torch.tensor([5, 6]), torch.arange(2), config("tail", partial=1.0), num_levels=1, seed=0, epoch=0
    )
    assert hidden.shape == (11, 1)
    assert hidden.sum() == 2


def test_prefixes_reach_every_length_and_spare_the_rest() -> None:
    lengths = torch.full((6000,), 7)
    cut = prefix_lengths(lengths, torch.arange(6000), seed=1, epoch=2, probability=0.6)
    counts = np.bincount(cut.numpy(), minlength=8)
    assert counts[:2].sum() == 0
    np.testing.assert_allclose(counts[2:7] / 6000, 0.1, atol=0.02)
    np.testing.assert_allclose(counts[7] / 6000, 0.5, atol=0.03)
    short = torch.tensor([1, 2])
    assert prefix_lengths(short, torch.arange(2), seed=1, epoch=0, probability=1.0).tolist() == [1, 2]
    assert prefix_lengths(lengths, torch.arange(6000), seed=1, epoch=2, probability=0.0).eq(7).all()
