"""Submitting, following and stopping, against a server that speaks Ray's protocol and breaks as planned."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from qbrec.cli.main import main
from qbrec.config import parse_config
from qbrec.errors import LaunchError, UnreachableError
from qbrec.jobs.attempts import Attempt, newest
from qbrec.jobs.cluster import connect
from qbrec.jobs.follow import follow
from qbrec.jobs.ray_client import JobClient
from qbrec.jobs.stop import stop
from qbrec.jobs.submit import submit
from tests.support.cli import ROOT, environment
from tests.support.job_server import JobServer, job_server

OURS = {"qbrec_run": "shop", "storage": "/mnt/storage"}
TEXT = "".join(f"line {i} of the log\n" for i in range(40))


@pytest.fixture(autouse=True)
def _nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def server() -> Iterator[JobServer]:
    with job_server() as server:
        yield server


@pytest.fixture
def client(server: JobServer) -> JobClient:
    return connect(server.url, answer_s=5)


def config(name: str = "shop", storage: str = "/mnt/storage") -> Any:
    domain = {"items": "/mnt/i.parquet", "interactions": "/mnt/x.parquet"}
    return parse_config({"run": {"name": name, "storage": storage}, "data": {"domains": {"shop": domain}}})


def command(monkeypatch: pytest.MonkeyPatch, server: JobServer, *args: str) -> int:
    """`qbrec ARGS --address …` in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["qbrec", *args, "--address", server.url])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def ending(server: JobServer, name: str, status: str, code: int | None = None) -> None:
    """The job ends in a moment, with a last word."""

    def end() -> None:
        server.logs[name] += "the last word\n"
        server.end(name, status, code)

    threading.Timer(0.3, end).start()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)


# -- submit --------------------------------------------------------------------------------------------------


def test_a_submission_brings_code_configuration_and_identity(
    monkeypatch: pytest.MonkeyPatch, server: JobServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "shop.yaml"
    file.write_text(yaml.safe_dump(config(storage="/mnt//storage/").model_dump(mode="json")))
    args = ("--config", str(file), "--set", "fusion.width=64", "--resume", "must", "--no-wait")
    assert command(monkeypatch, server, "submit", *args) == 0
    job = server.jobs["qbrec-shop-1"]
    assert job["entrypoint"] == "python -m qbrec run --config env:QBREC_CONFIG --resume must"
    assert job["metadata"] == {**OURS, "stop_wait_s": "90"}
    variables = job["runtime_env"]["env_vars"]
    sent = parse_config(yaml.safe_load(variables["QBREC_CONFIG"]))
    assert (sent.run.name, sent.fusion.width) == ("shop", 64)
    assert variables["RAY_JOB_STOP_WAIT_TIME_S"] == "90"
    assert job["runtime_env"]["working_dir"].startswith("gcs://")
    files = server.uploaded()
    assert {"qbrec/cli/main.py", "mlflow/serving_model.py"} <= files
    assert not [name for name in files if name.startswith(("tests/", "benchmarks/", ".git/", "docs/"))]
    error = capsys.readouterr().err
    assert "submitted qbrec-shop-1 (attempt 1 of 'shop', storage /mnt/storage)" in error
    assert f"qbrec logs shop --follow --address {server.url}" in error


def test_one_attempt_of_a_run_at_a_time(server: JobServer, client: JobClient) -> None:
    first = submit(client, config())
    packages = len(server.packages)
    for status in ("PENDING", "RUNNING"):
        server.jobs[first.id]["status"] = status
        with pytest.raises(LaunchError, match=rf"attempt 1 of the run 'shop' is {status}") as caught:
            submit(client, config())
        assert caught.value.exit_code == 5
        assert first.id in str(caught.value.where)
        assert "`qbrec logs shop --follow`" in str(caught.value.fix)
        assert "`qbrec stop shop`" in str(caught.value.fix)
    # Other runs are not concerned: of another storage, which shares the name's numbers, or of another name.
    assert submit(client, config(storage="/mnt/other")).id == "qbrec-shop-2"
    assert submit(client, config(name="shop-2")).id == "qbrec-shop-2-1"
    server.end(first.id, "FAILED", 1)
    again = submit(client, config())
    assert (again.id, again.number, again.storage) == ("qbrec-shop-3", 3, "/mnt/storage")
    assert len(server.packages) == packages, "the same code was uploaded again"


def test_two_submitters_at_the_same_moment(server: JobServer, client: JobClient) -> None:
    """Both count the same attempts and want the same id: the cluster gives it to one of them."""
    fired = []

    def faster(storage: str) -> Any:
        def on_submit(body: dict[str, Any]) -> None:
            if body["submission_id"] not in server.jobs and not fired:
                fired.append(body["submission_id"])
                server.add(body["submission_id"], "RUNNING", metadata={**OURS, "storage": storage})

        return on_submit

    server.on_submit = faster("/mnt/storage")
    with pytest.raises(LaunchError, match="attempt 1 of the run 'shop' is RUNNING"):
        submit(client, config())
    assert fired == ["qbrec-shop-1"]
    fired.clear()
    server.on_submit = faster("/mnt/another")
    assert submit(client, config(storage="/mnt/third")).id == "qbrec-shop-3"
    assert fired == ["qbrec-shop-2"]


def test_a_token_is_sent_and_never_shown(tmp_path: Path, server: JobServer) -> None:
    """In a process of its own: Ray reads its mode once."""
    server.token = "sesame-1234"
    server.add("qbrec-shop-1", "RUNNING", metadata=OURS, runtime_env={"env_vars": {"SECRET": "hidden-1234"}})
    token = tmp_path / "token"
    token.write_text("sesame-1234\n")
    outputs = []
    for variables in ({"RAY_AUTH_TOKEN_PATH": str(token)}, {"RAY_AUTH_TOKEN": "guessed-99"}):
        env = environment({**variables, "HOME": str(tmp_path), "RAY_API_SERVER_ADDRESS": server.url})
        done = subprocess.run(
            [sys.executable, "-m", "qbrec", "status", "shop", "--json"],
            cwd=ROOT, env=env, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        outputs.append(done.stdout + done.stderr)
        if "RAY_AUTH_TOKEN" in variables:
            assert done.returncode == 5
            assert "error: the cluster does not let us in: Authentication required" in done.stderr
            assert "ray get-auth-token" in done.stderr
        else:
            assert done.returncode == 0, done.stderr
            assert json.loads(done.stdout)["status"] == "RUNNING"
    assert not [word for word in ("sesame", "guessed", "hidden-1234") if word in "".join(outputs)]


# -- logs and exit codes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "code", "ends_with"),
    [("SUCCEEDED", 0, 0), ("FAILED", 3, 3), ("FAILED", -9, 137), ("STOPPED", None, 143), ("FAILED", None, 5)],
)
def test_following_ends_with_the_exit_code_of_the_driver(
    monkeypatch: pytest.MonkeyPatch,
    server: JobServer,
    capsys: pytest.CaptureFixture[str],
    status: str,
    code: int | None,
    ends_with: int,
) -> None:
    server.add("qbrec-shop-1", "RUNNING", metadata=OURS, message="the supervisor died")
    server.logs["qbrec-shop-1"] = TEXT
    ending(server, "qbrec-shop-1", status, code)
    assert command(monkeypatch, server, "logs", "shop", "--follow") == ends_with
    out, error = capsys.readouterr()
    assert out == TEXT + "the last word\n"
    assert f"qbrec-shop-1: {status}, exit code {ends_with}" in error
    assert ("the supervisor died" in error) == (status == "FAILED" and code is None)


def test_each_character_comes_once_over_connections_that_break(server: JobServer, client: JobClient) -> None:
    server.add("qbrec-shop-1", "RUNNING", metadata=OURS)
    server.logs["qbrec-shop-1"] = TEXT
    server.cut = [1, 123, 77, 500]

    def end_after_all_cuts() -> None:
        wait_for(lambda: not server.cut)
        ending(server, "qbrec-shop-1", "SUCCEEDED", 0)

    threading.Thread(target=end_after_all_cuts, daemon=True).start()
    parts: list[str] = []
    ended = follow(client, newest(client, "shop"), parts.append, pause_s=0.05)
    assert server.cut == [], "the fault did not fire"
    assert "".join(parts) == TEXT + "the last word\n"
    assert ended.exit_code == 0
    assert not [part for part in parts if not part]


def test_what_a_broken_stream_kept_back_is_fetched_at_the_end(server: JobServer, client: JobClient) -> None:
    server.add("qbrec-shop-1", "RUNNING", metadata=OURS)
    server.logs["qbrec-shop-1"] = TEXT
    server.end("qbrec-shop-1", "SUCCEEDED", 0)
    server.cut = [10]
    parts: list[str] = []
    follow(client, newest(client, "shop"), parts.append)
    assert server.cut == [], "the fault did not fire"
    assert "".join(parts) == TEXT


def test_a_silent_stream_is_opened_anew(server: JobServer, client: JobClient) -> None:
    server.add("qbrec-shop-1", "RUNNING", metadata=OURS)
    server.logs["qbrec-shop-1"] = TEXT

    def streams() -> int:
        return sum(path.endswith("/logs/tail") for _, path in server.requests)

    def end_after_two() -> None:
        wait_for(lambda: streams() >= 2)
        ending(server, "qbrec-shop-1", "SUCCEEDED", 0)

    threading.Thread(target=end_after_two, daemon=True).start()
    parts: list[str] = []
    follow(client, newest(client, "shop"), parts.append, silent_s=0.5)
    assert streams() >= 2
    assert "".join(parts) == TEXT + "the last word\n"


def test_a_cluster_that_is_gone_is_given_up(server: JobServer, client: JobClient) -> None:
    server.add("qbrec-shop-1", "RUNNING", metadata=OURS)
    attempt = newest(client, "shop")
    server.down = True
    with pytest.raises(UnreachableError, match="has not answered for 0") as caught:
        follow(client, attempt, lambda text: None, silent_s=0.2, lost_s=0)
    assert "qbrec logs qbrec-shop-1 --follow" in str(caught.value.fix)
    server.down = False
    del server.jobs["qbrec-shop-1"]
    with pytest.raises(LaunchError, match="404: Job qbrec-shop-1 does not exist"):
        follow(client, attempt, lambda text: None, silent_s=0.2)


def test_only_the_time_without_an_answer_counts(server: JobServer, client: JobClient) -> None:
    """The stream is alive for longer than a cluster may be away, and then it is away for less."""
    server.add("qbrec-shop-1", "RUNNING", metadata=OURS)
    server.logs["qbrec-shop-1"] = TEXT
    server.cut = [len(TEXT) + 1]

    def fall_and_rise() -> None:
        time.sleep(2.0)
        server.down = True
        server.logs["qbrec-shop-1"] += "x\n"
        wait_for(lambda: not server.cut and server.refused >= 2)
        server.down = False
        ending(server, "qbrec-shop-1", "SUCCEEDED", 0)

    attempt = newest(client, "shop")
    threading.Thread(target=fall_and_rise, daemon=True).start()
    parts: list[str] = []
    follow(client, attempt, parts.append, lost_s=1.8, pause_s=0.05)
    assert server.refused >= 2, "the fault did not fire"
    assert "".join(parts) == TEXT + "x\nthe last word\n"


def test_ctrl_c_leaves_the_job_and_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, server: JobServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.add("qbrec-shop-1", "RUNNING", metadata=OURS)
    server.logs["qbrec-shop-1"] = TEXT

    def interrupt() -> None:
        wait_for(lambda: ("GET", "/api/jobs/qbrec-shop-1/logs/tail") in server.requests)
        os.kill(os.getpid(), signal.SIGINT)

    # A process that was started in the background may have been told to ignore Ctrl-C.
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=interrupt, daemon=True).start()
    began = time.monotonic()
    try:
        assert command(monkeypatch, server, "logs", "shop", "--follow") == 130
    finally:
        signal.signal(signal.SIGINT, earlier)
    assert time.monotonic() - began < 30
    error = capsys.readouterr().err
    assert "the job goes on" in error
    for step in ("qbrec status shop", "qbrec logs shop --follow", "qbrec stop shop"):
        assert f"{step} --address {server.url}" in error
    assert not [path for method, path in server.requests if method == "POST"], "the job was touched"


# -- status --------------------------------------------------------------------------------------------------


def test_status_tells_how_far_the_newest_attempt_is(
    monkeypatch: pytest.MonkeyPatch, server: JobServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.add("qbrec-shop-1", "FAILED", metadata=OURS, driver_exit_code=4, end_time=1)
    server.add("qbrec-shop-10", "RUNNING", metadata=OURS)
    server.add("qbrec-shop-9", "STOPPED", metadata=OURS, end_time=1)
    server.logs["qbrec-shop-10"] = (
        "✓ catalog     up to date  /x\n▸ fusion\n"
        f"  fusion           {'█' * 8}{'·' * 12}  44%  eta 0:07     loss 3.179  epoch 2/4  step 11/25\n"
    )
    assert command(monkeypatch, server, "status", "shop") == 0
    text = capsys.readouterr().out
    assert "attempt   10 (qbrec-shop-10): RUNNING for 1:0" in text
    assert "finished  catalog up to date\nstage     fusion\n" in text
    assert "progress  fusion: 44%, eta 0:07, loss 3.179, epoch 2/4, step 11/25" in text
    assert command(monkeypatch, server, "status", "shop", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["attempt"], document["status"], document["exit_code"]) == (10, "RUNNING", None)
    assert document["progress"]["step"] == [11, 25]
    del server.logs["qbrec-shop-1"]
    assert command(monkeypatch, server, "status", "qbrec-shop-1") == 0
    text, error = capsys.readouterr()
    assert "FAILED after" in text
    assert "exit code 4" in text
    assert "its log cannot be had: the cluster answers 500: FileNotFoundError: its node is gone" in error


def test_a_run_that_is_not_there_or_not_the_only_one(server: JobServer, client: JobClient) -> None:
    with pytest.raises(LaunchError, match="the cluster knows no run 'shop'"):
        newest(client, "shop")
    server.add("qbrec-shop-1", "RUNNING", metadata=OURS)
    server.add("qbrec-shop-2", "RUNNING", metadata={**OURS, "storage": "/mnt/other"})
    with pytest.raises(LaunchError, match="2 runs have the name 'shop'") as caught:
        newest(client, "shop")
    assert "qbrec-shop-1, qbrec-shop-2" in str(caught.value.fix)
    assert newest(client, "qbrec-shop-1").storage == "/mnt/storage"
    with pytest.raises(LaunchError, match="knows no run 'books'") as caught:
        newest(client, "books")
    assert caught.value.fix == "it knows shop"


# -- stop ----------------------------------------------------------------------------------------------------


def test_stopping_waits_for_the_end_and_says_what_was_saved(
    monkeypatch: pytest.MonkeyPatch, server: JobServer, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def on_stop(name: str) -> bool:
        asked.append(name)
        if len(asked) == 1:
            return False  # the job's supervisor is not there yet
        server.logs[name] += "error: stage 'fusion' was asked to stop, and saved step 9\n  where: /mnt/x\n"
        threading.Timer(1.5, server.end, (name, "STOPPED")).start()
        return True

    server.on_stop = on_stop
    server.add("qbrec-shop-1", "PENDING", metadata=OURS)
    assert command(monkeypatch, server, "stop", "shop") == 0
    assert asked == ["qbrec-shop-1"] * 2
    out = capsys.readouterr().out
    assert (
        out
        == "qbrec-shop-1 is STOPPED\nstage 'fusion' was asked to stop, and saved step 9\n  where: /mnt/x\n"
    )
    assert command(monkeypatch, server, "stop", "shop") == 0
    assert "had ended already: STOPPED" in capsys.readouterr().out


def test_a_job_that_does_not_end_is_not_waited_for_for_ever(server: JobServer, client: JobClient) -> None:
    server.add("qbrec-shop-1", "RUNNING", metadata=OURS)
    attempt = newest(client, "shop")
    quick = Attempt(**{**vars(attempt), "stop_wait_s": 0.0})
    with pytest.raises(LaunchError, match="has not ended 0 s after it was told to stop") as caught:
        stop(client, quick, margin_s=0)
    assert "qbrec status shop" in str(caught.value.fix)


# -- what is no job server -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("status", "body"), [(200, b"<html>hello</html>"), (404, b"nothing"), (200, b"{}")])
def test_another_server_is_told_from_rays(status: int, body: bytes) -> None:
    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Other) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        with pytest.raises(LaunchError, match="what answers there is not Ray's job server"):
            connect(f"http://127.0.0.1:{other.server_address[1]}")
        other.shutdown()
