"""Submitting to a cluster: what is refused before anything is sent, identity, what a log tells."""

from __future__ import annotations

import os
import socket
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import qbrec
from qbrec.cli.main import main
from qbrec.config import dump_config, load_config, parse_config
from qbrec.engine.progress import Progress, clock, read_line
from qbrec.errors import ConfigError, LaunchError
from qbrec.jobs.attempts import attempt_of, submission_id
from qbrec.jobs.cluster import check_safe, cluster_address, connect
from qbrec.jobs.deadline import within
from qbrec.jobs.portable import check_portable
from qbrec.jobs.progress import read_log
from qbrec.jobs.submit import code_folder, job_environment, shipped_runtime_env
from qbrec.jobs.token import find_token, use_token
from tests.support.cli import ROOT
from tests.support.s3_server import free_port

NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
FAR = "http://198.51.100.7:8265"  # of a net that documents use and nobody has


@pytest.fixture(autouse=True)
def _nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A user without a token and without a cluster."""
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "")  # so that whatever is set here is taken back
    monkeypatch.setenv("HOME", str(tmp_path))


def tree(folder: str = "/mnt") -> dict[str, Any]:
    return {
        "run": {"name": "shop", "storage": f"{folder}/storage"},
        "data": {"domains": {"shop": {"items": f"{folder}/i.parquet", "interactions": "s3://b/x/*.parquet"}}},
    }


def run_main(monkeypatch: pytest.MonkeyPatch, *args: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["qbrec", *map(str, args)])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


# -- the configuration -------------------------------------------------------------------------------------


def test_a_configuration_travels_in_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_config(tree())
    monkeypatch.setenv("SENT", dump_config(config))
    assert load_config("env:SENT") == config
    assert load_config("env:SENT", overrides=["run.seed=4"]).run.seed == 4
    with pytest.raises(ConfigError, match="no such variable") as caught:
        load_config("env:NOT_SENT")
    assert "env:NOT_SENT" in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        "run.storage=qbrec-storage",
        "run.storage=s3://bucket/qbrec",
        "data.domains.shop.items=~/items.parquet",
        "data.domains.shop.interactions=data/*.parquet",
        "catalog.image.roots=[/mnt/pictures,pictures]",
        "catalog.text.encoder=./minilm",
        "tracking.uri=sqlite:///mlflow.db",
        "tracking.uri=mlruns",
    ],
)
def test_a_path_that_the_nodes_do_not_have_is_named(override: str) -> None:
    key, _, value = override.partition("=")
    config = parse_config(tree())
    check_portable(config)
    changed = load_with(config, override)
    with pytest.raises(ConfigError, match="the nodes of the cluster do not have this folder") as caught:
        check_portable(changed)
    assert caught.value.where == f"{key}={value.strip('[]').rpartition(',')[2]}"
    assert "s3://" in str(caught.value.fix)


def load_with(config: Any, *overrides: str) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BASE", dump_config(config))
        return load_config("env:BASE", overrides=overrides)


@pytest.mark.parametrize(
    "override",
    [
        "tracking.uri=http://user:secret@mlflow:5000",
        "tracking.uri=sqlite:////mnt/mlflow.db",
        "tracking.uri=databricks",
        "catalog.text.encoder=sentence-transformers/all-MiniLM-L6-v2",
        "catalog.image.roots=[s3://bucket/pictures]",
        "run.remote=s3://bucket/qbrec",
        "data.domains.shop.items=file:///mnt/i.parquet",
    ],
)
def test_what_every_node_can_reach_is_sent(override: str) -> None:
    check_portable(load_with(parse_config(tree()), override))


def test_all_relative_paths_are_named_at_once_before_the_cluster_is_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ("--set", "data.domains.a.items=i", "--set", "data.domains.a.interactions=/x", "--address", FAR)
    assert run_main(monkeypatch, "submit", *args) == 2
    error = capsys.readouterr().err
    assert "where: run.storage=qbrec-storage, data.domains.a.items=i\n" in error


# -- code and environment ------------------------------------------------------------------------------------


def test_a_checkout_sends_its_code_and_an_installation_does_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert code_folder() == ROOT
    assert job_environment(parse_config(tree()))["working_dir"] == str(ROOT)
    installed = tmp_path / "site-packages" / "qbrec"
    (installed / "_launch").mkdir(parents=True)
    (installed / "_launch" / "runtime_env.yaml").write_bytes(shipped_runtime_env().read_bytes())
    monkeypatch.setattr(qbrec, "__file__", str(installed / "__init__.py"))
    assert code_folder() is None
    environment = job_environment(parse_config(tree()))
    assert "working_dir" not in environment
    assert environment["env_vars"]["PYTHONUNBUFFERED"] == "1"
    (installed / "_launch" / "runtime_env.yaml").unlink()
    with pytest.raises(ConfigError, match=r"runtime_env\.yaml is missing"):
        shipped_runtime_env()


def test_ray_waits_longer_for_a_driver_than_the_driver_for_its_workers() -> None:
    patient = {**tree(), "compute": {"stop_grace_s": 600.0}}
    waits = [
        int(job_environment(parse_config(t))["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"])
        for t in (tree(), patient)
    ]
    assert waits == [90, 630]


def test_a_runtime_environment_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "env.yaml"
    file.write_text("env_vars: {AWS_PROFILE: lab}\nworking_dir: s3://bucket/code.zip\n")
    environment = job_environment(parse_config(tree()), file)
    assert environment["working_dir"] == "s3://bucket/code.zip"
    assert environment["env_vars"]["AWS_PROFILE"] == "lab"
    file.write_text("env_vars: {RAY_JOB_STOP_WAIT_TIME_S: 90 s}\n")
    with pytest.raises(ConfigError, match="no whole number of seconds: '90 s'"):
        job_environment(parse_config(tree()), file)
    file.write_text("- not a mapping\n")
    with pytest.raises(ConfigError, match="a runtime environment is a mapping"):
        job_environment(parse_config(tree()), file)


# -- address and token ---------------------------------------------------------------------------------------


def test_the_address_is_that_given_else_that_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no cluster is named"):
        cluster_address(None)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    assert cluster_address(None) == "127.0.0.1:6379"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "https://ray.example.com/")
    assert cluster_address(None) == "https://ray.example.com"
    assert cluster_address("http://127.0.0.1:8265") == "http://127.0.0.1:8265"


@pytest.mark.parametrize(
    "address", ["ray://head:10001", "ftp://head", "http://", "http://me:pw123@head:8265"]
)
def test_an_address_of_another_kind_is_refused_without_its_secrets(address: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cluster_address(address)
    assert "pw123" not in str(caught.value)
    assert caught.value.where == "--address"


@pytest.mark.parametrize(
    ("url", "has_token", "allowed"),
    [
        (FAR, False, False),
        (FAR, True, True),
        ("http://head:8265", False, False),
        ("https://head:8265", False, True),
        ("http://127.0.0.1:8265", False, True),
        ("http://127.9.9.9:8265", False, True),
        ("http://[::1]:8265", False, True),
        ("http://localhost:8265", False, True),
        ("http://127.0.0.1.example.com", False, False),
    ],
)
def test_code_goes_to_other_machines_with_a_token_or_over_https(
    url: str, has_token: bool, allowed: bool
) -> None:
    if allowed:
        check_safe(url, has_token=has_token)
        return
    with pytest.raises(ConfigError, match="there is no token: who reaches it runs code on it") as caught:
        check_safe(url, has_token=has_token)
    assert caught.value.where == url
    assert "RAY_AUTH_MODE=token" in str(caught.value.fix)


def test_a_submission_to_another_machine_without_a_token_is_refused_before_it_is_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(socket, "create_connection", lambda *a, **k: asked.append(a))
    args = ["--set", "run.storage=/mnt/s", "--address", FAR]
    assert run_main(monkeypatch, "submit", *args) == 2
    assert f"there is no token: who reaches it runs code on it\n  where: {FAR}" in capsys.readouterr().err
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "sesame")
    assert run_main(monkeypatch, "submit", *args) == 2, "the token would not be sent"
    assert "sesame" not in capsys.readouterr().err
    assert not asked


def test_where_the_token_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert find_token() is None
    assert use_token() is False
    default = tmp_path / ".ray" / "auth_token"
    default.parent.mkdir()
    default.write_text("sesame\n")
    assert find_token().file == default  # type: ignore[union-attr]
    assert use_token() is True
    assert os.environ["RAY_AUTH_MODE"] == "token"
    named = tmp_path / "token"
    named.write_text("sesame\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(named))
    assert find_token().file == named  # type: ignore[union-attr]
    monkeypatch.setenv("RAY_AUTH_TOKEN", "sesame")
    assert find_token().place == "RAY_AUTH_TOKEN"  # type: ignore[union-attr]


def test_a_token_that_is_asked_for_and_not_there_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with pytest.raises(ConfigError, match="RAY_AUTH_MODE is token, but there is none"):
        use_token()
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="cannot read the token: No such file") as caught:
        connect("http://127.0.0.1:1")  # Ray itself would abort the process
    assert str(tmp_path / "nowhere") in str(caught.value)
    (tmp_path / "nowhere").write_text(" \n")
    with pytest.raises(ConfigError, match="the file of the token is empty"):
        use_token()


def test_without_ray_it_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "qbrec.jobs.ray_client", raising=False)
    for name in ("ray", "ray.exceptions", "ray.job_submission"):
        monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
    assert run_main(monkeypatch, "status", "shop", "--address", "http://127.0.0.1:1") == 5
    assert "pip install 'ray[default]'" in capsys.readouterr().err


# -- clusters that do not answer -----------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["http://", "https://", ""])  # without one it is the cluster's own port
@pytest.mark.parametrize("command", [["status", "shop"], ["logs", "shop"], ["stop", "shop"]])
def test_a_dead_port_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str], scheme: str
) -> None:
    url = f"{scheme}127.0.0.1:{free_port()}"
    assert run_main(monkeypatch, *command, "--address", url) == 5
    error = capsys.readouterr().err
    assert error.startswith("error: the cluster does not answer: ")
    assert f"\n  where: {url}\n  fix: " in error


def test_a_server_that_never_answers_does_not_hang_us() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(LaunchError, match="does not answer") as caught:
            connect(url, answer_s=0.3)
    assert caught.value.where == url
    assert caught.value.exit_code == 5


def test_a_call_that_is_late_is_left_behind() -> None:
    never = threading.Event()
    with pytest.raises(TimeoutError, match=r"no answer within 0\.1 s"):
        within(0.1, never.wait)
    assert within(5, lambda: "in time") == "in time"
    with pytest.raises(ZeroDivisionError):
        within(5, lambda: 1 // 0)


# -- identity ------------------------------------------------------------------------------------------------


def job(**fields: Any) -> Any:
    found = {"submission_id": "qbrec-shop-1", "metadata": {"qbrec_run": "shop", "storage": "/mnt/s"}}
    more = {
        "status": "RUNNING",
        "message": "Job is running.",
        "start_time": 1000,
        "end_time": None,
        "driver_exit_code": None,
        "runtime_env": {},
    }
    return SimpleNamespace(**{**found, **more, **fields})


@given(NAMES, st.integers(1, 10**6), NAMES, st.integers(1, 10**6))
def test_no_two_attempts_share_an_id(a: str, i: int, b: str, j: int) -> None:
    assert (submission_id(a, i) == submission_id(b, j)) == ((a, i) == (b, j))
    found = attempt_of(job(submission_id=submission_id(a, i), metadata={"qbrec_run": a, "storage": "/mnt/s"}))
    assert found is not None
    assert (found.run, found.number) == (a, i)


def test_jobs_of_others_are_no_attempts() -> None:
    assert attempt_of(job()) is not None
    assert attempt_of(job(submission_id="raysubmit_x")) is None
    assert attempt_of(job(submission_id=None)) is None
    assert attempt_of(job(metadata=None)) is None
    assert attempt_of(job(metadata={"qbrec_run": "other", "storage": "/mnt/s"})) is None


@pytest.mark.parametrize(
    ("status", "driver", "code"),
    [
        ("RUNNING", None, None),
        ("PENDING", None, None),
        ("SUCCEEDED", 0, 0),
        ("FAILED", 3, 3),
        ("FAILED", 143, 143),
        ("FAILED", -9, 137),
        ("FAILED", None, 5),
        ("STOPPED", None, 143),
    ],
)
def test_the_exit_code_is_that_of_the_driver(status: str, driver: int | None, code: int | None) -> None:
    found = attempt_of(job(status=status, driver_exit_code=driver))
    assert found is not None
    assert found.exit_code == code
    assert found.has_ended == (code is not None)


# -- what a log tells ----------------------------------------------------------------------------------------


@given(
    label=st.sampled_from(["fusion", "nearest neighbours: image", "fetching x, 300 MB"]),
    total=st.integers(1, 500),
    done=st.integers(0, 500),
    loss=st.floats(1e-6, 1e6),
)
def test_a_progress_line_is_read_as_it_was_written(label: str, total: int, done: int, loss: float) -> None:
    progress = Progress(total, label, silent=True)
    done = min(done, total)
    progress.update(done, **{"loss": loss, "epoch": "2/4", "step": f"{done}/{total}", "ndcg@10": 0.125})
    found = read_line(progress.line())
    assert found is not None
    assert found.label == label
    assert abs(found.share - done / total) <= 0.005 + 1e-9
    assert (found.eta_s is None) == (done in (0, total))
    assert found.info == {
        "loss": f"{loss:.4g}", "epoch": "2/4", "step": f"{done}/{total}", "ndcg@10": "0.125"
    }  # fmt: skip
    assert read_line(f"{label} {done}/{total}") is None


def test_a_time_of_hours_is_read_back() -> None:
    line = f"  pretrain  {'█' * 10}{'·' * 10}  50%  eta {clock(3 * 3600 + 62)}"
    assert replace(read_line(line), info={}).eta_s == 3 * 3600 + 62  # type: ignore[type-var,union-attr]


LOG = """\
Running entrypoint for job qbrec-shop-2: python -m qbrec run
✓ catalog     up to date  /mnt/storage/artifacts/catalog/0123
▸ fusion
  fusion                     ████████············  44%  eta 0:07     loss 3.179  epoch 2/4  step 11/25
✓ fusion        16.1 s    /mnt/storage/artifacts/fusion/4567
warning: something
▸ pretrain
  pretrain                   █···················   5%  eta 3:00     loss 12.14  epoch 2/20  step 4/80
  pretrain                   ██··················  10%  eta 2:50     loss 11.5  epoch 3/20  step 8/80
"""
ERROR = """\
error: stage 'pretrain' was asked to stop, and saved step 9
  where: /mnt/storage/runs/shop/checkpoints/pretrain
  fix:   run the same command again: it goes on with the next step
(raylet) goodbye
"""


def test_a_log_tells_stage_progress_and_last_words() -> None:
    seen = read_log(LOG)
    assert seen.finished == {"catalog": None, "fusion": 16.1}
    assert (seen.stage, seen.error) == ("pretrain", None)
    assert seen.document()["progress"] == {
        "label": "pretrain", "share": 0.1, "eta_s": 170, "loss": 11.5, "epoch": [3, 20], "step": [8, 80]
    }  # fmt: skip
    assert read_log(LOG + ERROR).error == "\n".join(ERROR.removeprefix("error: ").splitlines()[:3])
    assert read_log(LOG + "✓ pretrain 140.0 s    /x\n").stage is None
    assert read_log("").document() == {"stage": None, "finished": {}, "error": None}
