"""How a run's model stands to the one that serves: what whoever promotes it wants to know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qbrec.ranking import METRICS
from qbrec.registry.comparison import Comparison, Evaluated, Paired, same_hold_out
from qbrec.registry.metrics import HEADLINE


@dataclass(frozen=True)
class Rival:
    """The version to compare with.

    Attributes:
        version: Its number.
        run: Name of its run; empty where nobody noted it.
        serves: Whether it is @champion; otherwise it served until this run's model took its place.
        metrics: Its evaluation, layout of `evaluation.results`; empty where it cannot be read.
        paired: This run's model minus it, user by user: every metric, and the headline on every slice as
            `tail/ndcg@10`.
        problem: Why users cannot be paired; empty where they are.
    """

    version: str
    run: str
    serves: bool
    metrics: Mapping[str, Any] = field(default_factory=dict)
    paired: Mapping[str, Paired] = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True)
class Standing:
    """What the registry says of a run's model.

    Attributes:
        model: The registered model.
        version: Number of the version that this run is; None: it is not registered.
        serves: Whether that is @champion.
        verdict: What a gate last said of it, layout of `verdicts.last`; None: no gate was asked.
        rival: Whom it would replace, or replaced; None: nobody.
        problem: Why the registry could not be asked; all else is empty then.
    """

    model: str
    version: str | None = None
    serves: bool = False
    verdict: Mapping[str, Any] | None = None
    rival: Rival | None = None
    problem: str = ""


def paired_with(ours: Evaluated, theirs: Evaluated, *, seed: int) -> tuple[dict[str, Paired], str]:
    """Differences of two evaluations, or why there are none.

    Args:
        ours: Of the run.
        theirs: Of the version that it is compared with.
        seed: Of the bootstrap.

    Returns:
        `paired` and `problem`, as `Rival` has them.

    Raises:
        DataError: One of them is damaged.
    """
    if not same_hold_out(ours, theirs):
        return {}, "it was evaluated on other items or histories, so users cannot be paired"
    comparison = Comparison(ours.evaluation, theirs.evaluation, seed=seed)
    if comparison.problem:
        return {}, comparison.problem
    names = [*METRICS, *(f"{part}/{HEADLINE}" for part in comparison.slices)]
    found = {name: comparison.of(name) for name in names}
    return {name: one for name, one in found.items() if isinstance(one, Paired)}, ""
