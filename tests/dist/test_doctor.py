"""`qbrec doctor` as a whole, with its real all-reduce, which works and then does not."""

from __future__ import annotations

import json

import pytest

from qbrec.doctor.collectives import all_reduce
from tests.support.cli import qbrec


def test_the_doctor_names_what_fails_here_and_nothing_else() -> None:
    done = qbrec("doctor", "--set", "run.storage=/proc/storage", "--json", timeout=200)
    assert done.returncode == 5, done.stderr
    checks = {check["check"]: check for check in json.loads(done.stdout)["checks"]}
    failed = {name for name, check in checks.items() if check["level"] == "error"}
    assert failed - {"temporary"} == {"storage", "disk"}, checks  # this machine's own disk may be full
    assert "cannot write a file in /proc" in checks["storage"]["wrong"]
    assert checks["gloo"]["found"].startswith("2 processes summed a tensor")


def test_an_interface_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "missing0")
    found = all_reduce("gloo", world=2)
    assert found.level == "error"
    assert "missing0" in found.wrong
    assert "GLOO_SOCKET_IFNAME" in found.fix
