"""Stop a run so that it loses nothing: its driver gets SIGTERM, writes a checkpoint and ends."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from qbrec.errors import LaunchError, UnreachableError
from qbrec.jobs.attempts import Attempt, look_again

if TYPE_CHECKING:
    from qbrec.jobs.ray_client import JobClient

_LOOK_EVERY_S = 1.0
_MARGIN_S = 60.0  # beyond what Ray waits for the driver: it then kills it, and notes that


def stop(client: JobClient, attempt: Attempt, *, margin_s: float = _MARGIN_S) -> Attempt:
    """Ask an attempt to stop and wait until it has ended.

    Args:
        client: The cluster.
        attempt: One that has not ended.
        margin_s: Seconds to wait after Ray should have killed it.

    Returns:
        The attempt as it ended.

    Raises:
        LaunchError: It still runs, or the cluster does not answer.
    """
    deadline = time.monotonic() + attempt.stop_wait_s + margin_s
    heard = False
    while True:
        try:
            # A job that is about to begin has nobody yet who hears it.
            heard = heard or client.stop_job(attempt.id)
            now = look_again(client, attempt)
            if now.has_ended:
                return now
        except UnreachableError:
            if time.monotonic() > deadline:
                raise
        if time.monotonic() > deadline:
            raise LaunchError(
                f"{attempt.id} has not ended {attempt.stop_wait_s + margin_s:g} s after it was told to stop",
                where=client.get_address(),
                fix=f"`qbrec status {attempt.run}` shows what it does; the same command asks again",
            )
        time.sleep(_LOOK_EVERY_S)
