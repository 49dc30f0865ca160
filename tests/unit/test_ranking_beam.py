"""Beam search over existing IDs against plain Python, brute force and the encoder."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qbrec.config.stages import SequenceConfig
from qbrec.errors import DataError
from qbrec.ranking import beam, tie_rank, top_k
from qbrec.ranking.beam import AutoregressiveScorer, BeamSearch
from qbrec.ranking.code_index import CodeIndex
from qbrec.ranking.kernels import native  # noqa: F401 - loaded, it serves small catalogues too
from qbrec.sequence.encoder import SequenceEncoder
from qbrec.sequence.recommender import SequenceRecommender
from qbrec.sequence.vocabulary import Vocabulary
from qbrec.storage.ragged import Ragged

LAYOUTS = ((9,), (5, 300), (6, 4, 5), (3, 4, 3, 4, 2))


class Prefixes:
    """A prefix scorer that answers with numbers drawn from a hash of history and prefix."""

    name = "prefixes"

    def __init__(self, levels: tuple[int, ...], *, ties: bool = False) -> None:
        self.levels, self.ties = levels, ties

    def row(self, history: np.ndarray, prefix: np.ndarray) -> np.ndarray:
        rng = np.random.default_rng([*history.tolist(), 99, *prefix.tolist()])
        scores = rng.standard_normal(self.levels[len(prefix)]).astype(np.float32)
        return scores.round() if self.ties else scores

    def next_code_log_probs(self, histories: Ragged, domain: object, prefixes: np.ndarray) -> torch.Tensor:
        rows = [[self.row(histories.row(b), prefix) for prefix in prefixes[b]] for b in range(len(histories))]
        return torch.from_numpy(np.array(rows, np.float32)).reshape(*prefixes.shape[:2], -1)


def catalogue(levels: tuple[int, ...], items: int = 150) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(len(levels))
    codes = np.stack([rng.zipf(1.2, items) % k for k in levels], 1).astype(np.uint16)
    return codes, tie_rank(rng.integers(0, 4, items))


HISTORIES = Ragged.from_lists([[3], [1, 2, 3], [7, 7], [9, 4]])


@pytest.fixture(params=["kernels", "tensors"])
def _either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With numba, and as if it were not installed."""
    if request.param == "tensors":
        monkeypatch.setattr(beam, "native_kernels", lambda num_items: None)


def plain_beams(
    scorer: Prefixes, codes: np.ndarray, history: np.ndarray, width: int
) -> list[tuple[float, tuple[int, ...]]]:
    """Beams of one history in plain Python."""
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    for length in range(1, codes.shape[1] + 1):
        exist = sorted({tuple(c[:length].tolist()) for c in codes})
        sums = {prefix: score for score, prefix in best}
        found = []
        for prefix in exist:
            if prefix[:-1] in sums:
                row = scorer.row(history, np.array(prefix[:-1], np.int64))
                found.append((float(np.float32(sums[prefix[:-1]]) + row[prefix[-1]]), prefix))
        best = sorted(found, key=lambda pair: (-pair[0], pair[1]))[:width]
    return best


@pytest.mark.usefixtures("_either")
@pytest.mark.parametrize("levels", LAYOUTS)
@pytest.mark.parametrize("width", [1, 4, 1000])
@pytest.mark.parametrize("ties", [False, True])
def test_beams_equal_plain_python(levels: tuple[int, ...], width: int, ties: bool) -> None:
    codes, order = catalogue(levels)
    scorer, index = Prefixes(levels, ties=ties), CodeIndex.build(codes, tie_rank=order)
    allowed = np.arange(len(codes)) % 3 > 0
    for part in (index, index.only(allowed)):
        search = BeamSearch(part, beam=width)
        beams = search.start(len(HISTORIES))
        for _ in levels:
            beams = search.step(beams, scorer.next_code_log_probs(HISTORIES, 0, beams.codes.numpy()))
        kept = codes if part is index else codes[allowed]
        for b in range(len(HISTORIES)):
            expected = plain_beams(scorer, kept, HISTORIES.row(b), width)
            there = beams.nodes[b] >= 0
            assert [tuple(c) for c in beams.codes[b, there].tolist()] == [prefix for _, prefix in expected]
            assert beams.scores[b, there].tolist() == [score for score, _ in expected]
            assert (beams.scores[b, ~there] == -torch.inf).all()


@pytest.mark.usefixtures("_either")
@pytest.mark.parametrize("levels", LAYOUTS)
@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("k", [1, 20, 150])
def test_a_beam_of_all_prefixes_is_brute_force(levels: tuple[int, ...], filtered: bool, k: int) -> None:
    codes, order = catalogue(levels)
    scorer, index = Prefixes(levels, ties=True), CodeIndex.build(codes, tie_rank=order)
    seen = Ragged.from_lists([[0, 5, 5], [], list(range(100)), [149]])
    allowed = np.arange(len(codes)) % 2 == 0
    scores = AutoregressiveScorer(scorer, index=index, chunk_prefixes=7).scores(HISTORIES, 0)
    for b, item in ((0, 4), (3, 77)):  # the definition itself
        rows = [
            scorer.row(HISTORIES.row(b), codes[item, :length].astype(int)) for length in range(len(levels))
        ]
        total = np.float32(0)
        for row, code in zip(rows, codes[item], strict=True):
            total += row[code]
        assert float(scores[b, item]) == float(total)
    expected = top_k(scores, k, tie_rank=order, exclude=seen, allowed=allowed if filtered else None)
    part = index.only(allowed) if filtered else index
    found = BeamSearch(part, beam=10_000).search(scorer, HISTORIES, 0, k, exclude=seen)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.usefixtures("_either")
def test_nothing_allowed_and_impossible_codes() -> None:
    codes, order = catalogue((4, 4, 4))
    index = CodeIndex.build(codes, tie_rank=order)
    nothing = index.only(np.zeros(len(codes), bool))
    rows, scores = BeamSearch(nothing, beam=5).search(Prefixes((4, 4, 4)), HISTORIES, 0, 3)
    assert (rows == -1).all()
    assert (scores == -torch.inf).all()
    # A log-probability of -inf is a score like any other: such items come last, but they come.
    search = BeamSearch(index, beam=1000)
    beams = search.start(1)
    for _ in range(3):
        beams = search.step(beams, torch.full((1, beams.nodes.shape[1], 4), -torch.inf))
    rows, _ = search.items(beams, len(codes))
    assert sorted(rows[0].tolist()) == list(range(len(codes)))


@pytest.mark.usefixtures("_either")
def test_what_is_refused() -> None:
    codes, order = catalogue((4, 4, 4))
    index = CodeIndex.build(codes, tie_rank=order)
    search = BeamSearch(index, beam=5)
    with pytest.raises(DataError, match="level 0 has codes up to"):
        search.step(search.start(1), torch.zeros(1, 1, 2))
    with pytest.raises(DataError, match="NaN"):
        search.step(search.start(1), torch.full((1, 1, 4), torch.nan))


def test_brute_force_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    codes, order = catalogue((4, 4, 4))
    monkeypatch.setattr(beam, "MAX_PREFIXES", 10)
    scorer = AutoregressiveScorer(Prefixes((4, 4, 4)), index=CodeIndex.build(codes, tie_rank=order))
    with pytest.raises(DataError, match="evaluations of the model"):
        scorer.scores(HISTORIES, 0)


def encoder(levels: tuple[int, ...]) -> SequenceEncoder:
    torch.manual_seed(0)
    config = SequenceConfig(width=16, layers=2, heads=2, dropout=0.0, max_items=6)
    return SequenceEncoder(config, Vocabulary(levels, ("one", "two"))).eval()


def test_encoder_as_prefix_scorer(monkeypatch: pytest.MonkeyPatch) -> None:
    levels = (7, 5, 3)
    codes = np.stack([np.random.default_rng(k).integers(0, k, 40) for k in levels], 1).astype(np.uint8)
    recommender = SequenceRecommender(encoder(levels), semantic_ids=codes)
    rows = Ragged.from_lists([[3, 1, 4, 1, 5, 9, 2, 6], [], [8, 99], [2, 7, 1]])
    domain = np.array([0, 1, 1, 0])
    nothing = np.zeros((4, 1, 0), np.int64)
    whole = recommender.code_log_probs(rows, domain)
    first = recommender.next_code_log_probs(rows, domain, nothing)[:, 0]
    torch.testing.assert_close(first, whole[:, 0, :7], atol=1e-5, rtol=1e-5)
    prefixes = np.stack([codes[:30, :2].reshape(10, 3, 2)[b : b + 3].reshape(9, 2) for b in range(4)]).astype(
        int
    )
    together = recommender.next_code_log_probs(rows, domain, prefixes)
    assert together.shape == (4, 9, 3)
    torch.testing.assert_close(together.exp().sum(-1), torch.ones(4, 9), atol=1e-5, rtol=1e-5)
    assert (together[:, 0] - together[:, 1]).abs().max() > 1e-4  # the prefix is read
    monkeypatch.setattr("qbrec.sequence.recommender._CHUNK", 5)
    torch.testing.assert_close(
        recommender.next_code_log_probs(rows, domain, prefixes), together, atol=1e-5, rtol=1e-5
    )
    # By hand: an item with those codes at the end of the history, its last level hidden.
    grown = np.concatenate([codes, np.array([[*prefixes[3, 4], 0]], np.uint8)])
    alone = SequenceRecommender(recommender.module, semantic_ids=grown)
    batch, last = alone._batch(Ragged.from_lists([[2, 7, 1]]), np.zeros(1, np.int64))
    from dataclasses import replace

    from qbrec.sequence.packing import HiddenCodes

    placed = batch.codes.clone()
    placed[last] = torch.from_numpy(grown[-1].astype(np.int64))
    mask = torch.zeros_like(placed, dtype=torch.bool)
    mask[last, 2] = True
    with torch.no_grad():
        scores = recommender.module(replace(batch, codes=placed), HiddenCodes.find(mask))[2]
    torch.testing.assert_close(scores.log_softmax(-1)[0], together[3, 4], atol=1e-5, rtol=1e-5)


def test_encoder_decodes_like_brute_force() -> None:
    levels = (7, 5, 3)
    codes = np.stack([np.random.default_rng(k).integers(0, k, 40) for k in levels], 1).astype(np.uint8)
    recommender = SequenceRecommender(encoder(levels), semantic_ids=codes)
    rows, order = Ragged.from_lists([[3, 1, 4], [5], [9, 2, 6, 5, 3, 5, 8]]), np.arange(40)
    index = CodeIndex.build(codes, tie_rank=order)
    scores = AutoregressiveScorer(recommender, index=index).scores(rows, 0)
    found = BeamSearch(index, beam=100).search(recommender, rows, 0, 10, exclude=rows)
    expected = top_k(scores, 10, tie_rank=order, exclude=rows)
    torch.testing.assert_close(found[1], expected[1], atol=1e-5, rtol=1e-5)
    # Rounding may differ between batches of the model, so items within 1e-5 of each other may change places.
    torch.testing.assert_close(scores.gather(1, found[0]), expected[1], atol=1e-4, rtol=1e-4)
