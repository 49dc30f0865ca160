"""A plan as text for people, and as a document for programs."""

from __future__ import annotations

from typing import Any

from qbrec.plan.memory import Memory
from qbrec.plan.plan import Plan
from qbrec.plan.scenario import GIB
from qbrec.plan.stages import StagePlan

_SHOWN = 0.01  # of the peak: smaller parts are added up


def document(plan: Plan) -> dict[str, Any]:
    """Everything in bytes, seconds and numbers; what JSON holds."""
    scenario, resolved = plan.scenario, plan.resolved
    return {
        "items": scenario.items,
        "users": scenario.users,
        "interactions_per_user": scenario.interactions,
        "world_size": scenario.world,
        "gpu": scenario.gpu.name if scenario.gpu else "cpu",
        "resolved": {
            "precision": resolved.precision,
            "levels": list(resolved.levels),
            "id_embedding": resolved.id_embedding,
        },
        "stages": {stage.name: _stage(stage) for stage in plan.stages},
        "warnings": list(plan.warnings),
        "assumptions": list(plan.assumptions),
    }


def _stage(stage: StagePlan) -> dict[str, Any]:
    found: dict[str, Any] = {"disk": stage.disk, "disk_bytes": sum(stage.disk.values())}
    if stage.memory is not None:
        places = {"host": stage.memory.host}
        if stage.memory.on_gpu:
            places["gpu"] = stage.memory.device
        found["memory"] = {
            place: {
                "peak_bytes": memory.peak,
                "peak_phase": memory.worst,
                "resident": memory.resident,
                "phases": memory.phases,
            }
            for place, memory in places.items()
        }
        found["mapped_bytes"] = stage.memory.mapped
    for name in ("read_rate", "steps", "hours", "busy"):
        value = getattr(stage, name)
        if value is not None:
            found[{"read_rate": "read_bytes_per_second", "busy": "busy_ranks"}.get(name, name)] = value
    return found


def text(plan: Plan) -> str:
    """Tables, warnings and assumptions."""
    scenario, resolved = plan.scenario, plan.resolved
    where = f"{scenario.world} x {scenario.gpu.name}" if scenario.gpu else f"{scenario.world} CPU ranks"
    lines = [
        f"{scenario.items:,} items, {scenario.users:,} users, "
        f"{scenario.users * scenario.interactions:,.0f} interactions on {where}",
        f"precision {resolved.precision}, levels {' x '.join(map(str, resolved.levels))}, "
        f"ID embedding {resolved.id_embedding}",
        "",
        f"{'stage':<12}{'GPU/rank':>12}{'host/rank':>12}{'disk':>12}{'read/rank':>12}{'steps':>12}{'hours':>12}",
    ]
    for stage in plan.stages:
        memory = stage.memory
        gpu = size(memory.device.peak) if memory is not None and memory.on_gpu else "-"
        host = size(memory.host.peak) if memory is not None else "-"
        rate = f"{size(stage.read_rate)}/s" if stage.read_rate is not None else "-"
        steps = f"{stage.steps:,}" if stage.steps is not None else "-"
        hours = "-" if stage.hours is None else f"{stage.hours:,.2f}" if stage.hours >= 0.01 else "< 0.01"
        lines.append(
            f"{stage.name:<12}{gpu:>12}{host:>12}{size(sum(stage.disk.values())):>12}{rate:>12}{steps:>12}{hours:>12}"
        )
    for stage in plan.stages:
        lines += ["", stage.name]
        if stage.memory is not None:
            places = [("GPU", stage.memory.device)] if stage.memory.on_gpu else []
            for place, used in [*places, ("host", stage.memory.host)]:
                lines += _memory(place, used)
            if stage.memory.mapped:
                lines.append(f"  files mapped  {size(stage.memory.mapped)}")
        if stage.disk:
            largest = sorted(stage.disk.items(), key=lambda item: -item[1])
            lines.append("  disk  " + ", ".join(f"{name} {size(value)}" for name, value in largest))
    if plan.warnings:
        lines += ["", "does not fit, or waits:"] + [f"  ! {warning}" for warning in plan.warnings]
    lines += ["", "assumed:"] + [f"  - {assumption}" for assumption in plan.assumptions]
    return "\n".join(lines)


def _memory(place: str, memory: Memory) -> list[str]:
    peak, small = memory.peak, 0
    when = f", during {memory.worst}" if memory.worst else ""
    lines = [f"  {place} at its peak{when}: {size(peak)}"]
    for name, value in memory.parts().items():
        if value < _SHOWN * peak:
            small += value
            continue
        lines.append(f"    {size(value):>10}  {name}")
    if small:
        lines.append(f"    {size(small):>10}  all the rest")
    return lines


def size(count: float) -> str:
    """Bytes in the largest unit that leaves a number of at least 1: `1.5 GiB`."""
    for unit, scale in (("TiB", GIB << 10), ("GiB", GIB), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= scale:
            return f"{count / scale:,.1f} {unit}"
    return f"{count:.0f} B"
