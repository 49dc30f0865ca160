"""Ray's client of the job server, with answers that come in time and errors that say what to do."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from ray.exceptions import AuthenticationError, RayError
from ray.job_submission import JobDetails, JobSubmissionClient

from qbrec.errors import LaunchError, UnreachableError
from qbrec.jobs.cluster import VARIABLES, unreachable
from qbrec.jobs.token import HOW_TO

_CHATTY = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
    "ray._private.runtime_env.working_dir",
)


class JobClient(JobSubmissionClient):
    """`JobSubmissionClient` whose every request ends.

    Args:
        address: See `cluster.cluster_address`.
        timeout: Seconds until a connection stands, and until the next byte of an answer.
    """

    def __init__(self, address: str, timeout: tuple[float, float]) -> None:
        self._timeout = timeout
        for name in _CHATTY:
            logging.getLogger(name).setLevel(logging.ERROR)
        with _variables_out_of_the_way():
            super().__init__(address, verify=os.environ.get("REQUESTS_CA_BUNDLE") or True)

    @classmethod
    def connected(cls, address: str, timeout: tuple[float, float]) -> JobClient:
        """A client whose server has answered as Ray's does.

        Raises:
            LaunchError: It has not.
        """
        try:
            return cls(address, timeout)
        except (ConnectionError, RayError) as error:  # of an address that Ray has to translate
            raise unreachable(address, error) from None
        except (OSError, RuntimeError, ValueError, KeyError, AssertionError) as error:
            text = (str(error).splitlines() or [type(error).__name__])[0]
            raise LaunchError(
                f"what answers there is not Ray's job server: {text[:300]}",
                where=address,
                fix="name the dashboard of the cluster (port 8265 unless it was started with another one)",
            ) from None

    def submissions(self) -> list[JobDetails]:
        """All jobs that were submitted, running or not."""
        return [job for job in self.list_jobs() if job.submission_id]

    @property
    def ray_version(self) -> str:
        """Version of Ray that the cluster runs."""
        return str(self._server_ray_version)

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        """Every request of the client goes through here."""
        try:
            return super()._do_request(method, endpoint, timeout=self._timeout, **options)
        except AuthenticationError as error:
            raise LaunchError(
                f"the cluster does not let us in: {str(error).splitlines()[0]}",
                where=self._address,
                fix=HOW_TO,
            ) from None
        except OSError as error:  # all errors of `requests` are
            raise unreachable(self._address, error) from None

    def _raise_error(self, r: Any) -> NoReturn:
        """An answer that is an error; Ray's has a traceback, whose last line says it."""
        lines = [line for line in r.text.splitlines() if line.strip()] or ["(no text)"]
        # A proxy says so when there is nobody behind it.
        kind = UnreachableError if r.status_code in (502, 503, 504) else LaunchError
        raise kind(f"the cluster answers {r.status_code}: {lines[-1][:500]}", where=self._address)


@contextmanager
def _variables_out_of_the_way() -> Iterator[None]:
    """Ray's client prefers these variables to the address it is given; ours has been chosen already."""
    kept = {name: os.environ.pop(name) for name in VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)
