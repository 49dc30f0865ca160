"""Verdicts on a version, as tags: the last one in full, and a line for each of those before it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qbrec.registry.gate import Verdict

if TYPE_CHECKING:
    from mlflow import MlflowClient

VERDICT, REPORT, HISTORY = "qbrec.gate", "qbrec.gate.report", "qbrec.gate.history"
PASSED, REFUSED = "passed", "refused"
# Older ones go. MLflow takes 100,000 characters, some of its stores only 5,000.
_REPORTED = {"version", "champion", "gate", "time", "passed", "checks"}
MOST_ENTRIES, MOST_CHARACTERS = 20, 4_500


def note(client: MlflowClient, name: str, verdict: Verdict, *, tags: Mapping[str, str]) -> None:
    """Write a verdict on its version.

    Args:
        client: Of MLflow.
        name: The registered model.
        verdict: The verdict.
        tags: What the version has by now.
    """
    entries = [*history(tags), _entry(verdict)][-MOST_ENTRIES:]
    while len(text := json.dumps(entries)) > MOST_CHARACTERS and len(entries) > 1:
        entries = entries[1:]
    client.set_model_version_tag(name, verdict.version, HISTORY, text)
    client.set_model_version_tag(name, verdict.version, REPORT, verdict.to_json())
    client.set_model_version_tag(name, verdict.version, VERDICT, PASSED if verdict.passed else REFUSED)


def last(tags: Mapping[str, str]) -> dict[str, Any] | None:
    """The last verdict in full: version, champion, gate, time, passed, checks; None: never judged."""
    found = _parsed(tags, REPORT)
    return found if isinstance(found, dict) and found.keys() >= _REPORTED else None


def history(tags: Mapping[str, str]) -> list[dict[str, Any]]:
    """All verdicts that are still known, oldest first: time, gate, champion, passed, what was refused."""
    found = _parsed(tags, HISTORY)
    return found if isinstance(found, list) else []


def _entry(verdict: Verdict) -> dict[str, Any]:
    return {
        "time": verdict.time,
        "gate": verdict.gate,
        "champion": verdict.champion,
        "passed": verdict.passed,
        "refused": [check.name for check in verdict.checks if not check.passed],
    }


def _parsed(tags: Mapping[str, str], tag: str) -> Any:
    try:
        return json.loads(tags.get(tag, "null"))
    except ValueError:  # people can write tags too
        return None
