"""A version served by strangers: an environment made of its own requirements, without qbrec, over HTTP."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qbrec.registry.recommend import Recommender
from qbrec.tracking.client import tracking_uri
from tests.registry.conftest import Registry
from tests.support.processes import end_session
from tests.support.s3_server import free_port

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def python(registered: Registry, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Interpreter of an environment with what the version asks for, and nothing else.

    torch is of the build that is installed here: a CUDA build would bring gigabytes along.
    """
    folder = tmp_path_factory.mktemp("fresh")
    wanted = registered.bundle("1").parents[1] / "requirements.txt"
    assert "qbrec" not in wanted.read_text()
    (folder / "constraints.txt").write_text(f"torch=={metadata.version('torch')}\n")
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    found = folder / "venv" / "bin" / "python"
    # Compiling what is never imported would take a third of the time.
    command = [found, "-m", "pip", "install", "--quiet", "--no-input", "--no-compile", "--no-user"]
    command += ["--requirement", wanted, "--constraint", folder / "constraints.txt"]
    done = subprocess.run(command, env=outside(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    alone = subprocess.run([found, "-c", "import qbrec"], env=outside(), cwd=folder, capture_output=True)
    assert b"No module named 'qbrec'" in alone.stderr
    return found


def outside() -> dict[str, str]:
    """The environment of somebody who has never heard of this repository."""
    lost = ("PYTHON", "MLFLOW", "VIRTUAL_ENV")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(lost)}
    return kept | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}


@pytest.fixture(scope="module")
def url(registered: Registry, python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where `mlflow models serve` answers."""
    folder, port = tmp_path_factory.mktemp("serve"), free_port()
    command = [python, "-m", "mlflow", "models", "serve", "--model-uri", "models:/qbrec/1"]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    uri = tracking_uri(registered.config)
    env = outside() | {"MLFLOW_TRACKING_URI": uri, "MLFLOW_REGISTRY_URI": uri}
    # Its servers are started by name.
    env["PATH"] = f"{python.parent}{os.pathsep}{env['PATH']}"
    log = folder / "serve.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=folder, env=env, stdout=file, stderr=file, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 240
        while not _answers(f"http://127.0.0.1:{port}/ping"):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/invocations"
    finally:
        end_session(process.pid, timeout=30)
        process.wait()


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def post(url: str, body: Any) -> tuple[int, Any]:
    """Status and answer."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def asked(histories: list[list[Any]], **params: Any) -> dict[str, Any]:
    split = {"columns": ["history"], "data": [[history] for history in histories]}
    return {"dataframe_split": split, "params": params}


def test_it_answers_as_the_recommender_does(registered: Registry, url: str) -> None:
    recommender = Recommender.load(registered.bundle("1"))
    ids = recommender.popular(6)
    histories = [ids[:3], ids[3:], ids[:1]]
    status, answer = post(url, asked(histories, k=7, keep_seen=True))
    assert status == 200, answer
    expected = recommender.recommend(histories, k=7, keep_seen=True)
    for row, items in zip(answer["predictions"], expected, strict=True):
        for column in ("item_id", "title", "semantic_id", "label"):
            assert row[column] == [item[column] for item in items]  # type: ignore[literal-required]
        # Another number of threads sums in another order.
        np.testing.assert_allclose(row["score"], [item["score"] for item in items], rtol=1e-4)


def test_what_the_caller_got_wrong_is_a_400(registered: Registry, url: str) -> None:
    (known,) = Recommender.load(registered.bundle("1")).popular(1)
    for body, named in (
        (asked([["no such item"]]), "no such item"),
        (asked([[]]), "history"),
        (asked([[known]], k=0), "k is 0"),
        (asked([[known]], k=10_000), "k is 10000"),
        (asked([[3]]), "history"),
        ({"dataframe_split": {"columns": ["past"], "data": [[[known]]]}}, "history"),
        ({"rows": []}, "dataframe_split"),
        (b"{", "JSON"),
    ):
        status, answer = post(url, body)
        assert (status, named in answer) == (400, True), (body, status, answer)
