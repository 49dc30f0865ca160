"""Ray nodes on this machine, each started by `ray start` in a session of its own, so that it can be lost."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.cli import ROOT, environment
from tests.support.processes import end_session, free_ports, kill_all, members

_PORTS = 10  # of one node
_NODES = 5


class Node:
    """One `ray start --block` and all that it has started."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process, self.log = process, log

    def members(self) -> list[int]:
        """Living processes of the node's session."""
        return members(self.process.pid)

    def kill(self) -> None:
        """`kill -9` of everything: the machine is gone from one moment to the next."""
        left = self.members()
        assert left, "the fault did not fire"
        kill_all(left)
        self.process.wait(timeout=30)

    def announce_end(self) -> None:
        """SIGTERM to `ray start`, as Kubernetes and Slurm send it: Ray drains the node before it goes."""
        assert self.process.poll() is None, "the fault did not fire"
        self.process.send_signal(signal.SIGTERM)

    def stop(self) -> None:
        """End whatever is left of the node."""
        end_session(self.process.pid, timeout=30)
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(timeout=30)


class Nodes:
    """A cluster whose nodes come and go; node 0 is the head.

    Attributes:
        address: What `ray.init` connects to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.port, self.started = (
            folder,
            free_ports(_PORTS * _NODES, first=22_000, end=27_900),
            0,
        )
        self.address = f"127.0.0.1:{self.port}"
        self.nodes: list[Node] = []

    def add(self, *, cpus: int = 1) -> Node:
        """Start a node and wait until it is up."""
        number = self.started
        self.started += 1
        assert number < _NODES - 1
        base, folder = self.port + _PORTS * (number + 1), self.folder / f"n{number}"
        folder.mkdir()
        where = ["--head", "--port", str(self.port), "--include-dashboard", "false"]
        if number:
            where = ["--address", self.address]
        ports = ("node-manager", "object-manager", "dashboard-agent-listen", "dashboard-agent-grpc")
        ports += ("runtime-env-agent", "metrics-export")
        command = [
            str(Path(sys.executable).parent / "ray"),
            "start",
            "--block",
            "--disable-usage-stats",
            *where,
        ]
        command += [
            "--node-ip-address",
            "127.0.0.1",
            "--num-cpus",
            str(cpus),
            "--include-log-monitor",
            "false",
        ]
        command += ["--object-store-memory", "100000000", "--temp-dir", str(folder)]
        command += [a for i, name in enumerate(ports) for a in (f"--{name}-port", str(base + i))]
        log = self.folder / f"n{number}.log"
        env = environment({"RAY_AUTH_MODE": "disabled", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "60"})
        with log.open("wb") as file:
            process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=file, stderr=file, start_new_session=True
            )
        node = Node(process, log)
        self.nodes.append(node)
        deadline = time.monotonic() + 120
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        return node


@contextmanager
def ray_nodes(*, cpus: tuple[int, ...]) -> Iterator[Nodes]:
    """A cluster with nodes of so many CPUs; the folder is short because sockets lie below it."""
    folder = Path(tempfile.mkdtemp(prefix="qn", dir="/tmp"))
    nodes = Nodes(folder)
    try:
        for count in cpus:
            nodes.add(cpus=count)
        yield nodes
    finally:
        for node in reversed(nodes.nodes):
            node.stop()
        shutil.rmtree(folder, ignore_errors=True)
