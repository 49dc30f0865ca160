"""Which cluster is meant, whether it may be sent code, and a connection to its job server."""

from __future__ import annotations

import ipaddress
import os
import socket
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from qbrec.errors import ConfigError, LaunchError, UnreachableError
from qbrec.jobs.deadline import within
from qbrec.jobs.token import HOW_TO, use_token

if TYPE_CHECKING:
    from qbrec.jobs.ray_client import JobClient

VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
CONNECT_S = 10.0  # until a connection stands
ANSWER_S = 30.0  # until the next byte of an answer
_EXAMPLE = "--address http://127.0.0.1:8265"


def cluster_address(given: str | None) -> str:
    """The address as given, else of RAY_API_SERVER_ADDRESS or RAY_ADDRESS, as with Ray's own commands.

    Returns:
        An address of the dashboard (`http://…`, `https://…`), or one of the cluster itself (`host:port`,
        `auto`), which Ray translates by asking there.

    Raises:
        ConfigError: There is none, or it is of another kind.
    """
    source, address = "--address", given
    for name in VARIABLES:
        if not address:
            source, address = name, os.environ.get(name)
    if not address:
        raise ConfigError(
            "no cluster is named",
            where=f"--address, {', '.join(VARIABLES)}",
            fix=f"name its dashboard, such as {_EXAMPLE}",
        )
    if "://" in address:
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(
                f"{_shown(address)!r} is not the address of a job server",
                where=source,
                fix=f"name the dashboard of the cluster, such as {_EXAMPLE}",
            )
        if parts.username or parts.password:
            raise ConfigError(
                "credentials do not belong into the address", where=source, fix=f"leave them out; {HOW_TO}"
            )
    return address.rstrip("/")


def check_safe(url: str, *, has_token: bool) -> None:
    """Refuse to send a run to a cluster that anybody on the way can reach: whoever does runs code on it.

    Raises:
        ConfigError: Plain http to another machine, and no token.
    """
    parts = urlsplit(url)
    if parts.scheme == "http" and not has_token and not _is_loopback(parts.hostname or ""):
        raise ConfigError(
            "this cluster is on another machine, and there is no token: who reaches it runs code on it",
            where=url,
            fix=f"{HOW_TO}; or use https, or an SSH tunnel (ssh -L 8265:127.0.0.1:8265 HEAD) and "
            "http://127.0.0.1:8265",
        )


def connect(
    given: str | None, *, submitting: bool = False, connect_s: float = CONNECT_S, answer_s: float = ANSWER_S
) -> JobClient:
    """A client of a cluster's job server that has answered.

    Args:
        given: See `cluster_address`.
        submitting: Whether code is to be sent there; see `check_safe`.
        connect_s: Seconds until a connection has to stand.
        answer_s: Seconds without a byte after which an answer is given up.

    Raises:
        ConfigError: There is no address or token, or code may not be sent there.
        LaunchError: It does not answer, refuses the token, or is no job server; or Ray is not installed.
    """
    address = cluster_address(given)
    has_token = use_token()
    if submitting and "://" in address:
        check_safe(address, has_token=has_token)  # before anything goes there
    try:
        from qbrec.jobs.ray_client import JobClient
    except ImportError as error:
        raise LaunchError(
            f"a cluster is reached through Ray, which is not installed ({error})",
            fix="pip install 'ray[default]', or install qbrec with its dependencies",
        ) from None
    try:
        _knock(address, connect_s)
        client = within(
            2 * (connect_s + answer_s), lambda: JobClient.connected(address, (connect_s, answer_s))
        )
    except OSError as error:
        raise unreachable(address, error) from None
    if submitting:
        check_safe(client.get_address(), has_token=has_token)
    return client


def unreachable(address: str, error: Exception) -> UnreachableError:
    """The error for a cluster that does not answer."""
    text = (str(error).splitlines() or [type(error).__name__])[0]
    return UnreachableError(
        f"the cluster does not answer: {text[:300]}",
        where=address,
        fix="is it up, and is this the address of its dashboard (`ray dashboard CLUSTER.yaml`, `kubectl "
        "port-forward` or an SSH tunnel bring it to http://127.0.0.1:8265)?",
    )


def _knock(address: str, seconds: float) -> None:
    """Whether anybody listens at `host:port`, where Ray would try for a minute and complain on the way."""
    host, separator, port = address.rpartition(":")
    if "://" not in address and separator and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), seconds).close()


def _shown(address: str) -> str:
    """Without what stands before an @."""
    scheme, separator, rest = address.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"


def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
