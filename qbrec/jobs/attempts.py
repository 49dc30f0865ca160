"""Runs as a cluster's jobs: each attempt of a run (storage, name) is one job with an id made from both.

Ray takes a submission id once. Two submitters who count the same attempts therefore ask for the same id, and
the second one is refused: the id is the lock.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qbrec.errors import LaunchError

if TYPE_CHECKING:
    from qbrec.jobs.ray_client import JobClient

RUN, STORAGE, STOP_WAIT = "qbrec_run", "storage", "stop_wait_s"  # keys of a job's metadata
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
STOPPED_CODE = 143  # of a driver that SIGTERM ended; Ray keeps no exit code of a job that it stopped
NO_CODE = LaunchError.exit_code  # the driver never came to an end, or never began
_ID = re.compile(r"qbrec-(?P<run>.+)-(?P<number>[1-9]\d*)")


@dataclass(frozen=True)
class Attempt:
    """One job of a run.

    Attributes:
        id: Ray's submission id.
        run: The run's name.
        storage: Its storage.
        number: 1 for the first attempt.
        status: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED.
        message: What Ray says about it; empty where the driver has spoken for itself.
        started: Seconds since 1970; None before.
        ended: Likewise.
        exit_code: What the driver ended with, as a shell would have it; None before it has ended.
        stop_wait_s: Seconds that Ray gives the driver once it is told to stop.
    """

    id: str
    run: str
    storage: str
    number: int
    status: str
    message: str
    started: float | None
    ended: float | None
    exit_code: int | None
    stop_wait_s: float

    @property
    def has_ended(self) -> bool:
        """Whether nothing will change any more."""
        return self.status in ENDED


def submission_id(run: str, number: int) -> str:
    """The id of an attempt; no two (run, number) share one."""
    return f"qbrec-{run}-{number}"


def attempts(client: JobClient) -> list[Attempt]:
    """All attempts of all runs that the cluster knows, in no order."""
    return [found for job in client.submissions() if (found := attempt_of(job)) is not None]


def attempt_of(job: Any) -> Attempt | None:
    """A job as an attempt (`job` is Ray's JobDetails); None for one that `qbrec submit` has not made."""
    matched = _ID.fullmatch(job.submission_id or "")
    metadata = job.metadata or {}
    if matched is None or metadata.get(RUN) != matched["run"] or STORAGE not in metadata:
        return None
    status = str(getattr(job.status, "value", job.status))
    return Attempt(
        id=job.submission_id,
        run=matched["run"],
        storage=metadata[STORAGE],
        number=int(matched["number"]),
        status=status,
        message=(job.message or "") if job.driver_exit_code is None else "",
        started=job.start_time / 1000 if job.start_time else None,
        ended=job.end_time / 1000 if job.end_time else None,
        exit_code=_exit_code(status, job.driver_exit_code),
        stop_wait_s=float(metadata.get(STOP_WAIT, 0)),
    )


def look_again(client: JobClient, attempt: Attempt) -> Attempt:
    """The same attempt as it is now."""
    found = attempt_of(client.get_job_info(attempt.id))
    assert found is not None
    return found


def same_run(storage: str) -> str:
    """A storage path as it identifies a run: without doubled or trailing slashes, links not followed."""
    return os.path.normpath(storage)


def newest(client: JobClient, name: str) -> Attempt:
    """The newest attempt of a run.

    Args:
        client: The cluster.
        name: Name of the run, or the id of one attempt, which is then returned.

    Raises:
        LaunchError: There is none, or runs of several storages have this name.
    """
    known = attempts(client)
    found = [a for a in known if a.id == name] or [a for a in known if a.run == name]
    if not found:
        runs = sorted({a.run for a in known})
        raise LaunchError(
            f"the cluster knows no run {name!r}",
            where=client.get_address(),
            fix=f"it knows {', '.join(runs)}" if runs else "none was sent there yet by `qbrec submit`",
        )
    storages = {a.storage: a for a in sorted(found, key=lambda a: a.number)}
    if len(storages) > 1:
        raise LaunchError(
            f"{len(storages)} runs have the name {name!r}",
            where="; ".join(storages),
            fix=f"name the attempt: {', '.join(a.id for a in storages.values())}",
        )
    return max(found, key=lambda a: a.number)


def next_number(client: JobClient, run: str) -> int:
    """Number of the next attempt: one more than any of this name, whatever its storage."""
    ids = (_ID.fullmatch(job.submission_id or "") for job in client.submissions())
    return 1 + max((int(found["number"]) for found in ids if found and found["run"] == run), default=0)


def _exit_code(status: str, driver: int | None) -> int | None:
    if status not in ENDED:
        return None
    if status == "STOPPED":
        return STOPPED_CODE
    if driver is None:
        return 0 if status == "SUCCEEDED" else NO_CODE
    return driver if driver >= 0 else 128 - driver  # minus the signal that ended it
