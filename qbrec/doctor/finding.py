"""What a check found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from qbrec.errors import QbrecError

Level = Literal["ok", "warning", "error"]
MARKS: dict[Level, str] = {"ok": "✓", "warning": "!", "error": "✗"}
_NAME_WIDTH = 14


@dataclass(frozen=True)
class Finding:
    """One line of the doctor.

    Attributes:
        check: What was looked at.
        level: `error`: a run fails on it; `warning`: a run works, but slower, less safely or not in full.
        found: What was found.
        wrong: What is wrong with that.
        fix: How to mend it.
    """

    check: str
    level: Level
    found: str
    wrong: str = ""
    fix: str = ""

    def __post_init__(self) -> None:
        assert (self.level == "ok") == (not self.wrong) == (not self.fix)


def ok(check: str, found: str) -> Finding:
    """Nothing is wrong."""
    return Finding(check, "ok", found)


def warning(check: str, found: str, *, wrong: str, fix: str) -> Finding:
    """A run works, but not as it should."""
    return Finding(check, "warning", found, wrong, fix)


def failure(check: str, found: str, *, wrong: str, fix: str) -> Finding:
    """A run fails on it."""
    return Finding(check, "error", found, wrong, fix)


def of_error(check: str, error: QbrecError, *, level: Level = "error") -> Finding:
    """An error that a run would meet, as a finding."""
    return Finding(check, level, error.where or "", error.what, error.fix or "see the message")


def text(findings: Sequence[Finding]) -> str:
    """All findings for a terminal, with a sum below."""
    lines = []
    for finding in findings:
        lines.append(f"{MARKS[finding.level]} {finding.check:<{_NAME_WIDTH}} {finding.found}".rstrip())
        if finding.level != "ok":
            indent = " " * (_NAME_WIDTH + 3)
            lines += [f"{indent}{finding.wrong}", f"{indent}fix: {finding.fix}"]
    failed, warned = (sum(f.level == level for f in findings) for level in ("error", "warning"))
    lines.append(f"\n{len(findings)} checks: {failed} fail, {warned} to look at")
    return "\n".join(lines)


def document(findings: Sequence[Finding]) -> dict[str, Any]:
    """All findings for JSON."""
    return {"ok": is_healthy(findings), "checks": [asdict(finding) for finding in findings]}


def is_healthy(findings: Sequence[Finding]) -> bool:
    """Whether nothing keeps a run from working."""
    return not any(finding.level == "error" for finding in findings)
