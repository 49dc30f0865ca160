"""A local S3 (moto) and a proxy in front of it that makes chosen requests fail, and counts that it did."""

from __future__ import annotations

import http.client
import logging
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def s3_server() -> Iterator[str]:
    """Endpoint of an empty S3 on a free port."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # else a line per request
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()


@dataclass
class Fault:
    """What happens to the first `times` requests of a method whose decoded path matches.

    Attributes:
        kind: `status` answers with `code`; `drop` closes after half of the answer; `cut` closes after half of
            the request's body; `corrupt` flips a bit in the middle of the answer; `stall` waits `seconds`
            after half of the answer; `slow` takes `seconds` for it; `meanwhile` calls `action` before it
            answers.
        fired: How often it happened.
    """

    kind: str
    match: str
    method: str = "GET"
    times: int = 1
    code: int = 503
    seconds: float = 60.0
    skip: int = 0
    action: Any = None
    fired: int = 0


@dataclass
class FaultProxy:
    """HTTP between a client and the server behind.

    Attributes:
        upstream: Address of the server behind.
        endpoint: Address of the proxy.
        requests: Method and decoded path (with query) of every request, in the order of their arrival.
    """

    upstream: str
    endpoint: str = ""
    requests: list[tuple[str, str]] = field(default_factory=list)
    _faults: list[Fault] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def fault(self, kind: str, match: str, **how: Any) -> Fault:
        """Plan a fault; assert on its `fired` at the end."""
        fault = Fault(kind, match, **how)
        self._faults.append(fault)
        return fault

    def reset(self) -> None:
        """Forget faults and requests."""
        self._faults.clear()
        self.requests.clear()

    def fetched(self, ending: str = "") -> list[str]:
        """Paths of the GET requests, those of listings left out."""
        paths = [p for method, p in list(self.requests) if method == "GET" and "list-type" not in p]
        return [path for path in paths if path.endswith(ending)]

    def bucket(self) -> str:
        """A new bucket with no fault planned and no request noted; its URI."""
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        self.behind.create_dir(name)
        self.reset()
        return f"s3://{name}"

    @cached_property
    def behind(self) -> Any:
        """A file system that goes past the proxy; made once, for that waits for requests under way."""
        import pyarrow.fs as pafs

        return pafs.S3FileSystem(endpoint_override=self.upstream, allow_bucket_creation=True)

    def due(self, method: str, path: str) -> Fault | None:
        """Note a request and take the fault that it meets."""
        with self._lock:
            self.requests.append((method, path))
            for fault in self._faults:
                if fault.method == method and fault.fired < fault.times and re.search(fault.match, path):
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    fault.fired += 1
                    return fault
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed or gave up is what the tests want."""


@contextmanager
def fault_proxy(upstream: str, *, port: int = 0) -> Iterator[FaultProxy]:
    """A proxy to `upstream` (`http://host:port`) without faults."""
    proxy = FaultProxy(upstream)
    server = _Server(("127.0.0.1", port), _handler(proxy, upstream.removeprefix("http://")))
    proxy.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(proxy: FaultProxy, upstream: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else every answer waits 40 ms for an acknowledgement
        timeout = 120

        def log_message(self, *_: Any) -> None:
            pass

        def do(self) -> None:
            fault = proxy.due(self.command, unquote(self.path))
            kind = fault.kind if fault is not None else ""
            body = self.body(cut=kind == "cut")
            if kind == "cut":
                self.close_connection = True
                return
            if fault is not None and kind == "status":
                self.answer(fault.code, {"Content-Type": "application/xml"}, _error(fault.code), length=None)
                return
            connection = http.client.HTTPConnection(upstream, timeout=60)
            own = ("connection", "expect", "transfer-encoding", "content-length")
            headers = {k: v for k, v in self.headers.items() if k.lower() not in own}
            connection.request(self.command, self.path, body, headers)
            response = connection.getresponse()
            data = response.read()
            answer = dict(response.getheaders())
            connection.close()
            length_told = int(answer.get("Content-Length", answer.get("content-length", len(data))))
            if fault is not None and kind == "corrupt":
                changed = bytearray(data)
                changed[len(data) // 2] ^= 1
                data = bytes(changed)
            if fault is not None and kind == "meanwhile":
                fault.action()
            if fault is not None and kind == "slow":
                time.sleep(fault.seconds)
            half = len(data) // 2 if kind in ("drop", "stall") else len(data)
            self.answer(response.status, answer, data[:half], length=length_told)
            if fault is not None and kind == "stall":
                time.sleep(fault.seconds)
            if half < len(data):
                self.close_connection = True

        def body(self, *, cut: bool) -> bytes:
            """The request's body, or its first half."""
            if self.headers.get("Transfer-Encoding", "") != "chunked":
                length = int(self.headers.get("Content-Length", "0"))
                return self.rfile.read(length // 2 if cut else length)
            half = int(self.headers["x-amz-decoded-content-length"]) // 2
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
                if cut and len(data) >= half:
                    return data
            self.rfile.readline()
            return data

        def answer(self, status: int, headers: dict[str, str], data: bytes, *, length: int | None) -> None:
            self.send_response_only(status)
            for name, value in headers.items():
                if name.lower() not in ("connection", "content-length", "transfer-encoding"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(data) if length is None else length))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)
                self.wfile.flush()

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = do

    return Handler


def _error(code: int) -> bytes:
    names = {
        400: "ExpiredToken",
        403: "AccessDenied",
        404: "NoSuchKey",
        500: "InternalError",
        503: "SlowDown",
    }
    return (
        f"<?xml version='1.0'?><Error><Code>{names[code]}</Code><Message>planned</Message></Error>".encode()
    )
