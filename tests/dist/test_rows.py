"""ID rows beside DeepSpeed: sharded equals unsharded equals plain torch, whatever the loss scale does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qbrec.config.sections import ComputeConfig
from qbrec.engine.context import StageContext
from qbrec.engine.rows import ShardedRows
from qbrec.engine.schedule import schedule
from qbrec.engine.train import train
from qbrec.storage.artifact import ArtifactStore
from tests.support.half import allow_half
from tests.support.rows import CONFIG, ROW_RATE, RowLoader, RowTask, row_use
from tests.support.spawn import run_ranks
from tests.support.training import Interrupted

NUM_ROWS, WIDTH = 100, 6


def _context(rank: int, world: int, folder: str, **compute: Any) -> StageContext:
    Path(folder).mkdir(parents=True, exist_ok=True)
    settings = {"device": "cpu", "precision": "float32", **compute}
    return StageContext(
        store=ArtifactStore(folder), run_dir=Path(folder), stage="rows", key="k" * 64, seed=3,
        rank=rank, world=world,
        compute=ComputeConfig(**settings),
    )  # fmt: skip


def _table(ctx: StageContext, *, clip_norm: float = 0.5, num_rows: int = NUM_ROWS) -> ShardedRows:
    return ShardedRows(ctx, num_rows=num_rows, width=WIDTH, std=0.1, clip_norm=clip_norm)


def _whole(ctx: StageContext, table: ShardedRows) -> torch.Tensor:
    """The table and, as last column, its accumulators."""
    return torch.cat(ctx.gather_bytes(torch.cat([table.rows, table.accumulator[:, None]], dim=1)))


def _ids(rank: int, world: int, step: int) -> torch.Tensor:
    """Ids of a step with repetitions, dealt unevenly: rank 1 of two has a third, in step 1 nothing."""
    ids = torch.randint(0, NUM_ROWS, (60,), generator=torch.Generator().manual_seed(step))
    if world == 1:
        return ids
    cuts = [0, 60, 60, 60, 60] if step == 1 else [0, 40, 60, 60, 60]
    return ids[cuts[rank] : cuts[rank + 1]]


def _gradients(ids: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    return vectors * 3 + ids[:, None] * torch.linspace(-0.2, 0.3, WIDTH)


def _steps(rank: int, world: int, folder: str) -> torch.Tensor:
    ctx = _context(rank, world, folder)
    table = _table(ctx)
    for step in range(4):
        ids = _ids(rank, world, step)
        route = table.route(ids)
        vectors = table.lookup(route)
        gradients = _gradients(ids, vectors) * 8
        assert table.apply(route, gradients, divisor=8.0, learning_rate=0.1, wanted=True)
    return _whole(ctx, table)


@pytest.mark.dist
def test_rows_move_as_row_wise_adagrad_says_on_any_number_of_ranks(tmp_path: Path) -> None:
    table = run_ranks(_initial, 1, str(tmp_path))[0]
    accumulator = torch.zeros(NUM_ROWS)
    for step in range(4):
        ids = _ids(0, 1, step)
        every = _gradients(ids, table[ids])
        for row in ids.unique().tolist():
            gradient = every[ids == row].sum(0)
            gradient = gradient * min(1.0, 0.5 / float(gradient.norm()))
            accumulator[row] += gradient.square().mean()
            table[row] -= 0.1 * gradient / accumulator[row].sqrt()
    expected = torch.cat([table, accumulator[:, None]], dim=1)
    assert expected[:, -1].gt(0).sum() > 50
    for world in (1, 2, 3):
        found = run_ranks(_steps, world, str(tmp_path))[0]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def _initial(rank: int, world: int, folder: str) -> torch.Tensor:
    ctx = _context(rank, world, folder)
    return _whole(ctx, _table(ctx))[:, :-1].contiguous()


@pytest.mark.dist
def test_a_row_starts_from_the_same_vector_whoever_owns_it(tmp_path: Path) -> None:
    one, two, three = (run_ranks(_initial, world, str(tmp_path))[0] for world in (1, 2, 3))
    assert torch.equal(one, two)
    assert torch.equal(one, three)
    assert float(one.std()) == pytest.approx(0.1, rel=0.1)
    assert len(one.unique(dim=0)) == NUM_ROWS


def _not_finite(rank: int, world: int, folder: str) -> tuple[bool, bool]:
    ctx = _context(rank, world, folder)
    table = _table(ctx)
    before = table.rows.clone()
    route = table.route(torch.arange(10))
    gradients = torch.ones(10, WIDTH)
    if rank == world - 1:
        gradients[3, 2] = torch.inf
    moved = table.apply(route, gradients, divisor=1.0, learning_rate=0.1, wanted=True)
    skipped = table.apply(route, torch.ones(10, WIDTH), divisor=1.0, learning_rate=0.1, wanted=False)
    return moved or skipped, torch.equal(before, table.rows)


@pytest.mark.dist
@pytest.mark.parametrize("world", [1, 2])
def test_an_infinite_gradient_on_one_rank_moves_no_row_anywhere(world: int, tmp_path: Path) -> None:
    assert run_ranks(_not_finite, world, str(tmp_path)) == [(False, True)] * world


def _train(rank: int, world: int, folder: str, compute: dict[str, Any], stop_at: int = 0) -> dict[str, Any]:
    ctx = _context(rank, world, folder, **compute)
    if compute.get("precision") == "float16":
        allow_half()
    use, moved = row_use(ctx), []
    apply = use.table.apply

    def noted(*args: Any, **kwargs: Any) -> bool:
        moved.append(apply(*args, **kwargs))
        return moved[-1]

    use.table.apply = noted  # type: ignore[method-assign]
    task = RowTask()
    loader = RowLoader(rank, world, stop_at=stop_at)
    try:
        result = train(ctx, task, loader, config=CONFIG, label="rows", rows=use)
    except Interrupted:
        return {"fired": True}
    whole = _whole(ctx, use.table)
    return {
        "fired": False,
        "losses": result.losses,
        "rows": whole,
        "weights": task.module.state_dict(),
        "moved": moved,
    }


def _plain_torch(
    folder: str, *, skipped: Sequence[int] = ()
) -> tuple[list[float], torch.Tensor, torch.Tensor]:
    """The same training, written down without engine, ranks, windows or accumulation of ours."""
    task, loader = RowTask(), RowLoader(0, 1)
    ctx = _context(0, 1, folder)
    table = nn.Parameter(row_use(ctx).table.rows.clone())
    accumulator = torch.zeros(len(table))
    groups = [
        {"params": [p for p in task.module.parameters() if p.ndim >= 2], "weight_decay": CONFIG.weight_decay},
        {"params": [p for p in task.module.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=CONFIG.betas)
    losses: list[float] = []
    for epoch in range(CONFIG.epochs):
        for micro_batches in loader.iterate(epoch):
            prepared = [task.prepare(b, torch.device("cpu")) for b in micro_batches if b is not None]
            count = sum(float(c) for _, c in prepared)
            total = torch.zeros(())
            for batch, _ in prepared:
                own = table[batch.rows.clamp(min=0)] * (batch.rows >= 0)[:, None]
                total = total + task.loss(task.module, task.bind(batch, own)) / count
            if len(losses) in skipped:
                losses.append(float(total.detach()))
                continue
            optimizer.zero_grad()
            table.grad = None
            total.backward()
            nn.utils.clip_grad_norm_(task.module.parameters(), CONFIG.clip_norm)
            factor = schedule(CONFIG, len(losses), CONFIG.epochs * loader.steps_per_epoch)
            for group in optimizer.param_groups:
                group["lr"] = CONFIG.learning_rate * factor
            optimizer.step()
            gradient = table.grad * (
                CONFIG.clip_norm / table.grad.norm(dim=1, keepdim=True).clamp(min=1e-30)
            ).clamp(max=1)
            with torch.no_grad():
                touched = gradient.abs().sum(1) > 0
                accumulator += gradient.square().mean(1)
                step = ROW_RATE * factor * gradient / (accumulator.sqrt() + 1e-8)[:, None]
                table[touched] -= step[touched]
            losses.append(float(total.detach()))
    return losses, table.detach(), accumulator


@pytest.mark.dist
@pytest.mark.parametrize(("stage", "world"), [(0, 1), (1, 2), (2, 2), (3, 2), (1, 3)])
def test_training_with_rows_equals_plain_torch(stage: int, world: int, tmp_path: Path) -> None:
    losses, table, accumulator = _plain_torch(str(tmp_path / "plain"))
    results = run_ranks(_train, world, str(tmp_path), {"zero_stage": stage})
    for result in results:
        torch.testing.assert_close(torch.tensor(result["losses"]), torch.tensor(losses), rtol=1e-5, atol=0)
    rows = results[0]["rows"]
    torch.testing.assert_close(rows[:, :-1], table, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(rows[:, -1], accumulator, rtol=1e-4, atol=1e-9)


@pytest.mark.dist
@pytest.mark.parametrize(("stage", "world"), [(1, 1), (2, 2), (3, 2)])
def test_rows_and_weights_skip_the_same_steps_while_the_loss_scale_changes(
    stage: int, world: int, tmp_path: Path
) -> None:
    """The scale begins far too high, falls, doubles every second step, and overflows again and again."""
    half = {"zero_stage": stage, "precision": "float16", "loss_scale_power": 18, "loss_scale_window": 2}
    results = run_ranks(_train, world, str(tmp_path), half)
    moved = results[0]["moved"]
    assert all(result["moved"] == moved for result in results)
    skipped = [step for step, applied in enumerate(moved) if not applied]
    assert len(skipped) > 2, "the fault did not fire"
    assert skipped[-1] - skipped[0] >= len(skipped), "steps between the skipped ones were applied"
    losses, table, _ = _plain_torch(str(tmp_path / "plain"), skipped=skipped)
    torch.testing.assert_close(torch.tensor(results[0]["losses"]), torch.tensor(losses), rtol=0.02, atol=0.02)
    # Adagrad's first step takes the sign of a gradient as a whole; half a percent of noise flips a few.
    near = (results[0]["rows"][:, :-1] - table).abs() < 0.02
    assert near.float().mean() > 0.97


@pytest.mark.dist
@pytest.mark.parametrize(
    ("before", "after"), [((1, 2), (1, 2)), ((1, 2), (2, 1)), ((1, 1), (1, 3)), ((2, 3), (3, 2))]
)
def test_resume_cuts_the_rows_anew(before: tuple[int, int], after: tuple[int, int], tmp_path: Path) -> None:
    (stage0, world0), (stage1, world1) = before, after
    whole = run_ranks(_train, world0, str(tmp_path / "whole"), {"zero_stage": stage0})[0]
    cut = run_ranks(_train, world0, str(tmp_path / "cut"), {"zero_stage": stage0}, 9)
    assert all(result["fired"] for result in cut)
    resumed = run_ranks(_train, world1, str(tmp_path / "cut"), {"zero_stage": stage1})[0]
    assert 0 < len(resumed["losses"]) < len(whole["losses"])
    tail = whole["losses"][-len(resumed["losses"]) :]
    if before == after:
        assert resumed["losses"] == tail
        assert torch.equal(resumed["rows"], whole["rows"])
    else:
        torch.testing.assert_close(torch.tensor(resumed["losses"]), torch.tensor(tail), rtol=1e-5, atol=0)
        torch.testing.assert_close(resumed["rows"], whole["rows"], rtol=1e-4, atol=1e-6)
