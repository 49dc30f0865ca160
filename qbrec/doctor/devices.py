"""GPUs: their memory and driver, and whether torch can use them."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass

from qbrec.config import RootConfig
from qbrec.doctor.finding import Finding, failure, ok, warning

_FIELDS = "name,memory.total,memory.free,driver_version"
_MOSTLY_FREE = 0.9
_DRIVER = "/dev/nvidiactl"


@dataclass(frozen=True)
class Gpu:
    """One GPU as its driver sees it; memory in MiB."""

    name: str
    total: int
    free: int
    driver: str


def gpus() -> list[Gpu]:
    """The GPUs of this machine, by nvidia-smi: it answers at once and takes no memory of theirs."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    done = subprocess.run(
        [program, f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
        timeout=10,
    )
    found = []
    for line in done.stdout.splitlines() if done.returncode == 0 else ():
        name, total, free, driver = (field.strip() for field in line.split(","))
        found.append(Gpu(name, int(total), int(free), driver))
    return found


def check_gpus(config: RootConfig) -> Finding:
    """Whether the device that is configured is there and free."""
    wanted, found = config.compute.device, gpus()
    if not found and not os.path.exists(_DRIVER):
        cores = len(os.sched_getaffinity(0))
        if wanted == "cuda":
            return failure(
                "gpus",
                f"none; {cores} CPU cores",
                wrong="compute.device is cuda",
                fix="run on a node with GPUs (in a container: `--gpus all`), or set compute.device=auto",
            )
        return ok("gpus", f"none: training runs on {cores} CPU cores")
    import torch

    usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    shown = "; ".join(_shown(gpu) for gpu in found) or f"{usable}, by torch (nvidia-smi names none)"
    if not usable:
        make = failure if wanted == "cuda" else warning
        built = torch.version.cuda
        return make(
            "gpus",
            shown,
            wrong=f"torch {torch.__version__} cannot use them: "
            + (f"it is built for CUDA {built}, and the driver or CUDA_VISIBLE_DEVICES does not let it"
               if built else "it is built without CUDA"),
            fix="update the driver, and unset CUDA_VISIBLE_DEVICES"
            if built
            else "install torch from PyPI (without PIP_EXTRA_INDEX_URL for the CPU build)",
        )  # fmt: skip
    busy = [gpu for gpu in found if gpu.free < _MOSTLY_FREE * gpu.total]
    if busy:
        return warning(
            "gpus",
            shown,
            wrong=f"other processes hold memory of {len(busy)} of {len(found)}",
            fix="`nvidia-smi` lists them; end them, or leave those out with CUDA_VISIBLE_DEVICES",
        )
    return ok("gpus", shown)


def _shown(gpu: Gpu) -> str:
    return f"{gpu.name}, {gpu.free / 1024:.0f} of {gpu.total / 1024:.0f} GiB free, driver {gpu.driver}"
