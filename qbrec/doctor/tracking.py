"""MLflow: does `tracking.uri` answer, and as a server of a version that we know?"""

from __future__ import annotations

import http.client
import socket
import sqlite3
import urllib.error
import urllib.request
from email.message import Message
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

from qbrec.config import RootConfig
from qbrec.doctor.finding import Finding, ok, warning
from qbrec.errors import ConfigError
from qbrec.tracking.client import tracking_uri

TIMEOUT_S = 5.0
_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
_COSTS = "a run goes on without it, but its model is not registered"
_LATER = "check tracking.uri and that the server is up; `qbrec track` sends later what it missed"


def check_tracking(config: RootConfig) -> Finding:
    """Whether what is named by `tracking.uri` answers. A run survives without: it is never an error."""
    if not config.tracking.enabled:
        return ok("mlflow", "switched off (tracking.enabled)")
    try:
        uri = tracking_uri(config)
    except ConfigError as error:
        return warning("mlflow", "", wrong=error.what, fix=error.fix or _LATER)
    scheme = urlsplit(uri).scheme.partition("+")[0]
    if scheme in ("http", "https"):
        return _server(uri)
    if scheme == "sqlite":
        return _sqlite(Path(urlsplit(uri).path.removeprefix("/")))
    if scheme in _PORTS:
        return _database(uri, _PORTS[scheme])
    return ok("mlflow", f"{without_secrets(uri)}: not asked, as only a run can tell")


def ask(uri: str, path: str) -> tuple[str, Message]:
    """The beginning of what a server answers to GET, and its headers.

    Raises:
        OSError: It does not answer in time, or with an error (urllib.error.HTTPError).
    """
    assert uri.startswith(("http://", "https://"))
    parts = urlsplit(uri)
    url = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}{path}"
    with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:  # noqa: S310 - asserted above
        return answer.read(1000).decode("utf-8", errors="replace"), answer.headers


def without_secrets(uri: str) -> str:
    """An address without user and password."""
    scheme, separator, rest = uri.partition("://")
    place, slash, path = rest.partition("/")
    return f"{scheme}{separator}{place.rpartition('@')[2]}{slash}{path.partition('?')[0]}"


def _server(uri: str) -> Finding:
    shown = without_secrets(uri)
    try:
        ask(uri, "/health")
        version, _ = ask(uri, "/version")
    except urllib.error.HTTPError as error:
        return warning(
            "mlflow",
            shown,
            wrong=f"what answers there is no MLflow server (HTTP {error.code}): {_COSTS}",
            fix="check tracking.uri: scheme, port and path",
        )
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        return warning("mlflow", shown, wrong=f"no answer ({reason}): {_COSTS}", fix=_LATER)
    ours = metadata.version("mlflow")
    found = f"{shown}: version {version[:40]}, ours {ours}"
    if version.split(".")[0] != ours.split(".")[0]:
        return warning(
            "mlflow",
            found,
            wrong="server and client differ in their major version",
            fix=f"bring the server to {ours} (mlflow/compose.yaml)",
        )
    return ok("mlflow", found)


def _sqlite(file: Path) -> Finding:
    if not file.exists():
        return ok("mlflow", f"{file}: a run will make it")
    try:
        with sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=TIMEOUT_S) as database:
            database.execute("SELECT count(*) FROM experiments").fetchone()
    except sqlite3.Error as error:
        return warning(
            "mlflow",
            str(file),
            wrong=f"cannot be read as MLflow's database ({error}): {_COSTS}",
            fix="restore it, or move it away: a run makes a new one",
        )
    return ok("mlflow", str(file))


def _database(uri: str, default_port: int) -> Finding:
    parts, shown = urlsplit(uri), without_secrets(uri)
    try:
        socket.create_connection((parts.hostname or "", parts.port or default_port), TIMEOUT_S).close()
    except OSError as error:
        return warning("mlflow", shown, wrong=f"no answer ({error}): {_COSTS}", fix=_LATER)
    return ok("mlflow", f"{shown}: it answers")
