"""The versions of constraints.txt."""

from __future__ import annotations

from functools import cache

from tests.support.cli import ROOT


@cache
def pins() -> dict[str, str]:
    """Distribution (lower case, dashes) -> version."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {name.lower().replace("_", "-"): version for name, version in pairs}
