"""`qbrec plan`: what a run of a given size needs, before there is one."""

from __future__ import annotations

import json
import os
import re
from typing import TYPE_CHECKING

import click

from qbrec.cli.options import config_options

if TYPE_CHECKING:
    from qbrec.config import RootConfig
    from qbrec.plan.scenario import Modality

_GB, _GIB = 10**9, 1 << 30
_GPU_MACHINE_GIB = 1024  # of a machine with eight GPUs, unless told


class Number(click.ParamType):  # type: ignore[type-arg]
    """A whole number that may be written 50e6 or 50_000_000."""

    name = "number"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number, at least 1."""
        try:
            found = float(str(value).replace("_", ""))
        except ValueError:
            self.fail(f"{value!r} is no number", param, ctx)
        if not (found >= 1 and found == int(found)):
            self.fail(f"{value!r} is no whole number from 1 on", param, ctx)
        return int(found)


_POSITIVE = click.FloatRange(min=0, min_open=True)


@click.command()
@config_options
@click.option("--items", type=Number(), required=True, help="Items of the catalogue, e.g. 50e6.")
@click.option("--users", type=Number(), required=True, help="Users, e.g. 200e6.")
@click.option(
    "--world-size", type=Number(), help="Ranks: GPUs, or CPU machines. Default: compute.num_workers."
)
@click.option("--gpu", default="h100", show_default=True, help="h100, a100-80, l4, …; cpu: no GPU.")
@click.option("--interactions", type=_POSITIVE, default=30.0, show_default=True, help="Mean number per user.")
@click.option(
    "--history", type=_POSITIVE, help="Mean items of a training sequence. Default: from --interactions."
)
@click.option(
    "--mfu",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=0.2,
    show_default=True,
    help="Share of the peak FLOP/s that matrix products reach in training.",
)
@click.option(
    "--overhead",
    type=click.FloatRange(min=0),
    default=20.0,
    show_default=True,
    help="Milliseconds of a micro-batch besides them: launches, Python, DeepSpeed.",
)
@click.option(
    "--modality",
    "modalities",
    multiple=True,
    metavar="NAME=DIMxTOKENS[:MOST]",
    help="Feature tokens of an item, mean and most, e.g. text=768x3.2:5. May be repeated; default: what the "
    "configured encoders write.",
)
@click.option("--per-machine", type=Number(), help="Ranks on a machine. Default: 8 GPUs, 1 on CPUs.")
@click.option(
    "--host-memory",
    type=_POSITIVE,
    help=f"GiB of a machine. Default: {_GPU_MACHINE_GIB} with GPUs, else this machine's.",
)
@click.option("--disk", type=_POSITIVE, default=2.0, show_default=True, help="GB/s that a machine reads.")
@click.option("--json", "as_json", is_flag=True, help="Print a document of bytes and numbers.")
def plan(
    config_path: str | None,
    overrides: tuple[str, ...],
    items: int,
    users: int,
    world_size: int | None,
    gpu: str,
    interactions: float,
    history: float | None,
    mfu: float,
    overhead: float,
    modalities: tuple[str, ...],
    per_machine: int | None,
    host_memory: float | None,
    disk: float,
    as_json: bool,
) -> None:
    """Memory, disk, reading rate, steps and hours of a run, from formulas: no data is read.

    Warns of what does not fit and names the key that mends it.

    \b
    Examples:
      qbrec plan --items 50e6 --users 200e6 --world-size 64 --gpu h100
      qbrec plan --items 2e6 --users 20e6 --world-size 8 --gpu l4 --set compute.zero_stage=2
      qbrec plan --items 1e5 --users 1e6 --gpu cpu --mfu 0.3 --json
    """
    from qbrec.config import load_config
    from qbrec.engine.hardware import named
    from qbrec.plan.plan import make_plan
    from qbrec.plan.scenario import Scenario, measured_cpu_flops
    from qbrec.plan.text import document, text

    config = load_config(config_path, overrides=overrides)
    accelerator = None if gpu.lower() == "cpu" else named(gpu)
    if host_memory is None:
        host_bytes = _GPU_MACHINE_GIB * _GIB if accelerator else _memory_of_this_machine()
    else:
        host_bytes = int(host_memory * _GIB)
    scenario = Scenario(
        items=items,
        users=users,
        interactions=interactions,
        world=world_size or config.compute.max_workers,
        per_machine=per_machine or (8 if accelerator else 1),
        gpu=accelerator,
        cpu_flops=0.0 if accelerator else measured_cpu_flops(),
        host_bytes=host_bytes,
        disk_rate=disk * _GB,
        mfu=mfu,
        overhead=overhead / 1000,
        modalities=_modalities(config, modalities),
        history=history,
        domains=max(len(config.data.domains), 1),
    )
    found = make_plan(config, scenario)
    click.echo(json.dumps(document(found), indent=1) if as_json else text(found))


def _modalities(config: RootConfig, given: tuple[str, ...]) -> tuple[Modality, ...]:
    """Dense modalities as given, else as the encoders write them; structure and behaviour as configured."""
    from qbrec.errors import ConfigError
    from qbrec.plan.scenario import Modality, default_modalities, further_modalities

    if not given:
        return default_modalities(config)
    found = []
    for value in given:
        match = re.fullmatch(r"(\w+)=(\d+)x(\d+(?:\.\d+)?)(?::(\d+))?", value)
        if match is None:
            raise ConfigError(
                f"{value!r} does not say what an item has of a modality",
                where="--modality",
                fix="write NAME=DIMxTOKENS, such as text=768x3, or text=768x3.2:5 for at most 5",
            )
        tokens = float(match[3])
        found.append(Modality(match[1], "dense", int(match[2]), tokens, int(match[4] or -(-tokens // 1))))
    return tuple(found) + further_modalities(config, config.catalog)


def _memory_of_this_machine() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
