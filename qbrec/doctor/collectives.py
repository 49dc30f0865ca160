"""gloo, and nccl where there are GPUs: two real processes sum a tensor."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from qbrec.doctor.devices import gpus
from qbrec.doctor.finding import Finding, failure, ok
from qbrec.doctor.ring import TIMEOUT_S

_START_S = 40  # importing torch, twice at the same time, on a slow disk
_FIXES = {
    "gloo": "gloo takes the network interface of this machine's name: let `getent hosts $(hostname)` answer, "
    "or name the interface in GLOO_SOCKET_IFNAME (`ip -brief address` lists them)",
    "nccl": "run it again with NCCL_DEBUG=INFO; often it is NCCL_SOCKET_IFNAME, too little /dev/shm, or a "
    "driver that is older than torch's CUDA",
}


def check_gloo() -> Finding:
    """Two processes on this machine."""
    return all_reduce("gloo", world=2)


def check_nccl() -> list[Finding]:
    """Two GPUs, or the only one; nothing without any."""
    found = len(gpus())
    return [all_reduce("nccl", world=min(found, 2))] if found else []


def all_reduce(backend: str, *, world: int) -> Finding:
    """Whether so many processes of this machine can sum a tensor."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="qbrec-doctor-") as folder:
        ranks = [
            subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "qbrec.doctor.ring",
                    backend,
                    str(rank),
                    str(world),
                    f"{folder}/store",
                ],
                stdout=subprocess.DEVNULL,
                stderr=(Path(folder) / f"{rank}.log").open("w"),
            )
            for rank in range(world)
        ]
        try:
            for rank in ranks:
                rank.wait(timeout=max(began + _START_S + TIMEOUT_S - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            pass  # shows in the missing exit code
        finally:
            for rank in ranks:
                rank.kill()
        codes = [rank.poll() for rank in ranks]
        logs = [(Path(folder) / f"{rank}.log").read_text(errors="replace") for rank in range(world)]
    if codes == [0] * world:
        return ok(
            backend, f"{world} processes summed a tensor ({time.monotonic() - began:.1f} s, imports included)"
        )
    last = next((lines[-1] for log in logs if (lines := log.strip().splitlines())), "no answer in time")
    return failure(
        backend,
        f"{world} processes, exit codes {', '.join(map(str, codes))}",
        wrong=f"an all-reduce fails: {last[:300]}",
        fix=_FIXES[backend],
    )
