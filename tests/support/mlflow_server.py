"""A real MLflow server on SQLite, listening on the loopback interface for as long as a test needs it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.cli import environment


class Server:
    """`mlflow server` on SQLite, in a process group of its own."""

    def __init__(self, folder: Path, port: int) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}", "--workers", "1"]
        command += ["--artifacts-destination", str(folder / "files")]
        # No queue of background jobs beside it: nothing here asks for one, and it takes longer to start.
        env = environment({"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"})
        self.log, self.url = folder / f"server-{port}.log", f"http://127.0.0.1:{port}"
        with self.log.open("ab") as file:
            self.process = subprocess.Popen(
                command, cwd=folder, env=env, stdout=file, stderr=file, start_new_session=True
            )

    def wait(self) -> None:
        """Until it answers."""
        deadline = time.monotonic() + 300
        while not self.answers():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.2)

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as reply:
                return bool(reply.status == 200)
        except OSError:
            return False

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=30)


@contextmanager
def served(folder: Path, port: int) -> Iterator[Server]:
    """A server on the database and the files in a folder."""
    server = Server(folder, port)
    try:
        server.wait()
        yield server
    finally:
        server.kill()
