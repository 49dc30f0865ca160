"""SASRec and BERT4Rec over item ids: what they see, what they are asked, how they score."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from qbrec.baselines import softmax
from qbrec.baselines.item_batch import ItemBatch, ItemCollate, ItemNumbers, cloze_mask, pack_items
from qbrec.baselines.item_encoder import ItemEncoder, Question
from qbrec.baselines.item_scorer import ItemScorer
from qbrec.baselines.item_tasks import ItemTask
from qbrec.baselines.softmax import item_cross_entropy
from qbrec.config.stages import Bert4RecConfig, ItemEncoderConfig
from qbrec.engine.candidates import Candidates
from qbrec.storage.ragged import Ragged

ITEMS = 40
SMALL = {"width": 16, "layers": 2, "heads": 2, "dropout": 0.0, "max_items": 8}


def encoder(name: str, **changes: object) -> ItemEncoder:
    kind = ItemEncoderConfig if name == "sasrec" else Bert4RecConfig
    torch.manual_seed(0)
    module = ItemEncoder(kind(**{**SMALL, **changes}), num_items=ITEMS, causal=name == "sasrec")
    # Nothing is left at zero, so that nothing can be missing unnoticed.
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module.eval()


def random_histories(count: int, *, seed: int = 0, longest: int = 8) -> Ragged:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest + 1, count)
    return Ragged.from_lengths(rng.integers(0, ITEMS, lengths.sum()), lengths)


def everywhere(batch: ItemBatch) -> torch.Tensor:
    return torch.arange(len(batch.items))


@pytest.mark.parametrize("name", ["sasrec", "bert4rec"])
def test_histories_side_by_side_are_histories_alone(name: str) -> None:
    module, histories = encoder(name), random_histories(20)
    batch, order = pack_items(histories)
    assert sorted(order) == list(range(20))
    together = module.states(batch, everywhere(batch))
    for i, (begin, end) in enumerate(zip(batch.ends - batch.lengths, batch.ends, strict=True)):
        alone, _ = pack_items(histories.take(order[i : i + 1]))
        np.testing.assert_array_equal(alone.items, histories.row(order[i]))
        assert alone.age.tolist() == list(range(len(alone.items)))[::-1]
        want = module.states(alone, everywhere(alone))
        torch.testing.assert_close(together[begin:end], want, atol=1e-5, rtol=1e-5)


def test_sasrec_sees_no_later_item() -> None:
    module = encoder("sasrec")
    batch, _ = pack_items(random_histories(12, seed=1))
    before = module.states(batch, everywhere(batch))
    for place in range(len(batch.items)):
        items = batch.items.clone()
        items[place] = (items[place] + 1) % ITEMS
        moved = (module.states(replace(batch, items=items), everywhere(batch)) != before).any(1)
        own = batch.owner == batch.owner[place]
        assert moved.tolist() == (own & (everywhere(batch) >= place)).tolist()


def test_bert4rec_sees_both_sides_but_nothing_hidden() -> None:
    module = encoder("bert4rec")
    batch, _ = pack_items(random_histories(12, seed=2))
    hidden = cloze_mask(batch, ratio=0.4, tail=0.0, seed=0)
    before = module.states(batch, everywhere(batch), hidden=hidden)
    for place in range(len(batch.items)):
        items = batch.items.clone()
        items[place] = (items[place] + 1) % ITEMS
        after = module.states(replace(batch, items=items), everywhere(batch), hidden=hidden)
        own = batch.owner == batch.owner[place]
        assert (after != before).any(1).tolist() == (own & ~hidden[place]).tolist()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.booleans(), st.sampled_from([1, 50, 1 << 20]))
def test_the_loss_is_the_cross_entropy(seed: int, sampled: bool, chunk: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    places, items, width = 9, 13, 5
    tensors = {
        "states": torch.randn(places, width, generator=generator),
        "table": torch.randn(items, width, generator=generator),
        "bias": torch.randn(items, generator=generator),
    }
    targets = torch.randint(items, (places,), generator=generator)
    candidates, log_weight = torch.arange(items), None
    if sampled:
        candidates = torch.randint(items, (6,), generator=generator).sort().values.unique()
        log_weight = torch.rand(len(candidates), generator=generator)
    place = torch.searchsorted(candidates, targets).clamp(max=len(candidates) - 1)

    def ours(states: torch.Tensor, table: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return item_cross_entropy(
            states,
            (states * table[targets]).sum(1) + bias[targets],
            weight=table[candidates],
            bias=bias[candidates],
            log_weight=log_weight,
            place=place,
            there=candidates[place] == targets,
        )

    def written_out(states: torch.Tensor, table: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        scores = states @ table.t() + bias
        if not sampled:
            return functional.cross_entropy(scores, targets, reduction="sum")
        assert log_weight is not None
        losses = []
        for row, target in zip(scores, targets, strict=True):
            total = row[target].exp()
            for candidate, weight in zip(candidates, log_weight, strict=True):
                if candidate != target:
                    total = total + weight.exp() * row[candidate].exp()
            losses.append(total.log() - row[target])
        return torch.stack(losses).sum()

    found = []
    for loss in (ours, written_out):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors.values()]
        kept, softmax.CHUNK_SCORES = softmax.CHUNK_SCORES, chunk
        try:
            value = loss(*leaves)
        finally:
            softmax.CHUNK_SCORES = kept
        (3 * value).backward()
        found.append([value, *(leaf.grad for leaf in leaves)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["sasrec", "bert4rec"])
def test_a_step_is_the_cross_entropy_at_the_places_asked_about(name: str) -> None:
    module = encoder(name)
    pool = torch.arange(0, ITEMS, 2)  # items that may be recommended
    task = ItemTask.of(module, candidates=Candidates(pool, count=100, seed=0), seed=3)
    rng = np.random.default_rng(4)
    histories = random_histories(15, seed=4)
    batch, _ = pack_items(histories, targets=rng.choice(pool.numpy(), len(histories.values)))
    (prepared, question), count = task.prepare(batch, torch.device("cpu"))
    assert int(count) == len(question.places)
    assert (len(question.places) == len(batch.items)) == (name == "sasrec")
    scores = module.scores(module.states(prepared, question.places, hidden=question.hidden))
    places = torch.searchsorted(pool, batch.targets[question.places])
    want = functional.cross_entropy(scores[:, pool], places, reduction="sum")
    torch.testing.assert_close(task.loss(module, (prepared, question)), want, atol=1e-3, rtol=1e-5)


def test_a_large_domain_is_sampled() -> None:
    module = encoder("sasrec")
    batch, _ = pack_items(random_histories(15, seed=5))
    losses = []
    for count in (ITEMS, 20):
        values = []
        for epoch in range(200 if count < ITEMS else 1):
            task = ItemTask.of(
                module, candidates=Candidates(torch.arange(ITEMS), count=count, seed=0), seed=0
            )
            (prepared, question), _ = task.prepare(replace(batch, epoch=epoch), torch.device("cpu"))
            assert len(question.candidates) == count
            with torch.no_grad():
                values.append(float(task.loss(module, (prepared, question))))
        losses.append(np.mean(values))
    # The partition function is estimated without bias, its logarithm a little low.
    assert losses[1] == pytest.approx(losses[0], rel=0.03)


def test_batches_end_where_validation_begins() -> None:
    rows = Ragged.from_lists(
        [[5, 7, 9, 11, 13, 15], [21, 3, 23], [1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23]]
    )
    numbers = ItemNumbers(np.arange(1, 2 * ITEMS, 2), 2 * ITEMS)  # odd rows are of this domain; 3 is number 1
    fields = {"row": rows, "cut": np.array([[4, 5], [3, 3], [10, 11]], np.int32)}
    samples = np.array([40, 41, 42])
    cloze = Bert4RecConfig(tail=0.0)
    whole = ItemCollate(numbers, max_items=4, cloze=cloze, seed=0)(fields, samples, 6)
    assert (whole.samples.tolist(), whole.epoch, whole.groups) == ([41, 40, 42], 6, ((1, 3), (1, 4), (1, 5)))
    assert whole.items.tolist() == [10, 1, 11, *range(2, 6), *range(5, 10)]
    assert torch.equal(whole.items, whole.targets)
    shifted = ItemCollate(numbers, max_items=4, cloze=None, seed=0)(fields, samples, 6)
    assert shifted.items.tolist() == [10, 1, *range(2, 5), *range(5, 9)]
    assert shifted.targets.tolist() == [1, 11, *range(3, 6), *range(6, 10)]
    assert shifted.groups == ((1, 2), (1, 3), (1, 4))


def test_tail_histories_end_at_any_item_but_the_first() -> None:
    rows = Ragged.from_lengths(np.tile(np.arange(6), 900), np.full(900, 6))
    fields = {"row": rows, "cut": np.tile(np.array([[5, 6]], np.int32), (900, 1))}
    numbers, samples = ItemNumbers(np.arange(6), 6), np.arange(900)
    for tail, shares in ((1.0, [0.25] * 4), (0.4, [0.1, 0.1, 0.1, 0.7])):
        cloze = Bert4RecConfig(tail=tail, mask_ratio=1.0)
        batch = ItemCollate(numbers, max_items=50, cloze=cloze, seed=2)(fields, samples, 1)
        found = np.bincount(batch.lengths, minlength=6) / 900
        assert found[2:] == pytest.approx(shares, abs=0.05)
        # What is hidden says the same of each history: the last item of a tail history, all of another.
        hidden = cloze_mask(batch, ratio=cloze.mask_ratio, tail=tail, seed=2)
        parts = hidden.split(batch.lengths.tolist())
        last = torch.stack([part.sum() == 1 for part in parts])
        assert all(part[-1] for part in parts)
        assert float(last.float().mean()) == pytest.approx(tail, abs=0.05)
        assert all(last[batch.lengths < 5])


def test_rows_of_other_domains_are_left_out() -> None:
    numbers = ItemNumbers(np.array([2, 5, 6]), 9)
    found = numbers.of(Ragged.from_lists([[2, 3, 6], [], [8, 0, -1, 50], [5]]))
    assert [found.row(i).tolist() for i in range(4)] == [[0, 2], [], [], [1]]


@pytest.mark.parametrize(("ratio", "tail"), [(0.3, 0.0), (0.0, 0.0), (0.3, 0.5), (0.3, 1.0), (1.0, 0.0)])
def test_what_is_hidden(ratio: float, tail: float) -> None:
    length, count = 10, 2000
    histories = Ragged.from_lengths(np.zeros(length * count, np.int64), np.full(count, length))
    batch, _ = pack_items(histories)
    hidden = cloze_mask(batch, ratio=ratio, tail=tail, seed=1).view(count, length)
    assert hidden.any(1).all()
    alone = hidden.sum(1) == 1
    share = {0.0: 1 / length, 0.3: ratio + 0.7**length / length, 1.0: 1.0}[ratio] * (1 - tail) + tail / length
    assert float(hidden.float().mean()) == pytest.approx(share, abs=0.01)
    only_last = float((alone & hidden[:, -1]).float().mean())
    assert only_last >= tail - 0.03
    if tail < 1 and ratio < 1:
        # Otherwise every place is as likely as any other.
        assert float(hidden[:, 0].float().mean()) == pytest.approx(
            share - tail / length if tail == 0 else (1 - tail) * ratio, abs=0.04
        )


def test_what_is_hidden_depends_on_sample_and_epoch_alone() -> None:
    histories = random_histories(30, seed=6)

    def masks(chosen: np.ndarray, epoch: int) -> dict[int, list[bool]]:
        batch, _ = pack_items(histories.take(chosen), samples=chosen, epoch=epoch)
        hidden = cloze_mask(batch, ratio=0.4, tail=0.2, seed=1)
        parts = hidden.split(batch.lengths.tolist())
        return {int(sample): part.tolist() for sample, part in zip(batch.samples, parts, strict=True)}

    whole, some = masks(np.arange(30), 2), masks(np.array([17, 3, 25]), 2)
    assert some == {sample: whole[sample] for sample in (3, 17, 25)}
    assert masks(np.arange(30), 3) != whole


@pytest.mark.parametrize("name", ["sasrec", "bert4rec"])
def test_scores_are_those_of_each_history_alone(name: str) -> None:
    module = encoder(name)
    numbers = ItemNumbers(np.arange(5, 5 + 2 * ITEMS, 2), 100)
    scorer = ItemScorer(name, module, numbers=numbers)
    histories = Ragged.from_lists([[5, 7, 9], [], [6, 8], [83, 6, 41, 100, -1], list(range(5, 65, 2)), [11]])
    scores = scorer.scores(histories, 0)
    assert scores.shape == (6, 100)
    assert scores.dtype == torch.float32
    assert torch.isfinite(scores).all()
    others = np.setdiff1d(np.arange(100), numbers.rows)
    assert (scores[:, others] == torch.finfo(torch.float32).min).all()
    found = scores[:, torch.from_numpy(numbers.rows)]
    known = {0: [0, 1, 2], 3: [39, 18], 4: list(range(22, 30)), 5: [3]}
    for i in (1, 2):  # nothing of them is known
        torch.testing.assert_close(found[i], module.bias)
    for i, items in known.items():
        asked = items if name == "sasrec" else [*items, ITEMS]
        batch, _ = pack_items(Ragged.from_lists([asked]))
        state = module.states(batch, torch.tensor([len(asked) - 1]))
        want = state[0] @ module.items.weight[:ITEMS].t() + module.bias
        torch.testing.assert_close(found[i], want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["sasrec", "bert4rec"])
def test_a_markov_chain_is_learnt(name: str) -> None:
    rng = np.random.default_rng(7)
    follows = rng.permutation(ITEMS)
    walks = []
    for start in rng.integers(0, ITEMS, 200):
        walk = [int(start)]
        while len(walk) < 7:
            walk.append(int(follows[walk[-1]]) if rng.random() < 0.8 else int(rng.integers(ITEMS)))
        walks.append(walk)
    torch.manual_seed(0)
    settings = {**SMALL, "width": 32, "dropout": 0.1}
    kind = ItemEncoderConfig if name == "sasrec" else Bert4RecConfig
    module = ItemEncoder(kind(**settings), num_items=ITEMS, causal=name == "sasrec")
    numbers = ItemNumbers(np.arange(ITEMS), ITEMS)
    fields = {"row": Ragged.from_lists(walks), "cut": np.full((200, 2), 7)}
    task = ItemTask.of(module, candidates=Candidates(torch.arange(ITEMS), count=99, seed=0), seed=0)
    collate = ItemCollate(numbers, max_items=8, cloze=task.cloze, seed=0)
    optimiser = torch.optim.AdamW(module.parameters(), lr=1e-2)
    for epoch in range(60 if name == "sasrec" else 150):
        batch, count = task.prepare(collate(fields, np.arange(200), epoch), torch.device("cpu"))
        optimiser.zero_grad()
        (task.loss(module.train(), batch) / count).backward()
        optimiser.step()
    chains = [[i, follows[i], follows[follows[i]]] for i in range(ITEMS)]
    scores = ItemScorer(name, module, numbers=numbers).scores(Ragged.from_lists(chains))
    # The most popular item would be right once in forty times.
    right = scores.argmax(1).numpy() == follows[[chain[-1] for chain in chains]]
    assert right.mean() > 0.8


def test_half_precision_reaches_the_same_loss() -> None:
    module = encoder("sasrec")
    batch, _ = pack_items(random_histories(15, seed=8))
    question = Question(everywhere(batch), None, torch.arange(ITEMS), None)
    want = module(batch, question)
    found = module.bfloat16()(batch, question)
    assert found.dtype == torch.float32
    found.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in module.parameters())
    torch.testing.assert_close(found, want, rtol=0.05, atol=0.0)
