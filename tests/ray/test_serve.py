"""`qbrec serve` as a process of its own, over HTTP: from no version at all to SIGTERM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from qbrec.config import dump_config
from qbrec.registry.recommend import Recommender
from qbrec.registry.versions import register
from qbrec.serving.versions import Version, fetch_bundle
from qbrec.storage.catalog_view import CatalogView
from qbrec.tracking.client import connect
from tests.support.cli import ROOT
from tests.support.http_server import Answer, ask
from tests.support.mlflow_store import copy_store
from tests.support.s3_server import free_port
from tests.support.tiny_run import TinyRun, retrained, tiny_run

K = 6
PATIENCE_S = 180.0  # a machine that does other things as well


@dataclass
class Service:
    """The process, and what it serves."""

    process: subprocess.Popen[str]
    port: int
    run: TinyRun
    versions: list[str] = field(default_factory=list)

    def get(self, path: str) -> Answer:
        return ask(self.port, "GET", path)

    def recommend(self, histories: Any, **further: Any) -> Answer:
        return ask(self.port, "POST", "/v1/recommend", {"histories": histories, "k": K, **further})

    def champion(self, number: str) -> None:
        client, _ = connect(self.run.config)
        client.set_registered_model_alias("qbrec", "champion", number)

    def until(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not holds():
            assert self.process.poll() is None, "the service has ended"
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def serving(self) -> str | None:
        told = self.get("/v1/model").body["serving"]
        return None if told is None else str(told["number"])


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Iterator[Service]:
    import ray

    run = tiny_run(tmp_path_factory.mktemp("serve"), serving={"poll_s": 0.5})
    copy_store(tmp_path_factory.getbasetemp(), Path(run.config.run.storage))
    config = run.run_dir / "serve.yaml"
    config.write_text(dump_config(run.config))
    port = free_port()
    command = [sys.executable, "-m", "qbrec", "serve", "--config", str(config), "--port", str(port)]
    env = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:  # until it says that it serves
        print(line, end="")
        if "/v1/recommend serves" in line:
            break
    else:
        pytest.fail(f"the service ended with exit code {process.wait()}")
    yield Service(process, port, run)
    if process.poll() is None:
        process.terminate()
        process.wait(120)
    process.stderr.close()


@pytest.fixture(scope="module")
def histories(service: Service) -> list[list[str]]:
    catalog = CatalogView(service.run.artifacts["catalog"])
    rows = catalog.load_histories("shop").rows
    return [catalog.item_ids(rows.row(i)) for i in range(6)]


def expected(run: TinyRun, histories: list[list[str]]) -> list[list[str]]:
    model = Recommender.from_artifacts(run.artifacts, ranking=run.config.ranking)
    return [[item["item_id"] for item in items] for items in model.recommend(histories, k=K)]


def items_of(answer: Answer) -> list[list[str]]:
    assert answer.status == 200, answer
    return [one["item_id"] for one in answer.body["recommendations"]]


# The tests of this module follow one another: each begins where the one before ended.


def test_without_a_version_it_is_alive_and_not_ready(service: Service, histories: list[list[str]]) -> None:
    service.until(lambda: service.get("/v1/model").body["registry_error"] is not None)
    assert "there is no models:/qbrec@champion" in service.get("/v1/model").body["registry_error"]
    assert service.get("/healthz").status == 200
    for answer in (service.get("/readyz"), service.recommend(histories)):
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")


def test_the_champion_answers_as_the_recommender_does(service: Service, histories: list[list[str]]) -> None:
    service.versions.append(register(service.run.config, service.run.run_dir, service.run.artifacts))
    service.champion(service.versions[0])
    service.until(lambda: service.get("/readyz").status == 200)
    answer = service.recommend(histories)
    assert items_of(answer) == expected(service.run, histories)
    assert answer.body["model"] == {"name": "qbrec", "version": service.versions[0]}
    told = service.get("/v1/model").body
    assert told["serving"]["run"] == "tiny"
    assert told["serving"]["metrics"]["ndcg_at_10"] >= 0
    assert told["registry_error"] is None


def test_bad_requests_over_the_proxy(service: Service, histories: list[list[str]]) -> None:
    unknown = service.recommend([[histories[0][0] + "x"]])
    assert unknown.status == 422
    assert histories[0][0] in unknown.body["error"]["fix"]
    assert ask(service.port, "POST", "/v1/recommend", b"{").status == 400
    assert ask(service.port, "POST", "/v1/recommend", b" " * ((1 << 20) + 1)).status == 413
    assert service.recommend(histories, k=10**6).status == 422


def test_a_burst_is_answered_and_counted(
    service: Service, histories: list[list[str]], tmp_path: Path
) -> None:
    (tmp_path / "histories.json").write_text(json.dumps(histories))
    command = [sys.executable, "benchmarks/serving.py", "--url", f"http://127.0.0.1:{service.port}"]
    command += ["--histories", str(tmp_path / "histories.json"), "--clients", "8", "--seconds", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    figures = json.loads(done.stdout)
    assert figures["errors"] == 0
    assert figures["requests"] >= figures["clients"]
    assert 0 < figures["p50_ms"] <= figures["p95_ms"] <= figures["p99_ms"]

    def scraped() -> bool:
        text = _metrics()
        names = ("requests_total", "latency_seconds_bucket", "batch_histories_sum", "waiting_histories")
        return all(f"ray_qbrec_serving_{name}" in text for name in names) and 'status="422"' in text

    service.until(scraped)


def test_another_champion_takes_over_and_no_request_fails(
    service: Service, histories: list[list[str]]
) -> None:
    second = retrained(service.run, seed=2)
    service.versions.append(register(second.config, second.run_dir, second.artifacts))
    lists = {
        number: expected(run, histories)
        for number, run in zip(service.versions, (service.run, second), strict=True)
    }
    assert lists[service.versions[0]] != lists[service.versions[1]]
    answers: list[Answer] = []
    over = threading.Event()

    def steadily() -> None:
        while not over.is_set():
            answers.append(service.recommend(histories))

    clients = [threading.Thread(target=steadily) for _ in range(3)]
    for client in clients:
        client.start()
    try:
        service.until(lambda: len(answers) > 5)
        service.champion(service.versions[1])
        service.until(lambda: service.serving() == service.versions[1])
        so_far = len(answers)
        service.until(lambda: len(answers) > so_far + 5)
    finally:
        over.set()
        for client in clients:
            client.join()
    assert [answer.status for answer in answers] == [200] * len(answers)
    numbers = [answer.body["model"]["version"] for answer in answers]
    assert set(numbers) == set(service.versions)
    for answer, number in zip(answers, numbers, strict=True):
        assert items_of(answer) == lists[number]


def test_a_version_that_does_not_load_leaves_the_one_before(
    service: Service, histories: list[list[str]]
) -> None:
    third = retrained(service.run, seed=3)
    number = register(third.config, third.run_dir, third.artifacts)
    bundle = fetch_bundle(third.config, Version("qbrec", number, "tiny", {}))
    weights = bundle / "finetune" / "encoder.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    service.champion(number)
    service.until(lambda: service.get("/v1/model").body["failed"] is not None)
    failed = service.get("/v1/model").body["failed"]
    assert failed["version"] == number
    assert "encoder.safetensors" in failed["error"]
    assert service.serving() == service.versions[1]
    assert service.get("/readyz").status == 200
    assert service.recommend(histories).body["model"]["version"] == service.versions[1]

    data[-5] ^= 1  # mended: it is tried again
    weights.write_bytes(data)
    service.until(lambda: service.serving() == number)
    assert service.get("/v1/model").body["failed"] is None
    assert items_of(service.recommend(histories)) == expected(third, histories)


def test_sigterm_answers_what_is_under_way_and_ends(service: Service, histories: list[list[str]]) -> None:
    answers: list[Answer] = []
    many = [history for history in histories for _ in range(10)]
    clients = [threading.Thread(target=lambda: answers.append(service.recommend(many))) for _ in range(4)]
    for client in clients:
        client.start()
    time.sleep(0.02)
    service.process.send_signal(signal.SIGTERM)
    for client in clients:
        client.join()
    assert [answer.status for answer in answers] == [200] * 4
    assert service.process.wait(120) == 0
    with pytest.raises(ConnectionRefusedError):
        service.get("/healthz")


def _metrics() -> str:
    """What Prometheus gets from the only node."""
    import ray

    (node,) = [node for node in ray.nodes() if node["Alive"]]
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(address, timeout=30) as answer:
        return str(answer.read().decode())


def test_the_port_is_checked_before_anything_starts(tmp_path: Path) -> None:
    import socket

    from qbrec.errors import LaunchError
    from qbrec.serving.service import _check_port

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(LaunchError, match="cannot listen there") as caught:
            _check_port("127.0.0.1", port)
    assert str(port) in json.dumps(str(caught.value))
