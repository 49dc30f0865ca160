"""Pictures by path: roots, object storage, and http(s) under a policy of hosts and addresses."""

from __future__ import annotations

import ipaddress
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qbrec.catalog import rejected
from qbrec.catalog.contract import Domain
from qbrec.catalog.encoders.encode import ItemEncoder, skipped_pictures
from qbrec.catalog.encoders.fetch import PictureReader
from qbrec.catalog.encoders.image import BadImageError
from qbrec.catalog.encoders.web import Address, WebFetcher, is_public
from qbrec.catalog.synth_items import encode_png
from qbrec.config.sections import CatalogConfig, ImageConfig

Answer = Callable[[BaseHTTPRequestHandler], None]
HOST = "pics.example.com"


class Site:
    """A web server on the loopback that answers by path, and notes what it was asked."""

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        site = self
        self.answers: dict[str, list[Answer]] = {}
        self.seen: list[tuple[str, str]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.seen.append((self.path, self.headers["Host"]))
                todo = site.answers.get(self.path, [status(404)])
                (todo.pop(0) if len(todo) > 1 else todo[0])(self)

            def log_message(self, *_: Any) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        if context is not None:
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def url(self, path: str, host: str = HOST, scheme: str = "http") -> str:
        return f"{scheme}://{host}:{self.port}{path}"


def body(data: bytes, *, length: int | None = None) -> Answer:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Content-Length", str(len(data) if length is None else length))
        request.end_headers()
        request.wfile.write(data)

    return answer


def status(code: int, **headers: str) -> Answer:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(code)
        for name, value in headers.items():
            request.send_header(name.replace("_", "-"), value)
        request.send_header("Content-Length", "0")
        request.end_headers()

    return answer


def endless(request: BaseHTTPRequestHandler) -> None:
    request.send_response(200)
    request.end_headers()
    try:
        while True:
            request.wfile.write(b"x" * 4096)
    except OSError:
        return


def trickle(request: BaseHTTPRequestHandler) -> None:
    """Header bytes that never end: each comes well within the time-out of a read."""
    try:
        request.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        for _ in range(100):
            request.wfile.write(b"x")
            request.wfile.flush()
            time.sleep(0.05)
    except OSError:
        return


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    yield site
    site.server.shutdown()
    site.server.server_close()


def config(**changes: Any) -> ImageConfig:
    return ImageConfig(**{"hosts": (HOST, "*.cdn.example.com"), **changes})


def fetcher(
    site: Site, *, resolve: Any = None, waits: list[float] | None = None, **changes: Any
) -> WebFetcher:
    """One that may connect to the loopback, where all names lead."""
    return WebFetcher(
        config(**changes),
        allow=lambda address: address.is_loopback,
        resolve=resolve or (lambda host, port: ["127.0.0.1"]),
        ports=(site.port,),
        sleep=(waits if waits is not None else []).append,
    )


def refusal(web: WebFetcher, url: str) -> str:
    with pytest.raises(BadImageError) as caught:
        web.fetch(url)
    assert str(caught.value) in rejected._REMEDIES
    return str(caught.value)


def test_a_picture_with_its_host_named(site: Site) -> None:
    site.answers["/a%20b.png?w=1"] = [body(b"data")]
    assert fetcher(site).fetch(site.url("/a b.png?w=1")) == b"data"
    assert site.seen == [("/a%20b.png?w=1", f"{HOST}:{site.port}")]
    site.answers["/%C3%A9.png"] = [body(b"e")]
    assert fetcher(site).fetch(site.url("/é.png", host="IMG.cdn.example.com")) == b"e"


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://other.com/a", "names a host"),
        ("http://cdn.example.com/a", "names a host"),  # the pattern is of its subdomains
        ("http://evilcdn.example.com/a", "names a host"),
        (f"http://{HOST}.evil.com/a", "names a host"),
        ("http://127.0.0.1/a", "names a host"),
        ("http://[::1]/a", "names a host"),
        (f"http://{HOST}@127.0.0.1/a", "usable"),
        (f"http://user:word@{HOST}/a", "usable"),
        (f"http://{HOST}\\@127.0.0.1/a", "usable"),
        (f"http://{HOST}:22/a", "usable"),
        (f"http://{HOST}:99999/a", "usable"),
        (f"http://{HOST}/a\r\nX: y", "usable"),
        (f"ftp://{HOST}/a", "usable"),
        ("http:///a", "usable"),
        ("http://pics。example.com/a", "names a host"),  # a full stop only to some parsers
        ("http://.cdn.example.com/a", "names a host"),
    ],
)
def test_urls_refused_without_the_network(url: str, reason: str) -> None:
    def resolve(host: str, port: int) -> list[str]:
        raise AssertionError("nothing may be resolved")

    assert reason in refusal(WebFetcher(config(), resolve=resolve), url)


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0",
     "224.0.0.1", "255.255.255.255", "240.0.0.1", "192.0.2.1", "198.18.0.1", "168.63.129.16", "::1", "::",
     "fe80::1", "fc00::1", "fd00:ec2::254", "ff02::1", "::ffff:8.8.8.8", "::ffff:127.0.0.1", "2002:7f00:1::",
     "2001:db8::1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "fec0::1", "2001:0:7f00:1::"],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))
    web = WebFetcher(config(), resolve=lambda host, port: ["93.184.216.34", address])
    assert "not public" in refusal(web, f"http://{HOST}/a")


@pytest.mark.parametrize("address", ["93.184.216.34", "8.8.8.8", "2606:2800:220:1::1", "64:ff9b::808:808"])
def test_addresses_that_are_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@given(st.ip_addresses(v=4))
def test_ipv4_addresses_are_public_or_not_in_any_disguise(address: ipaddress.IPv4Address) -> None:
    embedded = ipaddress.IPv6Address((0x64FF9B << 96) | int(address))
    assert is_public(embedded) == is_public(address)
    assert not is_public(ipaddress.IPv6Address((0xFFFF << 32) | int(address)))
    if is_public(address):
        assert address.is_global
        assert not address.is_multicast


@pytest.mark.parametrize("disguise", ["2130706433", "0x7f000001", "0177.0.0.1", "127.1", "localhost"])
def test_disguised_loopback_is_refused_even_if_its_name_is_allowed(disguise: str) -> None:
    assert "not public" in refusal(WebFetcher(ImageConfig(hosts=(disguise,))), f"http://{disguise}/a")


def test_the_loopback_is_refused_by_default(site: Site) -> None:
    web = WebFetcher(config(), resolve=lambda host, port: ["127.0.0.1"], ports=(site.port,))
    assert "not public" in refusal(web, site.url("/a"))
    assert site.seen == []


def test_a_name_that_changes_its_address(site: Site) -> None:
    """DNS rebinding: one look-up per connection, and the connection goes to what was looked up."""
    asked: list[int] = []

    def resolve(host: str, port: int) -> list[str]:
        asked.append(port)
        return ["127.0.0.1"] if len(asked) == 1 else ["10.0.0.1"]

    site.answers["/a"] = [status(302, Location="/b")]
    site.answers["/b"] = [body(b"secret")]
    assert "not public" in refusal(fetcher(site, resolve=resolve), site.url("/a"))
    assert [path for path, _ in site.seen] == ["/a"]
    assert len(asked) == 2

    asked.clear()
    site.answers["/a"] = [body(b"fine")]
    assert fetcher(site, resolve=resolve).fetch(site.url("/a")) == b"fine"
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("http://169.254.169.254:{port}/latest/meta-data", "names a host"),
        ("http://private.cdn.example.com:{port}/x", "not public"),
        ("file:///etc/passwd", "usable"),
        (f"http://{HOST}:22/", "usable"),
        (f"//user@{HOST}:{{port}}/", "usable"),
    ],
)
def test_redirects_are_checked_like_any_url(site: Site, location: str, reason: str) -> None:
    def resolve(host: str, port: int) -> list[str]:
        return ["10.0.0.1"] if host.startswith("private") else ["127.0.0.1"]

    site.answers["/a"] = [status(301, Location=location.format(port=site.port))]
    assert reason in refusal(fetcher(site, resolve=resolve), site.url("/a"))


def test_redirects_are_followed_a_few_times(site: Site) -> None:
    for number in range(6):
        site.answers[f"/{number}"] = [status(307, Location=f"{number + 1}")]
    site.answers["/6"] = [body(b"end")]
    assert fetcher(site).fetch(site.url("/3")) == b"end"
    assert refusal(fetcher(site), site.url("/0")) == "redirects too often"


def test_large_answers_are_cut_off_while_they_come(site: Site) -> None:
    site.answers = {"/exact": [body(b"x" * 100)], "/said": [body(b"x" * 101)], "/unsaid": [endless]}
    web = fetcher(site, max_bytes=100)
    assert len(web.fetch(site.url("/exact"))) == 100
    for path in ("/said", "/unsaid"):
        assert "max_bytes" in refusal(web, site.url(path))


def test_what_fails_for_a_while_is_tried_again(site: Site) -> None:
    waits: list[float] = []
    site.answers["/a"] = [
        status(503), status(429, Retry_After="7"), body(b"short", length=50), body(b"whole"),
    ]  # fmt: skip
    assert fetcher(site, waits=waits).fetch(site.url("/a")) == b"whole"
    assert len(site.seen) == 4
    assert waits[1] == 7
    assert 0.25 <= waits[0] <= 0.5 < 1.0 <= waits[2] <= 2.0


def test_an_impatient_end(site: Site) -> None:
    waits: list[float] = []
    site.answers["/a"] = [status(500, Retry_After="999999")]
    assert "too slow" in refusal(fetcher(site, waits=waits, retries=2), site.url("/a"))
    assert waits == [30.0, 30.0]
    waits.clear()
    assert "too slow" in refusal(fetcher(site, waits=waits, total_timeout_s=29.0), site.url("/a"))
    assert waits == []  # the pause would outlast the time there is


@pytest.mark.parametrize(
    ("code", "reason"), [(404, "not found"), (410, "not found"), (403, "refused"), (204, "refused")]
)
def test_what_fails_for_good_is_not_tried_again(site: Site, code: int, reason: str) -> None:
    site.answers["/a"] = [status(code)]
    assert reason in refusal(fetcher(site), site.url("/a"))
    assert len(site.seen) == 1


def test_a_server_that_trickles_is_cut_off(site: Site) -> None:
    site.answers["/a"] = [trickle]
    begin = time.monotonic()
    web = fetcher(site, total_timeout_s=0.4, read_timeout_s=5.0)
    assert "too slow" in refusal(web, site.url("/a"))
    assert 0.3 < time.monotonic() - begin < 2.0


def test_a_silent_server_is_given_up(site: Site) -> None:
    site.answers["/a"] = [lambda request: time.sleep(0.5)]
    begin = time.monotonic()
    assert "too slow" in refusal(fetcher(site, read_timeout_s=0.1, retries=1), site.url("/a"))
    assert time.monotonic() - begin < 1.0
    assert len(site.seen) == 2


def test_unknown_names_and_names_unknown_for_the_moment(site: Site) -> None:
    errors = [socket.EAI_NONAME, socket.EAI_AGAIN]

    def resolve(host: str, port: int) -> list[str]:
        if errors:
            raise socket.gaierror(errors.pop(0), "no")
        return ["127.0.0.1"]

    site.answers["/a"] = [body(b"x")]
    web = fetcher(site, resolve=resolve)
    assert "not known" in refusal(web, site.url("/a"))
    assert web.fetch(site.url("/a")) == b"x"
    assert errors == []


def test_the_second_address_is_tried(site: Site) -> None:
    site.answers["/a"] = [body(b"x")]
    web = fetcher(site, resolve=lambda host, port: ["127.0.0.9", "127.0.0.1"])
    assert web.fetch(site.url("/a")) == b"x"


def test_proxies_of_the_environment_are_not_used(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    site.answers["/a"] = [body(b"x")]
    assert fetcher(site).fetch(site.url("/a")) == b"x"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-keyout", path, "-out", path.with_suffix(".crt"), "-subj", f"/CN={HOST}", "-days", "2",
         "-addext", f"subjectAltName=DNS:{HOST}"],
        check=True, capture_output=True,
    )  # fmt: skip
    path.write_bytes(path.read_bytes() + path.with_suffix(".crt").read_bytes())
    return path


def test_https_checks_the_name_it_asked_for(certificate: Path) -> None:
    """The connection goes to an address, the certificate is compared with the name."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate)
    names: list[str] = []
    server.sni_callback = lambda sock, name, context: names.append(name)
    site = Site(server)
    site.answers = {"/a": [body(b"safe")], "/down": [status(302, Location=f"http://{HOST}:{site.port}/a")]}
    trusting = ssl.create_default_context(cafile=str(certificate.with_suffix(".crt")))

    def web(context: ssl.SSLContext) -> WebFetcher:
        return WebFetcher(
            config(retries=0), allow=lambda address: True, resolve=lambda host, port: ["127.0.0.1"],
            ports=(site.port,), context=context,
        )  # fmt: skip

    assert web(trusting).fetch(site.url("/a", scheme="https")) == b"safe"
    assert names == [HOST]
    reason = refusal(web(trusting), site.url("/a", host="x.cdn.example.com", scheme="https"))
    assert "certificate" in reason
    assert "certificate" in refusal(web(ssl.create_default_context()), site.url("/a", scheme="https"))
    assert "from https to http" in refusal(web(trusting), site.url("/down", scheme="https"))
    site.server.shutdown()
    site.server.server_close()


def test_many_are_fetched_at_once_and_come_back_in_order(site: Site) -> None:
    lock, running, most = threading.Lock(), [0], [0]

    def slow(request: BaseHTTPRequestHandler) -> None:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.05)
        with lock:
            running[0] -= 1
        body(request.path.encode())(request)

    paths = [f"/{number}" for number in range(12)]
    site.answers = {path: [slow] for path in paths if path != "/5"}
    settings = config(fetch_concurrency=4)
    reader = PictureReader(settings, web=fetcher(site, fetch_concurrency=4))
    found = reader.map([site.url(path) for path in paths], bytes.decode)
    assert [str(one) for one in found] == [p if p != "/5" else "is not found by its server" for p in paths]
    assert 1 < most[0] <= 4


def test_object_storage_stays_below_its_roots(tmp_path: Path) -> None:
    for name in ("bucket/pics/a.png", "bucket/pics/sub/b.png", "bucket/pics2/c.png", "bucket/secret.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    asked: list[str] = []

    def open_root(root: str) -> tuple[pafs.FileSystem, str]:
        asked.append(root)
        inner = root.partition("://")[2].partition("?")[0]
        return pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem()), inner

    root = "s3://bucket/pics/?region=eu-west-1"
    reader = PictureReader(ImageConfig(roots=(root,), max_bytes=30), open_root=open_root)
    assert reader.read("s3://bucket/pics/a.png") == reader.read("a.png") == b"bucket/pics/a.png"
    assert reader.read("S3://bucket/pics/sub/b.png") == b"bucket/pics/sub/b.png"
    away = "lies outside catalog.image.roots"
    for path, reason in {
        "s3://bucket/pics2/c.png": away, "s3://bucket/secret.png": away, "gs://bucket/pics/a.png": away,
        "s3://bucket/pics/../secret.png": away, "../secret.png": away, "s3://key:x@bucket/pics/a.png": away,
        "s3://bucket/pics/none.png": "cannot be read", "/etc/passwd": away, "a\0.png": "cannot be read",
        "s3://bucket/pics/a.png?endpoint_override=169.254.169.254": "cannot be read",
        "file:///etc/passwd": "has a scheme that is not allowed",
        "http://pics.example.com/a.png": "names a host that is not in catalog.image.hosts",
    }.items():  # fmt: skip
        with pytest.raises(BadImageError) as caught:
            reader.read(path)
        assert str(caught.value) == reason, path
        assert reason in rejected._REMEDIES
    assert asked == [root], "only roots are opened, whatever a picture's address says"
    (tmp_path / "bucket/pics/a.png").write_bytes(b"x" * 31)
    with pytest.raises(BadImageError, match="max_bytes"):
        reader.read("a.png")


def test_local_pictures_are_files_of_a_certain_size(tmp_path: Path) -> None:
    import os

    (tmp_path / "large").write_bytes(b"x" * 11)
    os.mkfifo(tmp_path / "pipe")
    reader = PictureReader(ImageConfig(roots=(str(tmp_path),), max_bytes=10))
    for name, reason in (("large", "max_bytes"), ("pipe", "cannot be read"), (".", "cannot be read")):
        with pytest.raises(BadImageError, match=reason):
            reader.read(name)


@pytest.mark.parametrize("pattern", ["http://a.com", "a.com/x", "*", "*.*.com", "a.com:80", "A.com", ""])
def test_patterns_of_hosts(pattern: str) -> None:
    with pytest.raises(ValueError, match="hosts"):
        ImageConfig(hosts=(pattern,))


def test_the_policy_takes_an_address() -> None:
    """What `allow` is asked: every address of the name, before any connection."""
    asked: list[Address] = []
    web = WebFetcher(
        config(), resolve=lambda host, port: ["192.0.2.1", "2001:db8::1"],
        allow=lambda address: bool(asked.append(address)) or len(asked) < 2,
    )  # fmt: skip
    refusal(web, f"https://{HOST}/a")
    assert [str(address) for address in asked] == ["192.0.2.1", "2001:db8::1"]


def test_a_handshake_that_does_not_end_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        web = WebFetcher(
            config(connect_timeout_s=0.1, retries=1), allow=lambda address: True, sleep=lambda seconds: None,
            resolve=lambda host, port: ["127.0.0.1"], ports=(silent.getsockname()[1],),
        )  # fmt: skip
        begin = time.monotonic()
        assert "too slow" in refusal(web, f"https://{HOST}:{silent.getsockname()[1]}/a")
        assert 0.15 < time.monotonic() - begin < 1.5


def test_items_with_pictures_on_the_web(site: Site) -> None:
    """The road from a column of addresses to features and counted reasons."""
    picture = encode_png(np.full((1, 8, 8, 3), 200, np.uint8))[0]
    site.answers = {"/a": [body(picture)], "/junk": [body(b"<html>")]}
    table = pa.table(
        {
            "item_id": ["a", "b", "c", "d"],
            "image_path": [[site.url("/a"), site.url("/a")], [site.url("/none"), site.url("/a")],
                           ["http://169.254.169.254/"], [site.url("/junk")]],
        }
    )  # fmt: skip
    domain = Domain(0, "shop", (), (), ("item_id", "image_path"))
    expected = {
        "reject": [2, 0, 0, 0],
        "skip": [2, 1, 0, 0],
    }
    reasons = [
        "is not found by its server",
        "names a host that is not in catalog.image.hosts",
        "cannot be decoded",
    ]
    for on_error, tokens in expected.items():
        settings = config(on_error=on_error)
        encoder = ItemEncoder(
            CatalogConfig(image=settings), modalities=("image",), display=pa.schema([]), text=None,
            reader=PictureReader(settings, web=fetcher(site)),
        )  # fmt: skip
        found = encoder.encode(table, domain, file=0, first_row=0)
        assert found["tokens.image"].to_pylist() == tokens
        skipped = skipped_pictures(found)["reason"].to_pylist()
        told = found["reason"].to_pylist()[1:] if on_error == "reject" else skipped
        assert told == [f"image_path: {reason}" for reason in reasons]
