"""Memory of one rank while it trains: what DeepSpeed and the loop hold, by ZeRO stage and precision.

Read from the code of DeepSpeed 0.19 (`runtime`: `zero/stage_1_and_2.py`, `zero/stage3.py`,
`fp16/unfused_optimizer.py`) and of `qbrec.engine`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from qbrec.config.sections import ComputeConfig
from qbrec.config.stages import TrainConfig
from qbrec.engine.ds_config import deepspeed_config
from qbrec.plan.parameters import Parameters

FLOAT = 4
REDUCED_AT_ONCE = 500_000_000  # numbers that DeepSpeed flattens for one all-reduce at stage 0
# Resident memory of a process that has imported torch, DeepSpeed and a stage, and has trained one step of a
# tiny network; measured with torch 2.13 and DeepSpeed 0.19 (`benchmarks/plan.py`).
CPU_BASE = 460 << 20
# Of a process that uses a GPU: CUDA's libraries in the host's memory; context, cuBLAS and NCCL on the device.
GPU_HOST_BASE, GPU_BASE = 3 << 30, 1 << 30


@dataclass
class Memory:
    """Bytes of one rank in one place (a GPU, or the host), by what they are.

    Attributes:
        resident: What stays while the stage runs.
        phases: What comes on top in each phase of it; phases do not overlap.
    """

    resident: dict[str, int] = field(default_factory=dict)
    phases: dict[str, dict[str, int]] = field(default_factory=dict)

    def keep(self, name: str, size: float) -> None:
        """Add something that stays."""
        if size:
            self.resident[name] = self.resident.get(name, 0) + round(size)

    def during(self, phase: str, name: str, size: float) -> None:
        """Add something that is there in one phase."""
        if size:
            parts = self.phases.setdefault(phase, {})
            parts[name] = parts.get(name, 0) + round(size)

    @property
    def worst(self) -> str:
        """The phase that needs most; empty where there is none."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()), default="")

    @property
    def peak(self) -> int:
        """Most bytes at one time."""
        return sum(self.resident.values()) + sum(self.phases.get(self.worst, {}).values())

    def parts(self) -> dict[str, int]:
        """What is there at the peak, largest first."""
        found = dict(self.resident)
        for name, size in self.phases.get(self.worst, {}).items():
            found[name] = found.get(name, 0) + size
        return dict(sorted(found.items(), key=lambda item: -item[1]))


@dataclass
class RankMemory:
    """Of one rank: on its GPU, and in the memory of its host. On a CPU, `device` is the host.

    Attributes:
        device: Where it computes.
        host: Where everything else lies.
        mapped: Bytes of files that it maps: the system caches what there is room for, and gives it up.
    """

    device: Memory
    host: Memory
    mapped: int = 0

    @classmethod
    def start(cls, *, on_gpu: bool) -> RankMemory:
        """Of a process that has only started."""
        host = Memory()
        device = Memory() if on_gpu else host
        if on_gpu:
            device.keep("CUDA context", GPU_BASE)
        host.keep("runtime base", GPU_HOST_BASE if on_gpu else CPU_BASE)
        return cls(device, host)

    @property
    def on_gpu(self) -> bool:
        """Whether the device is not the host."""
        return self.device is not self.host


def precise(compute: ComputeConfig, *, precision: str, on_gpu: bool) -> ComputeConfig:
    """The same with device and precision settled, so that nobody asks this machine for them."""
    return compute.model_copy(update={"precision": precision, "device": "cuda" if on_gpu else "cpu"})


def add_training(
    memory: RankMemory,
    parameters: Parameters,
    *,
    compute: ComputeConfig,
    train: TrainConfig,
    world: int,
    activations: int,
    micro_steps: int,
) -> None:
    """Add what `engine.train` holds of a network, in the phases of its loop.

    Args:
        memory: Of one rank; rank 0, which writes the checkpoints.
        parameters: Of the network.
        compute: Settled by `precise`.
        train: Of the stage.
        world: W.
        activations: Bytes at the peak of a forward and backward pass.
        micro_steps: Of a step, on one rank.
    """
    device, host = memory.device, memory.host
    zero = deepspeed_config(compute, train)["zero_optimization"]
    stage, act = compute.zero_stage, FLOAT if compute.precision == "float32" else 2
    total, own = parameters.total, -(-parameters.total // world)
    own_group = -(-max(parameters.matrices, parameters.vectors) // world)  # flat, the larger group of both
    optimiser = host if compute.offload_optimizer else device
    mixed = act < FLOAT
    # The loop keeps the module that it was given; evaluation puts the weights into it, on the device.
    device.keep("kept copy of the weights", FLOAT * total)
    if stage == 3:
        (host if compute.offload_parameters else device).keep("parameters", act * own)
        device.keep("gathered parameters", act * min(total, zero["stage3_prefetch_bucket_size"]))
        device.keep("gradients", act * own)  # DeepSpeed's flat buffer of this rank's part
    else:
        device.keep("parameters", act * total)
    shard = own if stage else total
    # A float32 network has master weights of its own at stages 1 and 2 only: there, flat parts are cloned.
    if mixed or stage in (1, 2):
        optimiser.keep("master weights", FLOAT * shard)
    optimiser.keep("optimiser moments", 2 * FLOAT * shard)
    if stage:
        bucket = zero["reduce_bucket_size"]
        # A CPU gives out the pages of a buffer when they are first written, CUDA all of them at once.
        touched = min(total, bucket) if not memory.on_gpu else bucket
        double = 2 if zero["overlap_comm"] and stage < 3 else 1
        device.keep("reduce bucket", act * touched * double)

    accumulated = act * (total if stage < 2 else own) if micro_steps > 1 and stage < 3 else 0
    device.during("forward and backward", "activations", activations)
    device.during("forward and backward", "gradients", accumulated)
    whole = total if stage < 2 else own
    flattened = min(total, REDUCED_AT_ONCE if not stage else bucket)
    device.during("reduction", "gradients", act * whole if stage < 3 else act * min(total, bucket))
    device.during("reduction", "flattened for the all-reduce", act * flattened)
    phase = "optimiser step"
    if stage < 3:
        device.during(phase, "gradients", act * (own if stage else total))
    if stage or mixed:
        optimiser.during(phase, "flat float32 gradients", FLOAT * (own_group if stage else total))
    # AdamW makes two arrays as large as a tensor: the root of the second moment, and that corrected.
    # On a GPU one of all tensors together.
    tensor = own_group if stage else parameters.largest
    several = memory.on_gpu and not compute.offload_optimizer
    size = (own_group if stage else total) if several else 2 * tensor
    optimiser.during(phase, "AdamW's temporaries", FLOAT * size)
    phase = "checkpoint"
    host.during(phase, "weights and moments, whole", 3 * FLOAT * total)
    # safetensors makes bytes of every tensor, then joins them into one string.
    host.during(phase, "moments as a file", 2 * 2 * FLOAT * total)


def add_rows(memory: RankMemory, *, rows: int, width: int, world: int, batch: int) -> None:
    """Add this rank's part of the ID rows: vectors and one accumulator each, float32.

    Args:
        memory: Of one rank.
        rows: N.
        width: D.
        world: W.
        batch: Items of this rank in one step.
    """
    memory.device.keep("ID rows", FLOAT * (width + 1) * -(-rows // world))
    # Fetched vectors, as they come, as leaves, and their gradients.
    memory.device.during("forward and backward", "fetched ID rows", 3 * FLOAT * width * batch)
