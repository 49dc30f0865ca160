"""What accelerators can do, by their vendor's data sheets; what a CPU can do, measured."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from functools import cache

import torch

from qbrec.errors import ConfigError

_GB, _TERA = 10**9, 10**12
_GEMM_SIDE = 1024  # of the square matrices that a CPU is measured on: enough for its full rate
_GEMM_SECONDS = 0.15


@dataclass(frozen=True)
class Accelerator:
    """One model of GPU.

    Attributes:
        name: As `qbrec plan --gpu` calls it.
        words: What `torch.cuda.get_device_name` contains, in lower case and cut at everything but letters and
            digits; all of them.
        half: Dense FLOP/s of matrix products in float16 (and bfloat16, where it has that) summed in float32.
        tf32: Dense FLOP/s in TF32; None where it has none.
        float32: FLOP/s in float32, outside tensor cores.
        memory_bytes: Of the device.
        bandwidth: Bytes/s of that memory.
        has_bfloat16: Whether bfloat16 is computed natively.
    """

    name: str
    words: tuple[str, ...]
    half: float
    tf32: float | None
    float32: float
    memory_bytes: int
    bandwidth: float
    has_bfloat16: bool = True


def _gpu(
    name: str, words: str, half: float, tf32: float, float32: float, memory: float, bandwidth: float
) -> Accelerator:
    """TFLOP/s, GB and GB/s; `tf32` 0: older than Ampere, neither TF32 nor bfloat16."""
    return Accelerator(
        name,
        tuple(words.split()),
        half * _TERA,
        tf32 * _TERA or None,
        float32 * _TERA,
        int(memory * _GB),
        bandwidth * _GB,
        has_bfloat16=tf32 > 0,
    )


# Dense figures of NVIDIA's data sheets (those print the sparse ones, twice as high, from Ampere on). Of two
# entries that fit a name the first one counts, so the special come before the general.
ACCELERATORS = (
    _gpu("b200", "b200", 2250, 1100, 75, 180, 8000),
    _gpu("gh200", "gh200", 989.4, 494.7, 66.9, 96, 4000),
    _gpu("h200", "h200", 989.4, 494.7, 66.9, 141, 4800),
    _gpu("h100-pcie", "h100 pcie", 756, 378, 51, 80, 2000),
    _gpu("h100-nvl", "h100 nvl", 835, 417.5, 60, 94, 3900),
    _gpu("h100", "h100", 989.4, 494.7, 66.9, 80, 3350),
    _gpu("a100-40", "a100 40gb", 312, 156, 19.5, 40, 1555),
    _gpu("a100-80", "a100 80gb", 312, 156, 19.5, 80, 2039),
    _gpu("a40", "a40", 149.7, 74.8, 37.4, 48, 696),
    _gpu("a30", "a30", 165, 82, 10.3, 24, 933),
    _gpu("a10g", "a10g", 70, 35, 31.5, 24, 600),
    _gpu("a10", "a10", 125, 62.5, 31.2, 24, 600),
    _gpu("l40s", "l40s", 362, 183, 91.6, 48, 864),
    _gpu("l40", "l40", 181, 90.5, 90.5, 48, 864),
    _gpu("l4", "l4", 121, 60, 30.3, 24, 300),
    _gpu("rtx4090", "rtx 4090", 165.2, 82.6, 82.6, 24, 1008),
    _gpu("rtx3090", "rtx 3090", 71, 35.6, 35.6, 24, 936),
    _gpu("a6000", "a6000", 154.8, 77.4, 38.7, 48, 768),
    _gpu("v100-32", "v100 32gb", 125, 0, 15.7, 32, 900),
    _gpu("v100", "v100", 125, 0, 15.7, 16, 900),
    _gpu("t4", "t4", 65, 0, 8.1, 16, 320),
)


def find(device_name: str) -> Accelerator | None:
    """The accelerator of a name as `torch.cuda.get_device_name` gives it.

    None for one that is not in the table, and for a slice of a GPU (MIG), whose share the name does not tell.
    """
    words = set(re.split(r"[^a-z0-9]+", device_name.lower()))
    if "mig" in words:
        return None
    return next((gpu for gpu in ACCELERATORS if words.issuperset(gpu.words)), None)


def named(name: str) -> Accelerator:
    """The accelerator of a name in the table, such as `h100` or `a100-80`.

    Raises:
        ConfigError: There is none.
    """
    for gpu in ACCELERATORS:
        if gpu.name == name.lower():
            return gpu
    known = ", ".join(gpu.name for gpu in ACCELERATORS)
    raise ConfigError(f"unknown accelerator {name!r}", where="--gpu", fix=f"name one of {known}, or cpu")


def peak_of(gpu: Accelerator, precision: str, *, allow_tf32: bool = False) -> float:
    """Dense FLOP/s of matrix products in `float32`, `bfloat16` or `float16`.

    Args:
        gpu: The accelerator.
        precision: What is multiplied.
        allow_tf32: Whether float32 products may be rounded to TF32.
    """
    if precision != "float32":
        return gpu.half
    return gpu.tf32 if allow_tf32 and gpu.tf32 else gpu.float32


def peak_flops(device: torch.device, precision: str) -> float | None:
    """What a device could do at best, in FLOP/s: the denominator of a model-FLOPs utilisation.

    A GPU's peak is that of the data sheet. A CPU's is measured once per process, as a float32 matrix product
    on `torch.get_num_threads()` threads; it stands for every precision there.

    Args:
        device: What computes.
        precision: `float32`, `bfloat16` or `float16`.

    Returns:
        None for a device that is not in the table.
    """
    if device.type == "cpu":
        return _cpu_flops()
    if device.type != "cuda":
        return None
    gpu = find(torch.cuda.get_device_name(device))
    if gpu is None:
        return None
    return peak_of(gpu, precision, allow_tf32=torch.backends.cuda.matmul.allow_tf32)


@cache
def _cpu_flops() -> float:
    """FLOP/s of a float32 GEMM: the best of as many as fit into a short time; the first one warms up."""
    a, b = torch.ones(2, _GEMM_SIDE, _GEMM_SIDE).unbind()
    out = torch.empty_like(a)
    best, end = float("inf"), time.perf_counter() + _GEMM_SECONDS
    with torch.no_grad():
        torch.mm(a, b, out=out)
        while True:
            began = time.perf_counter()
            torch.mm(a, b, out=out)
            now = time.perf_counter()
            best = min(best, now - began)
            if now >= end:
                return 2 * _GEMM_SIDE**3 / best
