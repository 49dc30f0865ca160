"""Packing, encoder, loss and recommender of stage 3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from qbrec.config.stages import MaskConfig, SequenceConfig
from qbrec.engine.candidates import Candidates
from qbrec.errors import DataError
from qbrec.ranking.scorer import FactorisedScorer
from qbrec.sequence.encoder import Block, SequenceEncoder
from qbrec.sequence.masks import draw_masks
from qbrec.sequence.objective import item_loss
from qbrec.sequence.packing import HiddenCodes, PackedHistories, pack, token_layout
from qbrec.sequence.recommender import SequenceRecommender, load_encoder, save_encoder
from qbrec.sequence.tasks import HistoryCollate, MaskedTask
from qbrec.sequence.vocabulary import Vocabulary
from qbrec.storage.artifact import ArtifactStore
from qbrec.storage.ragged import Ragged

LEVELS = (7, 5, 3)
IDS = np.stack([np.random.default_rng(level).integers(0, k, 40) for level, k in enumerate(LEVELS)], 1).astype(
    np.uint8
)


def encoder(**changes: Any) -> SequenceEncoder:
    torch.manual_seed(1)
    config = SequenceConfig(
        **{"width": 16, "layers": 2, "heads": 2, "dropout": 0.0, "max_items": 9, **changes}
    )
    return SequenceEncoder(config, Vocabulary(LEVELS, ("one", "two"))).eval()


def histories(lengths: list[int], seed: int = 0) -> Ragged:
    rng = np.random.default_rng(seed)
    return Ragged.from_lengths(rng.integers(0, len(IDS), sum(lengths)), np.array(lengths, dtype=np.int64))


def packed(rows: Ragged, domains: list[int] | None = None) -> tuple[PackedHistories, np.ndarray]:
    batch, order = pack(
        rows, domains=np.array(domains or [0] * len(rows), dtype=np.int64), samples=np.arange(len(rows))
    )
    return batch.to("cpu", torch.from_numpy(IDS)), order


def masked_task(module: SequenceEncoder, **changes: Any) -> MaskedTask:
    settings = {"candidates": Candidates(torch.arange(len(IDS)), count=100, seed=0), "seed": 0, **changes}
    return MaskedTask(module, semantic_ids=IDS, **settings)


def masks_for(batch: PackedHistories, **changes: Any) -> torch.Tensor:
    return draw_masks(
        batch.lengths, batch.samples, MaskConfig(**changes), num_levels=len(LEVELS), seed=0, epoch=0
    )


def test_layout_is_domain_token_then_items() -> None:
    lengths = torch.tensor([1, 2, 2])
    layout = token_layout(lengths, num_items=5, num_levels=3)
    assert layout.domain_tokens.tolist() == [0, 4, 11]
    assert layout.item_tokens.tolist() == [[1, 2, 3], [5, 6, 7], [8, 9, 10], [12, 13, 14], [15, 16, 17]]
    assert layout.age.tolist() == [0, 1, 0, 1, 0]
    assert layout.num_tokens == 18


@pytest.mark.parametrize("position", ["learned", "rotary"])
def test_packed_histories_do_not_see_each_other(position: str) -> None:
    module = encoder(position=position)
    rows = histories([3, 9, 1, 5, 3, 9])
    domains = [0, 1, 0, 1, 1, 0]
    batch, order = packed(rows, domains)
    hidden = masks_for(batch)
    together = module(batch, HiddenCodes.find(hidden))
    ends = np.cumsum(batch.lengths.numpy())
    for place, index in enumerate(order.tolist()):
        span = slice(ends[place] - int(batch.lengths[place]), ends[place])
        alone, _ = packed(rows.take(np.array([index])), [domains[index]])
        for level, scores in enumerate(module(alone, HiddenCodes.find(hidden[span]))):
            before = int(hidden[: span.start, level].sum())
            expected = together[level][before : before + len(scores)]
            torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-4)


def test_attention_equals_a_padded_one_with_a_mask() -> None:
    torch.manual_seed(0)
    block = Block(16, heads=2, dropout=0.0)
    groups = ((3, 2), (1, 5), (2, 6))
    x = torch.randn(sum(c * t for c, t in groups), 16)
    sequences = x.split([t for c, t in groups for _ in range(c)])
    padded = torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True)
    valid = torch.arange(6) < torch.tensor([len(s) for s in sequences])[:, None]
    h = block.attention_norm(padded)
    query, key, value = (
        part.view(6, 6, 2, 8).transpose(1, 2)
        for part in functional.linear(h, block.qkv.weight, block.qkv.bias).chunk(3, -1)
    )
    weights = (
        (query @ key.transpose(-1, -2) / 8**0.5).masked_fill(~valid[:, None, None], -torch.inf).softmax(-1)
    )
    y = padded + block.attention_output((weights @ value).transpose(1, 2).reshape(6, 6, 16))
    y = y + block.down(functional.gelu(block.up(block.feed_norm(y)), approximate="tanh"))
    torch.testing.assert_close(block(x, groups, None), y[valid], atol=1e-5, rtol=1e-4)
    keep = torch.tensor([0, 7, 22])
    torch.testing.assert_close(block(x, groups, None, keep), y[valid][keep], atol=1e-5, rtol=1e-4)


def test_hidden_codes_are_not_read_and_visible_ones_are() -> None:
    module = encoder()
    batch, _ = packed(histories([4, 6]))
    hidden = masks_for(batch, partial=0.5)
    reference = torch.cat([scores.reshape(-1) for scores in module(batch, HiddenCodes.find(hidden))])

    def with_codes(change: torch.Tensor) -> torch.Tensor:
        codes = torch.where(change, (batch.codes + 1) % torch.tensor(LEVELS), batch.codes)
        changed = PackedHistories(
            batch.rows, codes, batch.lengths, batch.domains, batch.samples, batch.groups
        )
        return torch.cat([scores.reshape(-1) for scores in module(changed, HiddenCodes.find(hidden))])

    assert torch.equal(with_codes(hidden), reference)
    assert not torch.equal(with_codes(~hidden), reference)


def test_position_counts_from_the_end_and_order_matters() -> None:
    rows = np.array([[1, 2, 3, 4]])
    for position in ("learned", "rotary"):
        recommender = SequenceRecommender(encoder(position=position), semantic_ids=IDS)
        forward = recommender.code_log_probs(Ragged.from_lists(rows.tolist()), 0)
        backward = recommender.code_log_probs(Ragged.from_lists(rows[:, ::-1].tolist()), 0)
        assert (forward - backward).nan_to_num().abs().max() > 1e-6
        assert (
            forward - recommender.code_log_probs(Ragged.from_lists(rows.tolist()), 1)
        ).nan_to_num().abs().max() > 1e-6


def test_outputs_cover_the_own_level_only() -> None:
    module = encoder()
    batch, _ = packed(histories([5, 5]))
    hidden = masks_for(batch)
    scores = module(batch, HiddenCodes.find(hidden))
    assert [tuple(s.shape) for s in scores] == [
        (int(hidden[:, level].sum()), k) for level, k in enumerate(LEVELS)
    ]
    assert all(s.dtype == torch.float32 for s in scores)


def test_loss_is_a_sum_that_does_not_depend_on_packing() -> None:
    module = encoder()
    task = masked_task(module, masks=MaskConfig(), seed=5)
    rows = histories([3, 8, 2, 6, 5, 4])
    domains, samples = np.zeros(6, np.int64), np.arange(100, 106)

    def total(chosen: list[int]) -> tuple[float, float]:
        index = np.array(chosen)
        batch, _ = pack(rows.take(index), domains=domains[index], samples=samples[index], epoch=3)
        prepared, count = task.prepare(batch, torch.device("cpu"))
        return float(task.loss(module, prepared).detach()), float(count)

    whole = total([0, 1, 2, 3, 4, 5])
    parts = [total([4, 0]), total([1, 2, 3]), total([5])]
    assert whole[1] == sum(count for _, count in parts)
    assert whole[0] == pytest.approx(sum(loss for loss, _ in parts), rel=1e-5)


def test_loss_is_plain_cross_entropy_of_the_hidden_codes() -> None:
    module = encoder()
    rows = histories([4, 6])
    batch, _ = pack(rows, domains=np.zeros(2, np.int64), samples=np.arange(2))
    for smoothing in (0.0, 0.1):
        task = masked_task(module, masks=MaskConfig(), seed=0, label_smoothing=smoothing, item_weight=0.0)
        prepared, _ = task.prepare(batch, torch.device("cpu"))
        expected = 0.0
        for level, scores in enumerate(module(prepared.histories, prepared.hidden)):
            targets = prepared.histories.codes[:, level][prepared.hidden.mask[:, level]]
            one_hot = functional.one_hot(targets, LEVELS[level]) * (1 - smoothing) + smoothing / LEVELS[level]
            expected -= float((one_hot * scores.detach().log_softmax(-1)).sum())
        assert float(task.loss(module, prepared).detach()) == pytest.approx(expected, rel=1e-5)


def test_collate_never_shows_validation_or_test_items() -> None:
    rows = Ragged.from_lists([[1, 2, 3, 30, 31], [4, 5, 6, 7, 8, 9, 30, 31], [10, 11]])
    fields: dict[str, Any] = {
        "row": rows,
        "cut": np.array([[3, 4], [6, 7], [2, 2]], np.int32),
        "domain": np.array([0, 1, 0], np.uint8),
    }
    whole = HistoryCollate(max_items=4, seed=0, prefix=0.0)(fields, np.arange(3), 0)
    assert whole.rows.tolist() == [10, 11, 1, 2, 3, 6, 7, 8, 9]
    assert whole.domains.tolist() == [0, 0, 1]
    assert whole.groups == ((1, 2), (1, 3), (1, 4))
    ends = set()
    for epoch in range(40):
        batch = HistoryCollate(max_items=4, seed=0, prefix=1.0)(fields, np.arange(3), epoch)
        assert batch.epoch == epoch
        assert batch.rows.max() < 30
        last = batch.rows[torch.cumsum(batch.lengths, 0) - 1]
        ends.add(int(last[batch.domains == 1][0]))
    assert ends == {5, 6, 7, 8, 9}


def test_training_finds_a_rule() -> None:
    """The next item is the current one plus one: a few dozen steps must rank it first."""
    module = encoder(width=32, max_items=6)
    task = masked_task(module, masks=MaskConfig(span=0.0, tail=1.0, multi_region=0.0, partial=0.0), seed=0)
    optimiser = torch.optim.AdamW(module.parameters(), lr=5e-3)
    starts = np.arange(40)
    rows = Ragged.from_lists([[(s + i) % 40 for i in range(4)] for s in starts])
    for epoch in range(100):
        batch, _ = pack(rows, domains=np.zeros(40, np.int64), samples=starts, epoch=epoch)
        prepared, count = task.prepare(batch, torch.device("cpu"))
        optimiser.zero_grad()
        (task.loss(module, prepared) / count).backward()
        optimiser.step()
    scorer = FactorisedScorer(SequenceRecommender(module, semantic_ids=IDS), semantic_ids=IDS)
    best = scorer.scores(rows.prefix(np.full(40, 3)), 0).argmax(1).numpy()
    expected = IDS[(starts + 3) % 40]
    assert (IDS[best] == expected).all(1).mean() > 0.9


def test_recommender_gives_normalised_rows_whatever_the_batch() -> None:
    recommender = SequenceRecommender(encoder(), semantic_ids=IDS)
    rows = histories([4, 0, 9, 30, 1, 4])
    domain = np.array([0, 1, 0, 1, 0, 1])
    out = recommender.code_log_probs(rows, domain)
    assert out.shape == (6, 3, max(LEVELS))
    torch.testing.assert_close(out.exp().sum(-1), torch.ones(6, 3))
    for level, num_codes in enumerate(LEVELS):
        assert torch.isneginf(out[:, level, num_codes:]).all()
    for index in range(6):
        alone = recommender.code_log_probs(rows.take(np.array([index])), int(domain[index]))
        torch.testing.assert_close(alone[0], out[index], atol=1e-5, rtol=1e-4)


def test_recommender_drops_unknown_rows_and_reads_the_last_items() -> None:
    recommender = SequenceRecommender(encoder(max_items=3), semantic_ids=IDS)
    messy = Ragged.from_lists([[9, 8, 1, -1, 2, 3, 4000], [-1, -1]])
    clean = Ragged.from_lists([[1, 2, 3], []])
    torch.testing.assert_close(recommender.code_log_probs(messy, 0), recommender.code_log_probs(clean, 0))


def test_encoder_comes_back_from_its_artifact(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    module = encoder(position="rotary")
    writer = store.writer("pretrain", "a" * 64)
    writer.prepare()
    save_encoder(writer, module)
    artifact = writer.commit(meta={}, inputs={}, config={}, seed=0)
    again = load_encoder(artifact)
    assert again.config == module.config
    assert again.vocabulary == module.vocabulary
    rows = histories([5, 2])
    ours = SequenceRecommender(module, semantic_ids=IDS).code_log_probs(rows, 0)
    theirs = SequenceRecommender.load(artifact, semantic_ids=IDS).code_log_probs(rows, 0)
    assert torch.equal(ours, theirs)
    with pytest.raises(DataError, match="levels"):
        SequenceRecommender.load(artifact, semantic_ids=IDS[:, :2])


@pytest.mark.parametrize("width", [16, 4])
def test_embeddings_start_with_the_geometry_of_the_codebooks(width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    low_rank = torch.randn(3, 24, generator=generator)
    codebooks = [
        torch.randn(k, 3, generator=generator) @ low_rank / (level + 1) for level, k in enumerate(LEVELS)
    ]
    module = encoder(width=width, heads=2)
    others = module.tokens.weight[:2].clone()
    module.start_from_codebooks(codebooks)
    assert torch.equal(module.tokens.weight[:2], others)
    for level, codebook in enumerate(codebooks):
        start = module.vocabulary.starts[level]
        rows = module.tokens.weight[start : start + LEVELS[level]]
        assert float(rows.detach().square().mean().sqrt()) == pytest.approx(0.1, rel=1e-4)
        inner = functional.normalize(rows, dim=1) @ functional.normalize(rows, dim=1).T
        expected = functional.normalize(codebook, dim=1) @ functional.normalize(codebook, dim=1).T
        torch.testing.assert_close(inner, expected, atol=1e-4, rtol=1e-3)


def brute_force_item_loss(logits: list[torch.Tensor], target: int) -> float:
    log_probs = torch.stack([scores[IDS[:, level].astype(int)] for level, scores in enumerate(logits)]).sum(0)
    return float(-log_probs.log_softmax(0)[target])


def item_loss_of(
    logits: list[torch.Tensor], target: int, rows: torch.Tensor, log_weight: torch.Tensor | None
) -> float:
    codes = torch.from_numpy(IDS.astype(np.int64))
    return float(
        item_loss(
            [scores[None] for scores in logits],
            target_codes=codes[target][None],
            target_rows=torch.tensor([target]),
            candidate_codes=codes[rows],
            candidate_rows=rows,
            log_weight=log_weight,
        )
    )


def test_item_loss_is_a_softmax_over_all_items() -> None:
    torch.manual_seed(0)
    logits = [torch.randn(k) for k in LEVELS]
    for target in (0, 17, 39):
        ours = item_loss_of(logits, target, torch.arange(len(IDS)), None)
        assert ours == pytest.approx(brute_force_item_loss(logits, target), rel=1e-5)


def test_sampled_candidates_estimate_the_full_softmax() -> None:
    torch.manual_seed(0)
    logits = [torch.randn(k) for k in LEVELS]
    target = 5
    candidates = Candidates(torch.arange(len(IDS)), count=10, seed=1)
    own = float(sum(scores[IDS[target, level]] for level, scores in enumerate(logits)))
    partitions = []
    for epoch in range(600):
        rows, log_weight = candidates.draw(torch.arange(3), epoch=epoch)
        assert rows.shape == (10,)
        partitions.append(np.exp(item_loss_of(logits, target, rows, log_weight) + own))
    expected = np.exp(brute_force_item_loss(logits, target) + own)
    assert np.mean(partitions) == pytest.approx(expected, rel=0.05)


def test_candidates_are_drawn_anew_and_reach_the_whole_pool() -> None:
    pool = torch.arange(100, 140)
    candidates = Candidates(pool, count=8, seed=1)
    first = candidates.draw(torch.tensor([3, 4]), epoch=0)[0]
    assert torch.equal(first, candidates.draw(torch.tensor([3, 4]), epoch=0)[0])
    assert not torch.equal(first, candidates.draw(torch.tensor([3, 4]), epoch=1)[0])
    assert not torch.equal(first, candidates.draw(torch.tensor([3, 5]), epoch=0)[0])
    seen = torch.cat([candidates.draw(torch.tensor([3]), epoch=epoch)[0] for epoch in range(60)])
    assert torch.equal(torch.unique(seen), pool)
    assert Candidates(pool, count=40, seed=1).draw(torch.tensor([3]), epoch=0)[1] is None


def test_item_weight_adds_the_loss_of_wholly_hidden_items() -> None:
    module = encoder()
    batch, _ = pack(histories([6, 7]), domains=np.zeros(2, np.int64), samples=np.arange(2))
    losses = []
    for weight in (0.0, 1.0, 2.0):
        task = masked_task(module, masks=MaskConfig(partial=0.0), item_weight=weight)
        prepared, _ = task.prepare(batch, torch.device("cpu"))
        losses.append(float(task.loss(module, prepared).detach()))
    expected = 0.0
    logits = module(prepared.histories, prepared.hidden)
    for place, row in enumerate(prepared.histories.rows[prepared.hidden.mask[:, 0]].tolist()):
        expected += len(LEVELS) * brute_force_item_loss([scores[place].detach() for scores in logits], row)
    assert losses[1] - losses[0] == pytest.approx(expected, rel=1e-4)
    assert losses[2] - losses[0] == pytest.approx(2 * expected, rel=1e-4)


def test_rotary_positions_need_pairs_of_channels() -> None:
    with pytest.raises(ValueError, match="even width per head"):
        SequenceConfig(width=6, heads=2, position="rotary")
