"""The doctor: each check meets the fault it is there for, and says what is wrong and how to mend it."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from qbrec.cli.main import main
from qbrec.config import RootConfig, parse_config
from qbrec.doctor.clock import check_clock, skew_finding
from qbrec.doctor.cluster import check_cluster
from qbrec.doctor.devices import check_gpus
from qbrec.doctor.examine import guarded
from qbrec.doctor.finding import Finding, document, failure, ok, text, warning
from qbrec.doctor.input import check_input
from qbrec.doctor.limits import check_disk, check_object_store, check_open_files
from qbrec.doctor.storage import check_storage
from qbrec.doctor.token import check_token
from qbrec.doctor.tracking import check_tracking, without_secrets
from qbrec.doctor.versions import check_versions, package_findings, python_finding
from tests.support.cli import ROOT, environment
from tests.support.job_server import job_server
from tests.support.s3_server import FaultProxy, free_port

NOBODY = 65534


@pytest.fixture(autouse=True)
def _nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A user without a token and without a cluster."""
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "")
    monkeypatch.setenv("HOME", str(tmp_path))


def config(storage: Path | str, **sections: Any) -> RootConfig:
    return parse_config({"run": {"storage": str(storage), **sections.pop("run", {})}, **sections})


def one(findings: Finding | list[Finding], level: str) -> Finding:
    (found,) = [findings] if isinstance(findings, Finding) else findings
    assert found.level == level, found
    assert level == "ok" or (found.wrong and found.fix)
    return found


@contextmanager
def web(*, status: int = 200, ahead: float = 0.0, version: str = "3.17.2") -> Iterator[str]:
    """A server whose clock is wrong, and which is MLflow of some version, or something else."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = {"/health": b"OK", "/version": version.encode()}.get(self.path, b"?")
            self.send_response_only(status)
            self.send_header("Date", formatdate(time.time() + ahead, usegmt=True))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


# -- what is installed ---------------------------------------------------------------------------------------


def test_this_environment_is_within_the_ranges() -> None:
    found = {f.check: f for f in check_versions()}
    assert {"python", "torch", "deepspeed", "ray", "mlflow", "numpy", "pyarrow", "packages"} <= set(found)
    assert [f for f in found.values() if f.level != "ok"] == []


def test_a_package_of_another_version_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, version in (("numpy", "1.26.4"), ("click", "8.0.0"), ("mlflow", "4.1.0")):
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    needed = ["numpy>=2.0", "click>=8.1", "mlflow>=3.17,<4", "pyyaml>=6.0", 'pytest>=99; extra == "dev"']
    found = {f.check: f for f in package_findings(needed)}
    assert {name: f.level for name, f in found.items()} == {
        "mlflow": "error", "numpy": "error", "click": "error", "packages": "ok"
    }  # fmt: skip
    assert found["numpy"].found == "1.26.4"
    assert found["numpy"].wrong == "qbrec is written for numpy>=2.0"
    assert found["numpy"].fix == "pip install 'numpy>=2.0'"


def test_what_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    found = {f.check: f for f in package_findings(["torch>=2.13", "ray[data]>=2.60"])}
    assert (found["torch"].level, found["torch"].wrong) == ("error", "qbrec needs torch>=2.13")
    assert found["ray"].level == "warning", "training under torchrun goes without"
    assert "torchrun" in found["ray"].wrong
    assert "qbrec is not installed" in one(check_versions(), "warning").wrong


def test_an_old_python_is_named() -> None:
    assert one(python_finding(">=3.11", version="3.10.9"), "error").wrong == "qbrec needs >=3.11"
    one(python_finding(">=3.11", version="3.15.0rc1"), "ok")


# -- GPUs ----------------------------------------------------------------------------------------------------

WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use a GPU of this machine")


@WITHOUT_GPU
def test_a_gpu_that_is_configured_and_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = one(check_gpus(config(tmp_path, compute={"device": "cuda"})), "error")
    assert found.wrong == "compute.device is cuda"
    assert "CPU cores" in one(check_gpus(config(tmp_path)), "ok").found


@WITHOUT_GPU
def test_a_gpu_that_torch_cannot_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559, 81000, 570.86.15'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = one(check_gpus(config(tmp_path)), "warning")
    assert found.found == "NVIDIA H100 80GB HBM3, 79 of 80 GiB free, driver 570.86.15"
    assert found.wrong.startswith(f"torch {torch.__version__} cannot use them: ")
    one(check_gpus(config(tmp_path, compute={"device": "cuda"})), "error")


# -- limits --------------------------------------------------------------------------------------------------


def test_too_few_open_files_are_named() -> None:
    import resource

    code = "from qbrec.doctor.limits import check_open_files as c; f = c(); print(f.level, f.found, f.fix)"
    limited = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True, check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, 512)),
    )  # fmt: skip
    assert limited.stdout.startswith("warning 256, raised to 512 by Ray ulimit -n 65536")
    assert check_open_files().check == "open files"


def test_shared_memory_that_is_too_small_is_named(tmp_path: Path) -> None:
    found = one(check_object_store(shared=str(tmp_path / "no-shm"), memory=10**11), "warning")
    assert found.found.startswith("10.0 GB; ")
    assert "Ray keeps objects in files on disk" in found.wrong
    assert "docker run --shm-size=33.0gb" in found.fix
    # A folder of the disk stands for a /dev/shm with room.
    one(check_object_store(shared=str(tmp_path), memory=10**6), "ok")


def test_a_full_disk_is_named() -> None:
    storage, _ = check_disk(config("/proc/storage"))  # a file system without a single free block
    assert one(storage, "error").wrong == "there is no room for checkpoints and artifacts"
    assert "0.0 of 0.0 GB free in /proc" in storage.found


# -- storage -------------------------------------------------------------------------------------------------


@contextmanager
def unprivileged() -> Iterator[Path]:
    """A folder in which this process may not write: as root it becomes nobody for the time."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    try:
        yield folder
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_input_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert one(check_input(config(tmp_path)), "ok").found == "no domain is configured"
    places = {role: str(tmp_path / f"{role}.parquet") for role in ("items", "interactions")}
    asked = config(tmp_path, data={"domains": {"shop": places}})
    (tmp_path / "items.parquet").write_bytes(bytes(1_500_000))
    found = one(check_input(asked), "error")
    assert (found.wrong, found.found) == (
        "no Parquet file here",
        f"data.domains.shop.interactions: {places['interactions']}",
    )
    (tmp_path / "interactions.parquet").write_bytes(bytes(500_000))
    assert one(check_input(asked), "ok").found == "shop: 2 Parquet files, 2.0 MB"


def test_a_storage_that_works_is_left_as_it_was(tmp_path: Path) -> None:
    found = one(check_storage(config(tmp_path / "deep" / "storage")), "ok")
    assert f"in {tmp_path}, where a run will make it" in found.found
    assert list(tmp_path.iterdir()) == []


def test_a_storage_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with unprivileged() as folder:
        found = one(check_storage(config(folder / "storage")), "error")
        uid = os.geteuid()
    assert found.wrong == f"cannot write a file in {folder} and read it back: Permission denied"
    assert f"uid {uid}" in found.fix
    assert "run.remote" in one(check_storage(config("s3://bucket/x")), "error").fix
    (tmp_path / "storage").write_text("a file")
    assert "Not a directory" in one(check_storage(config(tmp_path / "storage")), "error").wrong


def test_a_remote_home_is_tried_as_well(tmp_path: Path, s3: FaultProxy) -> None:
    remote = s3.bucket() + "/qbrec"
    local, found = check_storage(config(tmp_path, run={"remote": remote}))
    assert (local.level, one(found, "ok").found) == ("ok", f"{remote}: written, read back, deleted")
    assert not list(s3.behind.get_file_info(_below(remote)))
    fault = s3.fault("status", "qbrec-doctor-", method="PUT", code=403, times=9)
    _, found = check_storage(config(tmp_path, run={"remote": remote}))
    assert fault.fired
    assert "access is denied" in one(found, "error").wrong
    assert "credentials" in found.fix


def _below(uri: str) -> Any:
    import pyarrow.fs as pafs

    return pafs.FileSelector(uri.removeprefix("s3://"), recursive=True, allow_not_found=True)


def test_a_remote_home_that_is_not_there_does_not_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    began = time.monotonic()
    _, found = check_storage(config(tmp_path, run={"remote": "s3://bucket/qbrec"}))
    assert "the store cannot be reached" in one(found, "error").wrong
    assert "AWS_ENDPOINT_URL" in found.fix
    assert time.monotonic() - began < 15


# -- MLflow --------------------------------------------------------------------------------------------------


def test_an_mlflow_server_that_is_not_there_or_something_else(tmp_path: Path) -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    found = one(check_tracking(config(tmp_path, tracking={"uri": uri})), "warning")
    assert found.found == uri
    assert "Connection refused" in found.wrong
    assert "`qbrec track` sends later what it missed" in found.fix
    with web(status=404) as uri:
        found = one(check_tracking(config(tmp_path, tracking={"uri": uri})), "warning")
        assert "no MLflow server (HTTP 404)" in found.wrong
    with web(version="2.9.1") as uri:
        found = one(check_tracking(config(tmp_path, tracking={"uri": uri})), "warning")
        assert "differ in their major version" in found.wrong
    with web() as uri:
        with_password = uri.replace("http://", "http://me:pw123@")
        found = one(check_tracking(config(tmp_path, tracking={"uri": with_password})), "ok")
        assert found.found.startswith(f"{uri}: version 3.17.2")
    uri = f"postgresql://me:pw123@127.0.0.1:{free_port()}/mlflow"
    assert "pw123" not in str(one(check_tracking(config(tmp_path, tracking={"uri": uri})), "warning"))
    assert without_secrets("http://a:b@c:1/d?token=e") == "http://c:1/d"


def test_a_damaged_database_of_mlflow_is_named(tmp_path: Path) -> None:
    assert "a run will make it" in one(check_tracking(config(tmp_path)), "ok").found
    (tmp_path / "mlflow.db").write_bytes(b"not a database" * 100)
    found = one(check_tracking(config(tmp_path)), "warning")
    assert "file is not a database" in found.wrong
    (tmp_path / "mlflow.db").unlink()
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        database.execute("CREATE TABLE experiments (name TEXT)")
    one(check_tracking(config(tmp_path)), "ok")
    one(check_tracking(config("s3://b/x", tracking={"enabled": False})), "ok")


# -- token and cluster ---------------------------------------------------------------------------------------


def test_a_token_that_others_can_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = tmp_path / "token"
    token.write_text("sesame")
    token.chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    found = one(check_token(), "warning")
    assert found.found == f"RAY_AUTH_MODE=token, token in {token}, mode 644"
    assert found.fix == f"chmod 600 {token}"
    token.chmod(0o600)
    assert "sesame" not in str(one(check_token(), "ok"))
    token.unlink()
    assert "cannot read the token" in one(check_token(), "error").wrong
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    assert one(check_token(), "error").wrong == "RAY_AUTH_MODE is token, but there is none"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert "runs code on it" in one(check_token(), "warning").wrong


def test_a_cluster_is_asked_where_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_cluster() == []
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", f"http://127.0.0.1:{free_port()}")
    assert "the cluster does not answer" in one(check_cluster(), "error").wrong
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://198.51.100.7:8265")
    assert "there is no token" in one(check_cluster(), "error").wrong
    with job_server() as server:
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", server.url)
        one(check_cluster(), "ok")
        server.ray_version = "2.50.1"
        found = one(check_cluster(), "warning")
        assert "Ray wants the same version everywhere" in found.wrong
        assert "==2.50.1" in found.fix


# -- clock ---------------------------------------------------------------------------------------------------


def test_a_clock_that_is_off_is_named(tmp_path: Path) -> None:
    for ahead, level in ((0.0, "ok"), (-60.0, "warning"), (3600.0, "error")):
        with web(ahead=ahead) as uri:
            found = one(check_clock(config(tmp_path, tracking={"uri": uri})), level)
            assert "storage +0.0 s" in found.found or "storage -0.0 s" in found.found
            if ahead:
                assert "the clocks differ by " in found.wrong
                assert "timedatectl set-ntp true" in found.fix
    assert skew_finding({}).found == "no other clock answers"


# -- all of it -----------------------------------------------------------------------------------------------


def test_a_check_that_breaks_or_hangs_is_a_finding_itself() -> None:
    def breaks() -> Finding:
        raise KeyError("surprise")

    found = one(guarded("strange", breaks), "error")
    assert "KeyError: 'surprise'" in found.wrong
    never = threading.Event()
    found = one(guarded("slow", lambda: [ok("slow", str(never.wait()))], limit_s=0.1), "error")
    assert "no answer within 0.1 s" in found.wrong


def test_every_line_says_what_and_how() -> None:
    findings = [
        ok("python", "3.11"),
        warning("token", "mode 644", wrong="others may read it", fix="chmod 600"),
        failure("storage", "/x", wrong="cannot write", fix="let us"),
    ]
    lines = text(findings).splitlines()
    assert [line[:1] for line in lines if not line.startswith(" ")] == ["✓", "!", "✗", "", "3"]
    assert lines[-1] == "3 checks: 1 fail, 1 to look at"
    assert "fix: chmod 600" in lines[3]
    assert json.loads(json.dumps(document(findings)))["ok"] is False
    with pytest.raises(AssertionError):
        Finding("x", "warning", "found")


def test_a_wrong_configuration_is_no_illness(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["qbrec", "doctor", "--set", "run.nmae=x"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert "did you mean 'run.name'" in capsys.readouterr().err
