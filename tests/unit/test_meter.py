"""Where a step's time goes: phases add up, collectives are told apart, arithmetic is counted."""

from __future__ import annotations

import time

import pytest
import torch

from qbrec.engine.meter import PHASES, CollectiveTimes, StepMeter, collectives

CPU = torch.device("cpu")


def _steps(meter: StepMeter, number: int, *, total_ms: float) -> dict[str, float]:
    """Steps that wait 2 ms for data and take 3, 6 and 1 ms; a collective takes 4 of the 6."""
    for _ in meter.waiting(_slow(number)):
        with meter.step():
            with meter.phase("forward"):
                time.sleep(0.003)
            with meter.phase("backward"):
                time.sleep(0.006)
                if collectives.enabled:
                    collectives.append("all_reduce", "all_reduce", total_ms, 8)
            with meter.phase("optimizer"):
                time.sleep(0.001)
    return meter.report()


def _slow(number: int) -> list[int]:
    class Slow(list[int]):
        def __iter__(self):  # type: ignore[no-untyped-def]
            for item in range(number):
                time.sleep(0.002)
                yield item

    return Slow()


def test_phases_add_up_in_every_window() -> None:
    meter = StepMeter(CPU, precision="float32", window=5)
    collectives._totals.clear()
    for window in (1, 2, 3):
        found = _steps(meter, 5, total_ms=4.0 * window)  # DeepSpeed tells the sum of all calls so far
        phases = {name: found[f"time/{name}"] for name in PHASES if f"time/{name}" in found}
        assert phases["communication"] == pytest.approx(0.004)
        assert phases["backward"] >= 0.0019
        assert phases["forward"] >= 0.003
        assert all(seconds >= 0 for seconds in phases.values())
        assert 0.001 < found["data_wait"] * found["step_seconds"] < found["step_seconds"]
        assert found["time/data"] == pytest.approx(found["data_wait"] * found["step_seconds"])


def test_what_lies_between_steps_does_not_count() -> None:
    meter = StepMeter(CPU, precision="float32", window=10)
    for number in meter.waiting(range(4)):
        with meter.step():
            pass
        if number == 1:
            with meter.outside():
                time.sleep(0.2)
    assert meter.report()["step_seconds"] < 0.04


def test_arithmetic_of_a_step_is_counted_forward_and_backward() -> None:
    meter = StepMeter(CPU, precision="float32", window=2)
    linear = torch.nn.Linear(64, 32, bias=False)
    for _ in meter.waiting(range(2)):
        with meter.step():
            linear(torch.ones(16, 64, requires_grad=True)).sum().backward()
    assert meter._flops == 3 * 2 * 16 * 64 * 32
    found = meter.report()
    assert 0 < found["mfu"] < 1
    assert found["mfu"] == pytest.approx(meter._flops / found["step_seconds"] / meter._peak)


def test_nothing_to_report_without_a_step() -> None:
    assert StepMeter(CPU, precision="float32", window=2).report() == {}
    assert CollectiveTimes().seconds == 0.0
