"""Pictures over http(s), from allowed hosts at public addresses only.

The host is resolved once per request, every address is checked, and the connection goes to an address that
was checked: a name that changes its address between check and connection (DNS rebinding) gains nothing.
Redirects take the same road. Proxies of the environment are not used.
"""

from __future__ import annotations

import http.client
import ipaddress
import random
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from urllib.parse import quote, urljoin, urlsplit

from qbrec import __version__
from qbrec.catalog.encoders.image import BadImageError
from qbrec.config.sections import ImageConfig

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

MAX_REDIRECTS = 3
MAX_PAUSE_S = 30.0  # however long a server asks us to wait
_FIRST_PAUSE_S = 0.5
_PIECE = 1 << 16
_UNSAFE = re.compile(r"[\x00-\x1f\x7f\\]")
_HOST = re.compile(r"(?=.{1,253}$)([a-z0-9_-]{1,63}\.)*[a-z0-9_-]{1,63}")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# The platform of Azure answers virtual machines at this otherwise public address.
_PLATFORM = frozenset({ipaddress.ip_address("168.63.129.16")})


class _TransientError(Exception):
    """Another attempt may succeed, after `pause_s` seconds if the server said so."""

    def __init__(self, pause_s: float | None = None) -> None:
        self.pause_s = pause_s
        super().__init__(pause_s)


def is_public(address: Address) -> bool:
    """Whether an address may be fetched from: not private, loopback, link-local, reserved or multicast."""
    if isinstance(address, ipaddress.IPv6Address):
        if address in _NAT64:  # how a network without IPv4 writes an IPv4 address
            return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if address.ipv4_mapped or address.sixtofour or address.teredo or address.is_site_local:
            return False
    local = address.is_private or address.is_loopback or address.is_link_local or address.is_unspecified
    if local or address.is_multicast or address.is_reserved or address in _PLATFORM:
        return False
    return bool(address.is_global)


def addresses_of(host: str, port: int) -> list[str]:
    """Addresses of a host name, by the system's resolver; raises socket.gaierror."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(info[4][0]) for info in found))


@dataclass(frozen=True)
class _Target:
    scheme: str
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        default = {"http": 80, "https": 443}[self.scheme]
        return self.host if self.port == default else f"{self.host}:{self.port}"


class WebFetcher:
    """Fetches pictures by URL; safe to share between threads.

    Args:
        config: Allowed hosts, limits and time-outs.
        allow: Which addresses may be connected to.
        resolve: Addresses of (host, port).
        ports: Ports that may be connected to.
        context: For https; None: the system's trust store.
        sleep: Waits so many seconds before another attempt.
    """

    def __init__(
        self,
        config: ImageConfig,
        *,
        allow: Callable[[Address], bool] = is_public,
        resolve: Callable[[str, int], Sequence[str]] = addresses_of,
        ports: Collection[int] = (80, 443),
        context: ssl.SSLContext | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._config, self._allow, self._resolve, self._ports = config, allow, resolve, ports
        self._sleep = sleep
        self._context = context if context is not None or not config.hosts else ssl.create_default_context()

    def fetch(self, url: str) -> bytes:
        """The bytes behind a URL.

        Raises:
            BadImageError: It is not allowed, not there, too large, or its server fails too often.
        """
        deadline = time.monotonic() + self._config.total_timeout_s
        for attempt in range(self._config.retries + 1):
            try:
                return self._follow(url, deadline)
            except _TransientError as error:
                # Shares of it at random, so that all tasks do not come back to a busy server at once.
                pause = _FIRST_PAUSE_S * 2**attempt * random.uniform(0.5, 1.0)
                pause = min(pause if error.pause_s is None else error.pause_s, MAX_PAUSE_S)
                if attempt == self._config.retries or time.monotonic() + pause >= deadline:
                    break
                self._sleep(pause)
        raise BadImageError("could not be fetched: its server fails or is too slow")

    def _follow(self, url: str, deadline: float) -> bytes:
        target = self._target(url)
        for _ in range(MAX_REDIRECTS + 1):
            body, location = self._get(target, deadline)
            if location is None:
                return body
            url = urljoin(f"{target.scheme}://{target.authority}{target.path}", location)
            following = self._target(url)
            if target.scheme == "https" and following.scheme == "http":
                raise BadImageError("is redirected from https to http")
            target = following
        raise BadImageError("redirects too often")

    def _target(self, url: str) -> _Target:
        """The parts of a URL, after all that can be checked without the network."""
        try:
            if _UNSAFE.search(url):
                raise ValueError
            parts = urlsplit(url)
            port = parts.port or {"http": 80, "https": 443}[parts.scheme]
            host = (parts.hostname or "").removesuffix(".")
        except (ValueError, KeyError):
            raise BadImageError("is not a usable URL") from None
        # User names before the host (http://good@bad/) serve only to deceive.
        if "@" in parts.netloc or not host:
            raise BadImageError("is not a usable URL")
        if _HOST.fullmatch(host) is None or not self._listed(host):
            raise BadImageError("names a host that is not in catalog.image.hosts")
        if port not in self._ports:
            raise BadImageError("is not a usable URL")
        path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~")
        query = quote(parts.query, safe="/?%:@!$&'()*+,;=~[]")
        return _Target(parts.scheme, host, port, f"{path}?{query}" if query else path)

    def _listed(self, host: str) -> bool:
        return any(
            host.endswith(pattern[1:]) if pattern.startswith("*.") else host == pattern
            for pattern in self._config.hosts
        )

    def _get(self, target: _Target, deadline: float) -> tuple[bytes, str | None]:
        """One request: the body, or where the server redirects to."""
        sock = self._connect(target, deadline)
        if target.scheme == "https":
            assert self._context is not None
            sock = self._context.wrap_socket(sock, server_hostname=target.host, do_handshake_on_connect=False)
        # A server that sends one byte now and then would never run into the time-out of a single read.
        watchdog = threading.Timer(max(deadline - time.monotonic(), 0.0), _cut, [sock])
        watchdog.daemon = True
        watchdog.start()
        connection = http.client.HTTPConnection(target.host, target.port)
        connection.sock = sock
        headers = {
            "Host": target.authority, "User-Agent": f"qbrec/{__version__}", "Accept": "image/*",
            "Accept-Encoding": "identity", "Connection": "close",
        }  # fmt: skip
        try:
            if isinstance(sock, ssl.SSLSocket):
                sock.do_handshake()
            sock.settimeout(self._config.read_timeout_s)
            connection.request("GET", target.path, headers=headers)
            return self._answer(connection.getresponse(), deadline)
        except ssl.SSLCertVerificationError:
            raise BadImageError("comes from a server whose certificate is not trusted") from None
        except (OSError, http.client.HTTPException):
            raise _TransientError from None
        finally:
            watchdog.cancel()
            connection.close()

    def _connect(self, target: _Target, deadline: float) -> socket.socket:
        """A connection to one of the host's addresses, after all of them were checked."""
        try:
            found = [ipaddress.ip_address(text) for text in self._resolve(target.host, target.port)]
        except socket.gaierror as error:
            if error.errno == socket.EAI_AGAIN:
                raise _TransientError from None
            raise BadImageError("names a host that is not known") from None
        if not found or not all(self._allow(address) for address in found):
            raise BadImageError("leads to an address that is not public")
        for address in found:
            seconds = min(self._config.connect_timeout_s, deadline - time.monotonic())
            if seconds <= 0:
                break
            try:
                # The address as checked, never the name: that would be resolved again.
                return socket.create_connection((str(address), target.port), timeout=seconds)
            except OSError:
                continue
        raise _TransientError

    def _answer(self, response: http.client.HTTPResponse, deadline: float) -> tuple[bytes, str | None]:
        status = response.status
        if status in (301, 302, 303, 307, 308) and (location := response.getheader("Location")):
            return b"", location
        if status in (408, 429) or status >= 500:
            raise _TransientError(_seconds(response.getheader("Retry-After")))
        if status in (404, 410):
            raise BadImageError("is not found by its server")
        if status != 200:
            raise BadImageError("is refused by its server")
        limit = self._config.max_bytes
        length = response.length
        if length is not None and length > limit:
            raise BadImageError("has more bytes than catalog.image.max_bytes")
        data = bytearray()
        while piece := response.read(min(_PIECE, limit + 1 - len(data))):
            data += piece
            if len(data) > limit:
                raise BadImageError("has more bytes than catalog.image.max_bytes")
        if time.monotonic() >= deadline or (length is not None and len(data) < length):
            raise _TransientError  # cut off in the middle
        return bytes(data), None


def _cut(sock: socket.socket) -> None:
    # Of the plain socket: TLS has a state of its own, which another thread must not touch.
    try:
        socket.socket.shutdown(sock, socket.SHUT_RDWR)
    except OSError:
        return  # closed in the meantime


def _seconds(retry_after: str | None) -> float | None:
    """`Retry-After` in seconds; its form as a date is not honoured."""
    text = (retry_after or "").strip()
    return float(text) if text.isascii() and text.isdigit() and len(text) < 10 else None
