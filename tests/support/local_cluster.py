"""`cluster/local.sh` for tests: a real Ray cluster of several nodes on this machine, on ports of its own."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.cli import ROOT, environment, must
from tests.support.processes import free_ports


class LocalCluster:
    """A running cluster.

    Attributes:
        folder: State, logs and token.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._env = environment(
            {
                "QBREC_CLUSTER_DIR": str(folder),
                "QBREC_CLUSTER_PORT": str(free_ports(60, first=28_000, end=32_000)),
                "QBREC_VENV": str(Path(sys.executable).parents[1]),
            }
        )

    def __call__(self, *args: str) -> subprocess.CompletedProcess[str]:
        """`bash cluster/local.sh ARGS`; its exit code is not checked."""
        command = ["bash", str(ROOT / "cluster" / "local.sh"), *args]
        return subprocess.run(command, cwd=ROOT, env=self._env, capture_output=True, text=True, timeout=900)

    def submit_run(self, config: Path) -> subprocess.CompletedProcess[str]:
        """`ray job submit … -- python -m qbrec run` as the README has it, until the job has ended."""
        return self(
            "submit", "--working-dir", ".", "--runtime-env", "launch/runtime_env.yaml",
            "--", "python", "-m", "qbrec", "run", "--config", str(config),
        )  # fmt: skip

    def reach(self) -> dict[str, str]:
        """The variables with which a client finds the cluster and is let in."""
        exports = (shlex.split(line)[1] for line in must(self("env")).splitlines())
        return dict(line.split("=", 1) for line in exports)

    def processes(self, title: bytes) -> dict[int, int]:
        """Process id → node of the processes whose command line contains `title`."""
        leaders = {
            int(path.read_text().split()[0]): int(path.stem[1:]) for path in self.folder.glob("n*.pid")
        }
        found = {}
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if title in path.read_bytes():
                    found[int(path.parent.name)] = leaders[os.getsid(int(path.parent.name))]
            except (OSError, KeyError):  # gone, or of somebody else
                continue
        return found


@contextmanager
def local_cluster(nodes: int) -> Iterator[LocalCluster]:
    """`up` so many nodes of one CPU each; `down` must leave nothing behind."""
    folder = Path(tempfile.mkdtemp(prefix="qb-"))  # short: sockets lie below it
    cluster = LocalCluster(folder)
    try:
        must(cluster("up", str(nodes)))
        yield cluster
    finally:
        must(cluster("down"))
        left = [line for path in Path("/proc").glob("[0-9]*/cmdline") if str(folder) in (line := _read(path))]
        shutil.rmtree(folder, ignore_errors=True)
        assert not left, f"`down` left processes behind: {left}"


def _read(path: Path) -> str:
    try:
        return path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
