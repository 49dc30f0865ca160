"""ZeRO 0 to 3 and plain torch give the same losses, on 1 and 2 ranks; a resumed run gives the same bits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from qbrec.config.sections import ComputeConfig
from qbrec.config.stages import TrainConfig
from qbrec.engine import step
from qbrec.engine.checkpoint import Checkpoints
from qbrec.engine.context import StageContext
from qbrec.engine.preemption import ask_to_stop
from qbrec.engine.schedule import schedule
from qbrec.engine.state import loss_scale
from qbrec.engine.train import train
from qbrec.errors import CheckpointError, Preempted, QbrecError
from qbrec.storage.artifact import ArtifactStore
from tests.support.half import allow_half
from tests.support.spawn import run_ranks
from tests.support.training import Interrupted, ToyLoader, ToyTask

CONFIG = TrainConfig(
    epochs=4, batch_size=8, micro_batch=2, learning_rate=1e-2, checkpoint_every=3, keep_checkpoints=99
)


def _context(
    rank: int, world: int, folder: str, stage: int, compute: dict[str, Any] | None = None
) -> StageContext:
    Path(folder).mkdir(parents=True, exist_ok=True)
    return StageContext(
        store=ArtifactStore(folder),
        run_dir=Path(folder),
        stage="toy",
        key="k" * 64,
        seed=3,
        rank=rank,
        world=world,
        compute=ComputeConfig(
            **{"zero_stage": stage, "device": "cpu", "precision": "float32", **(compute or {})}
        ),
    )


def _train(
    rank: int, world: int, folder: str, stage: int, stop_at: int = 0, compute: dict[str, Any] | None = None
) -> dict[str, Any]:
    allow_half()
    task, loader, scales = ToyTask(), ToyLoader(rank, world, stop_at=stop_at), []
    ctx = _context(rank, world, folder, stage, compute)

    def noted(engine: Any) -> float:
        scales.append(loss_scale(engine))
        return scales[-1]

    usual, step.loss_scale = step.loss_scale, noted
    try:
        result = train(ctx, task, loader, config=CONFIG, label="toy")
    except Interrupted:
        return {"fired": True}
    finally:
        step.loss_scale = usual
    return {"losses": result.losses, "weights": task.module.state_dict(), "fired": False, "scales": scales}


def _plain_torch() -> list[float]:
    """The same training, written down without engine, ranks or accumulation of ours."""
    task, loader = ToyTask(), ToyLoader(0, 1)
    module = copy.deepcopy(task.module)
    matrices = [p for p in module.parameters() if p.ndim >= 2]
    vectors = [p for p in module.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": CONFIG.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=CONFIG.betas)
    context = StageContext.local(ArtifactStore("unused"), "/tmp", stage="toy", seed=3)
    losses: list[float] = []
    for epoch in range(CONFIG.epochs):
        for micro_batches in loader.iterate(epoch):
            prepared = [task.prepare(b, torch.device("cpu")) for b in micro_batches if b is not None]
            count = sum(float(c) for _, c in prepared)
            total = torch.zeros(())
            for place, (batch, _) in enumerate(prepared):
                torch.manual_seed(context.sub_seed(f"toy/dropout/{len(losses)}/{place}"))
                total = total + task.loss(module, batch) / count
            optimizer.zero_grad()
            total.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), CONFIG.clip_norm)
            for group in optimizer.param_groups:
                group["lr"] = CONFIG.learning_rate * schedule(
                    CONFIG, len(losses), CONFIG.epochs * loader.steps_per_epoch
                )
            optimizer.step()
            losses.append(float(total.detach()))
    return losses


@pytest.mark.dist
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_losses_equal_plain_torch(stage: int, world: int, tmp_path: Path) -> None:
    expected = _plain_torch()
    assert len(expected) == 20
    for result in run_ranks(_train, world, str(tmp_path), stage):
        torch.testing.assert_close(torch.tensor(result["losses"]), torch.tensor(expected), rtol=1e-5, atol=0)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((1, 2), (1, 2)), ((2, 3), (2, 3)), ((3, 2), (3, 2)), ((1, 2), (3, 1)),
        ((1, 1), (2, 2)), ((2, 2), (1, 3)), ((3, 2), (1, 3)), ((1, 3), (3, 2)), ((3, 2), (0, 1)),
    ],
)  # fmt: skip
def test_resume(before: tuple[int, int], after: tuple[int, int], tmp_path: Path) -> None:
    """(ZeRO stage, ranks) of a run that is cut off, and of the one that goes on with it."""
    (stage0, world0), (stage1, world1) = before, after
    whole = run_ranks(_train, world0, str(tmp_path / "whole"), stage0)[0]
    cut = run_ranks(_train, world0, str(tmp_path / "cut"), stage0, 8)
    assert all(result["fired"] for result in cut)
    assert not (tmp_path / "cut" / "checkpoints" / "toy" / "step-20").exists()
    resumed = run_ranks(_train, world1, str(tmp_path / "cut"), stage1)[0]
    assert 0 < len(resumed["losses"]) < 20
    tail = whole["losses"][-len(resumed["losses"]) :]
    if before == after:
        assert resumed["losses"] == tail
        for name, weight in whole["weights"].items():
            assert torch.equal(weight, resumed["weights"][name]), name
    else:
        torch.testing.assert_close(torch.tensor(resumed["losses"]), torch.tensor(tail), rtol=1e-5, atol=0)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("before", "after"), [((1, 2), (1, 2)), ((1, 1), (2, 2)), ((2, 2), (3, 1)), ((3, 2), (1, 1))]
)
def test_resume_in_fp16_with_its_loss_scale(
    before: tuple[int, int], after: tuple[int, int], tmp_path: Path
) -> None:
    """The scale has fallen several times before the cut, and rises again after it: every second good step."""
    half = {"precision": "float16", "loss_scale_power": 24, "loss_scale_window": 2}
    (stage0, world0), (stage1, world1) = before, after
    whole = run_ranks(_train, world0, str(tmp_path / "whole"), stage0, 0, half)[0]
    assert all(r["fired"] for r in run_ranks(_train, world0, str(tmp_path / "cut"), stage0, 14, half))
    resumed = run_ranks(_train, world1, str(tmp_path / "cut"), stage1, 0, half)[0]
    number = len(resumed["losses"])
    assert 0 < number < 20
    assert resumed["scales"] == whole["scales"][-number:]
    assert len(set(resumed["scales"])) > 1, "the scale did not change after the cut"
    assert max(whole["scales"]) > max(resumed["scales"])
    if before == after:
        assert resumed["losses"] == whole["losses"][-number:]
    else:
        tail = torch.tensor(whole["losses"][-number:])
        torch.testing.assert_close(torch.tensor(resumed["losses"]), tail, rtol=0.01, atol=0.01)


def _stopped(rank: int, world: int, folder: str, stop_after: int) -> dict[str, Any]:
    """Train with evaluation and early stopping in sight; asked to stop after some steps, then go on."""
    seen = {"evaluations": 0}

    def evaluate(module: torch.nn.Module) -> dict[str, float]:
        seen["evaluations"] += 1
        return {"score": -float(next(module.parameters()).square().sum())}

    ended = []
    for attempt in range(2):
        loader = ToyLoader(rank, world)
        if attempt == 0 and stop_after:
            usual = loader.iterate

            def iterate(epoch: int, *, start: int = 0, usual: Any = usual) -> Any:
                for step, batches in enumerate(usual(epoch, start=start), start=epoch * 5 + start):
                    if step + 1 == stop_after:
                        ask_to_stop("the test")
                    yield batches

            loader.iterate = iterate  # type: ignore[method-assign]
        ctx = _context(rank, world, folder, 1)
        try:
            result = train(
                ctx, ToyTask(), loader, config=CONFIG, label="toy", evaluate=evaluate, monitor="score"
            )
            return {"curve": result.curve, "best": result.best, "ended": ended, "losses": result.losses}
        except Preempted:
            ended.append(Checkpoints(ctx, keep=9).steps()[-1])
    raise AssertionError("stopped twice")


@pytest.mark.dist
@pytest.mark.parametrize("stop_after", [3, 5, 10, 20])
def test_a_stop_costs_no_evaluation(stop_after: int, tmp_path: Path) -> None:
    """In the middle of an epoch, at its last step, and at the very last one."""
    (whole,) = run_ranks(_stopped, 1, str(tmp_path / "whole"), 0)
    (stopped,) = run_ranks(_stopped, 1, str(tmp_path / "stopped"), stop_after)
    assert stopped["ended"] == [stop_after], "the request was not heard"
    assert len(whole["curve"]) == 4
    assert (stopped["curve"], stopped["best"]) == (whole["curve"], whole["best"])
    assert stopped["losses"] == whole["losses"][stop_after:]


def _nan(rank: int, world: int, folder: str) -> str:
    task, loader = ToyTask(), ToyLoader(rank, world)
    if rank == world - 1:
        loader.y[5] = torch.nan
    try:
        train(_context(rank, world, folder, 1), task, loader, config=CONFIG, label="toy")
    except QbrecError as error:
        return str(error)
    return ""


@pytest.mark.dist
def test_a_nan_on_one_rank_stops_all(tmp_path: Path) -> None:
    messages = run_ranks(_nan, 2, str(tmp_path))
    assert all("nan" in message and "learning_rate" in message for message in messages)


def _other_data(rank: int, world: int, folder: str, stop_at: int) -> list[str]:
    """Train on 37 samples (cut off before step `stop_at`), go on with 38, go on with the 37."""
    config = CONFIG.model_copy(update={"epochs": 1})
    seen = []
    for options in ({"stop_at": stop_at}, {"n": 38}, {}):
        loader = ToyLoader(rank, world, **options)
        try:
            train(_context(rank, world, folder, 0), ToyTask(), loader, config=config, label="toy")
            seen.append("trained")
        except Interrupted:
            seen.append("interrupted")
        except CheckpointError as error:
            seen.append(str(error))
    return seen


@pytest.mark.dist
@pytest.mark.parametrize("stop_at", [4, 0])
def test_a_checkpoint_of_other_data_is_refused(stop_at: int, tmp_path: Path) -> None:
    ((first, refused, last),) = run_ranks(_other_data, 1, str(tmp_path), stop_at)
    assert (first, last) == ("interrupted" if stop_at else "trained", "trained")
    assert "other data" in refused
    assert str(tmp_path / "checkpoints" / "toy") in refused
