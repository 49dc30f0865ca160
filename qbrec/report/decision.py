"""The chapter for whoever decides: what the registry says of the model, whom it would replace, the gate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qbrec.registry.standing import Rival, Standing
from qbrec.report.blocks import Block, Row, Section, cells
from qbrec.storage.artifact import Artifact


def decision(artifacts: Mapping[str, Artifact], standing: Standing | None) -> Section | None:
    """May it go live? None where nothing has been evaluated."""
    if "evaluation" not in artifacts:
        return None
    if standing is None:
        texts = ["This run has no registry: tracking or the registry is switched off, or was not asked."]
        return Section("decision", "Going live", texts=texts)
    if standing.problem:
        texts = [f"The registry could not be asked: {standing.problem}"]
        return Section("decision", "Going live", texts=texts)
    verdict = standing.verdict
    blocks = [] if verdict is None else [_verdict(verdict)]
    return Section("decision", "Going live", texts=[_place(standing), *_compared(standing)], blocks=blocks)


def comparable(standing: Standing | None) -> Rival | None:
    """The version that this run is compared with user by user, if there is one."""
    rival = None if standing is None else standing.rival
    return rival if rival is not None and rival.paired else None


def rival_name(rival: Rival) -> str:
    """What it is called in tables."""
    return f"{'champion' if rival.serves else 'former champion'}, version {rival.version}"


def _place(standing: Standing) -> str:
    if standing.version is None:
        return f"This run is not registered as a version of {standing.model!r}: qbrec register does that."
    what = f"This run is version {standing.version} of {standing.model!r}"
    if standing.serves:
        return f"{what}, the champion: it serves."
    if standing.verdict is None:
        return f"{what}. No gate has been asked yet: qbrec promote asks it."
    return f"{what}. It does not serve."


def _compared(standing: Standing) -> Sequence[str]:
    rival = standing.rival
    if rival is None:
        return ["There is no champion to compare it with."]
    who = f"the {rival_name(rival)}" + (f" (run {rival.run})" if rival.run else "")
    if rival.problem:
        return [f"It is not compared with {who}: {rival.problem}."]
    return [f"The results compare it with {who}, on the same users."]


def _verdict(verdict: Mapping[str, Any]) -> Block:
    said = "yes" if verdict["passed"] else "no"
    beside = "with no champion" if verdict["champion"] is None else f"beside version {verdict['champion']}"
    rows = [
        Row(cells((check["name"], "yes" if check["passed"] else "no", check["reason"])))
        for check in verdict["checks"]
    ]
    return Block(
        title=f"The gate {verdict['gate']} said {said}",
        text=f"Asked on {verdict['time']}, {beside}.",
        head=("question", "answer", "why"),
        rows=rows,
        numeric=frozenset({1}),
    )
