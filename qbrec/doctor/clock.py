"""This machine's clock against those of the storage, its remote home and the MLflow server."""

from __future__ import annotations

import http.client
import time
import urllib.error
from collections.abc import Callable, Mapping
from email.message import Message
from email.utils import parsedate_to_datetime
from pathlib import Path

from qbrec.config import RootConfig
from qbrec.doctor.finding import Finding, failure, ok, warning
from qbrec.doctor.storage import existing_parent, probe_local, probe_remote
from qbrec.doctor.tracking import ask
from qbrec.errors import QbrecError

_SOME_S, _MUCH_S = 5.0, 300.0  # object stores refuse what is signed a quarter of an hour off
_FIX = "let a time service set the clocks of all machines: timedatectl set-ntp true, or chrony"


def check_clock(config: RootConfig) -> Finding:
    """How far the clocks are apart that a run compares or signs with. Who does not answer is left out."""
    probes: dict[str, Callable[[], float]] = {
        "storage": lambda: probe_local(existing_parent(Path(config.run.storage)))
    }
    remote, uri = config.run.remote, config.tracking.uri
    if remote is not None:
        probes["remote storage"] = lambda: probe_remote(remote)
    if config.tracking.enabled and uri is not None and uri.startswith(("http://", "https://")):
        probes["MLflow server"] = lambda: _server_ahead(uri)
    ahead = {}
    for name, probe in probes.items():
        try:
            ahead[name] = probe()
        except (OSError, QbrecError, http.client.HTTPException, ValueError):
            continue  # the check of that very place says so
    return skew_finding(ahead)


def skew_finding(ahead: Mapping[str, float]) -> Finding:
    """What seconds by which other clocks are ahead mean."""
    if not ahead:
        return ok("clock", "no other clock answers")
    found = ", ".join(f"{name} {round(seconds, 1) + 0.0:+.1f} s" for name, seconds in ahead.items())
    worst = max(map(abs, ahead.values()))
    wrong = f"the clocks differ by {worst:.0f} s: times in logs and files contradict each other"
    if worst > _MUCH_S:
        return failure("clock", found, wrong=f"{wrong}, and object stores refuse what we sign", fix=_FIX)
    if worst > _SOME_S:
        return warning("clock", found, wrong=wrong, fix=_FIX)
    return ok("clock", found)


def _server_ahead(uri: str) -> float:
    """Seconds by which a server's clock is ahead, from its Date header, which cuts off fractions.

    Raises:
        OSError: It does not answer.
        ValueError: It does not tell.
    """
    before = time.time()
    headers: Message
    try:
        _, headers = ask(uri, "/health")
    except urllib.error.HTTPError as error:
        headers = error.headers
    middle = (before + time.time()) / 2
    date = headers["Date"]
    if date is None:
        raise ValueError("no Date header")
    return parsedate_to_datetime(date).timestamp() + 0.5 - middle
