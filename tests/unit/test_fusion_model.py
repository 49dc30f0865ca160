from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from qbrec.engine.mixing import hashed_normal
from qbrec.fusion.batches import Collator, Dropout, content_numbers
from qbrec.fusion.model import FusionBatch, FusionModel, ModalitySpec, align
from qbrec.storage.ragged import Ragged

SPECS = (
    ModalitySpec("text", "dense", 6),
    ModalitySpec("keys", "dense", 4),  # a name that is a method of ModuleDict
    ModalitySpec("structure", "bag", 50),
    ModalitySpec("behaviour", "dense", 5),
)
STATISTICS = {
    f"{part}.{spec.name}": torch.rand(spec.dim) + 0.5
    for part in ("mean", "std")
    for spec in SPECS
    if spec.kind == "dense"
}


def _model(*, depth: int = 3, gated: bool = True, hashed_rows: bool = False) -> FusionModel:
    torch.manual_seed(0)
    return FusionModel(
        SPECS,
        width=16,
        depth=depth,
        heads=2,
        alignment_temperature=0.1,
        gated=gated,
        hashed_rows=hashed_rows,
        statistics=STATISTICS,
    )


def _fields(size: int = 20, seed: int = 0) -> dict[str, np.ndarray | Ragged]:
    rng = np.random.default_rng(seed)
    fields: dict[str, np.ndarray | Ragged] = {"row": np.arange(size)}
    for name, dim in (("text", 6), ("keys", 4)):
        lengths = rng.integers(0, 4, size)
        values = rng.standard_normal((lengths.sum(), dim)).astype(np.float16)
        fields[f"feature.{name}"] = Ragged.from_lengths(values, lengths)
    fields["structure"] = rng.integers(-1, 50, (size, 3)).astype(np.int32)
    return fields


def _batch(size: int = 20, *, dropout: Dropout | None = None, epoch: int = 0, seed: int = 0) -> FusionBatch:
    behaviour = np.random.default_rng(5).standard_normal((size, 5)).astype(np.float16)
    behaviour[::3] = 0
    collate = Collator(SPECS, behaviour=behaviour, own_rows=True, dropout=dropout)
    batch = collate(_fields(size, seed), np.arange(size), epoch)
    table = 0.02 * torch.randn(size, 16, generator=torch.Generator().manual_seed(7))
    return replace(batch, own=table[batch.rows] * (batch.rows >= 0)[:, None])


def test_alignment_is_the_formula_of_the_paper() -> None:
    torch.manual_seed(1)
    query, tokens = torch.randn(5, 8), torch.randn(5, 3, 8)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [0, 0, 0], [1, 1, 1]]).bool()
    got = align(query, tokens, mask, temperature=0.07)
    for i in range(5):
        own = tokens[i, mask[i]]
        cosine = torch.cosine_similarity(query[i, None], own, dim=-1)
        expected = (torch.softmax(cosine / 0.07, 0)[:, None] * own).sum(0)
        torch.testing.assert_close(got[i], expected)
    assert got[3].eq(0).all()


def test_soft_gate_weighs_each_block_by_the_product_of_the_gates_before_it() -> None:
    model, batch = _model(), _batch()
    fused, _, weights = model(batch)
    state, tokens, visible, _ = model._read(batch)
    product = torch.ones(20)
    for level, block in enumerate(model.blocks):
        torch.testing.assert_close(weights[:, level], product)
        state = state + product[:, None] * block(state, tokens, visible)
        if level < 2:
            product = product * torch.sigmoid(model.gates[level](state)).squeeze(-1)
    torch.testing.assert_close(fused, state / state.pow(2).mean(1, keepdim=True).sqrt())


def test_hard_gate_stops_items_one_by_one() -> None:
    model, batch = _model(depth=4), _batch()
    for gate in model.gates:
        torch.nn.init.normal_(gate[1].weight, std=3.0)
        torch.nn.init.normal_(gate[3].weight, std=1.0)
        gate[3].bias.data.fill_(1.0)
    batch = replace(batch, own=torch.randn(20, 16))  # states that differ enough for gates to disagree
    fused, depth, _ = model.embed(batch)
    assert len(set(depth.tolist())) > 2, "items must leave at different depths for this test to say something"
    with torch.no_grad():
        state, tokens, visible, _ = model._read(batch)
        product, expected = torch.ones(20), state
        for level, block in enumerate(model.blocks):
            taken = product >= 0.5
            assert (depth[taken] > level).all()
            assert (depth[~taken] <= level).all()
            # Who has left keeps the state it left with; the others go on as in training.
            state = torch.where(
                taken[:, None], state + product[:, None] * block(state, tokens, visible), state
            )
            expected = state
            if level < 3:
                product = product * torch.sigmoid(model.gates[level](state)).squeeze(-1)
    torch.testing.assert_close(fused, expected / expected.pow(2).mean(1, keepdim=True).sqrt())


def test_open_gates_make_hard_and_soft_equal() -> None:
    model, batch = _model(), _batch()
    for gate in model.gates:
        gate[-1].bias.data.fill_(30.0)
    torch.testing.assert_close(model(batch)[0], model.embed(batch)[0])


def test_absent_and_hidden_modalities_do_not_count() -> None:
    model, batch = _model(), _batch()
    poisoned = dict(batch.features)
    poisoned["text"] = torch.where(batch.tokens["text"][..., None], batch.features["text"], torch.tensor(1e4))
    for a, b in zip(model(batch), model(replace(batch, features=poisoned)), strict=True):
        torch.testing.assert_close(a, b)
    blind = replace(batch, visible=batch.visible & torch.tensor([True, False, True, True]))
    changed = replace(blind, features={**batch.features, "keys": batch.features["keys"] + 1})
    torch.testing.assert_close(model(blind)[0], model(changed)[0])
    assert not torch.allclose(model(blind)[0], model(batch)[0])


def test_an_item_without_anything_is_finite_and_trains() -> None:
    model, batch = _model(), _batch()
    nothing = torch.zeros_like(batch.present)
    bare = replace(
        batch,
        visible=nothing,
        present=nothing,
        tokens={k: torch.zeros_like(v) for k, v in batch.tokens.items()},
    )
    fused, views, _ = model(bare)
    fused.sum().backward()
    assert torch.isfinite(fused).all()
    assert views.eq(0).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_views_do_not_depend_on_the_query() -> None:
    model, batch = _model(), _batch()
    other = replace(batch, rows=torch.full_like(batch.rows, -1))
    torch.testing.assert_close(model(batch)[1], model(other)[1])
    assert not torch.allclose(model(batch)[0], model(other)[0])


def test_items_do_not_see_each_other() -> None:
    model, batch = _model(), _batch()
    whole = model.embed(batch)[0]
    single = Collator(SPECS, behaviour=None, own_rows=True, dropout=None)(_fields(), np.arange(20), 0)
    part = model.embed(replace(single, own=batch.own))[0]
    absent = ~batch.present[:, 3]
    torch.testing.assert_close(whole[absent], part[absent])


def test_content_numbers_are_equal_where_the_bytes_are() -> None:
    rng = np.random.default_rng(0)
    rows = [rng.standard_normal((n, 4)).astype(np.float16) for n in (2, 0, 3, 1, 0)]
    rows += [rows[0].copy(), rows[0][::-1], rows[2][:2]]
    ragged = Ragged.from_lengths(np.concatenate(rows), np.array([len(r) for r in rows]))
    numbers = content_numbers(ragged)
    expected = [[a.shape == b.shape and a.tobytes() == b.tobytes() for b in rows] for a in rows]
    np.testing.assert_array_equal(numbers[:, None] == numbers, expected)
    order = rng.permutation(len(rows))
    np.testing.assert_array_equal(content_numbers(ragged.take(order)), numbers[order])


def test_dropout_is_a_function_of_sample_and_epoch() -> None:
    dropout = Dropout(0.3, 0.4, seed=7)
    behaviour = np.ones((4000, 5), np.float16)
    collate = Collator(SPECS, behaviour=behaviour, own_rows=True, dropout=dropout)
    fields, samples = _fields(4000), np.arange(4000)
    whole = collate(fields, samples, 3)
    assert abs(float((whole.rows < 0).float().mean()) - 0.3) < 0.03
    assert whole.present.any(1).equal(whole.visible.any(1)), "never everything hidden"
    hidden = float((whole.present & ~whole.visible)[:, 3].float().mean())
    assert 0.3 < hidden < 0.42
    index = np.random.default_rng(1).permutation(4000)[:50]
    few = {k: v.take(index) if isinstance(v, Ragged) else v[index] for k, v in fields.items()}
    part = collate(few, samples[index], 3)
    assert part.rows.equal(whole.rows[index])
    assert part.visible.equal(whole.visible[index])
    assert not collate(fields, samples, 4).rows.equal(whole.rows)


@pytest.mark.parametrize("hashed_rows", [False, True])
def test_every_parameter_gets_a_gradient(hashed_rows: bool) -> None:
    model, batch = _model(hashed_rows=hashed_rows), _batch(dropout=Dropout(0.3, 0.2, seed=1))
    assert batch.own is not None
    batch.own.requires_grad_()
    fused, views, _ = model(batch)
    weight = torch.randn(16)
    ((fused * weight).sum() + views.pow(2).sum()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    if hashed_rows:
        assert batch.own.grad is None
    else:
        assert (batch.own.grad.abs().sum(1) > 0).equal(batch.rows >= 0)


def test_hashed_rows_are_those_of_the_item_in_any_batch() -> None:
    model, batch = _model(hashed_rows=True), _batch()
    few = replace(_batch(seed=0), rows=batch.rows.flip(0))
    queries = hashed_normal(torch.arange(4000), 33)
    assert torch.equal(hashed_normal(torch.tensor([3999, 7]), 33), queries[[3999, 7]])
    assert abs(float(queries.mean())) < 0.01
    assert abs(float(queries.std()) - 1) < 0.01
    correlation = torch.corrcoef(queries.T) - torch.eye(33)
    assert float(correlation.abs().max()) < 0.1
    assert not torch.allclose(model(batch)[0], model(few)[0])


def test_without_gates_every_item_takes_all_blocks() -> None:
    model, batch = _model(gated=False).eval(), _batch()
    fused, _, weights = model(batch)
    embedded, depth, _ = model.embed(batch)
    assert (weights == 1).all()
    assert (depth == model.depth).all()
    torch.testing.assert_close(fused, embedded)
    assert not [name for name in model.state_dict() if name.startswith("gates")]
    assert (_model()(batch)[2] < 1).any()
