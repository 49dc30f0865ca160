"""A stage that dies in its middle, as a killed process does."""

from __future__ import annotations

import pytest

from qbrec.engine.context import StageContext


class Killed(Exception):
    """What the stage dies of."""


def die_at_report(monkeypatch: pytest.MonkeyPatch, number: int) -> list[str]:
    """Let the stage die when it reports its step of this number, counted from 1; later ones go through.

    Returns:
        Names of the steps reported, in order; it grows as they come.
    """
    log = StageContext.log_metrics
    seen: list[str] = []

    def dying(self: StageContext, step: int, metrics: dict[str, float]) -> None:
        seen.append(next(iter(metrics)).split("/")[0])
        if len(seen) == number:
            raise Killed
        log(self, step, metrics)

    monkeypatch.setattr(StageContext, "log_metrics", dying)
    return seen
