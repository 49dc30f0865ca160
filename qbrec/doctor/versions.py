"""Python and the packages, against the ranges that qbrec's own metadata asks for."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from qbrec.doctor.finding import Finding, failure, ok, warning

SHOWN = ("torch", "deepspeed", "ray", "mlflow", "numpy", "pyarrow")  # each has a line of its own
_WITHOUT = {
    "ray": "no clusters and no building of catalogues; `torchrun -m qbrec …` trains on finished ones",
    "mlflow": "nothing is tracked or registered (tracking.enabled=false)",
}
_INSTALL = "pip install --constraint constraints.txt ."


def check_versions() -> list[Finding]:
    """Python and all packages that qbrec needs."""
    try:
        needed, python = metadata.requires("qbrec") or [], metadata.metadata("qbrec")["Requires-Python"]
    except metadata.PackageNotFoundError:
        return [
            warning(
                "versions",
                f"python {platform.python_version()}",
                wrong="qbrec is not installed, so that nothing says which versions it needs",
                fix=f"{_INSTALL} (from the root of the repository)",
            )
        ]
    return [python_finding(python), *package_findings(needed)]


def python_finding(wanted: str, *, version: str | None = None) -> Finding:
    """Whether Python (this one unless told) is of the range `wanted`, such as `>=3.11`."""
    version = version or platform.python_version()
    if SpecifierSet(wanted).contains(version, prereleases=True):
        return ok("python", f"{version} ({wanted})")
    return failure(
        "python",
        version,
        wrong=f"qbrec needs {wanted}",
        fix="install it, and make the environment anew with it (PYTHON=… bash launch/quickstart.sh)",
    )


def package_findings(needed: Iterable[str]) -> list[Finding]:
    """A line for each package of `SHOWN` and each that is wrong, one for all others.

    Args:
        needed: Requirements as package metadata has them; those of extras are left out.
    """
    findings, others = [], 0
    for requirement in map(Requirement, needed):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        finding = _finding(requirement)
        if finding.level == "ok" and requirement.name not in SHOWN:
            others += 1
        else:
            findings.append(finding)
    findings.sort(key=lambda f: SHOWN.index(f.check) if f.check in SHOWN else len(SHOWN))
    return [*findings, ok("packages", f"{others} others within their ranges")] if others else findings


def _finding(requirement: Requirement) -> Finding:
    name, wanted = requirement.name, str(requirement.specifier)
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        make = warning if name in _WITHOUT else failure
        return make(
            name,
            "not installed",
            wrong=f"without it: {_WITHOUT[name]}" if name in _WITHOUT else f"qbrec needs {name}{wanted}",
            fix=f"pip install '{name}{wanted}'",
        )
    if requirement.specifier.contains(version, prereleases=True):
        return ok(name, f"{version} ({wanted})")
    return failure(
        name, version, wrong=f"qbrec is written for {name}{wanted}", fix=f"pip install '{name}{wanted}'"
    )
