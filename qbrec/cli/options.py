"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

Function = TypeVar("Function", bound=Callable[..., Any])


def config_options(function: Function) -> Function:
    """`--config FILE` and `--set key=value`, handed on as `config_path` and `overrides`."""
    for option in (
        click.option(
            "--set",
            "overrides",
            multiple=True,
            metavar="KEY=VALUE",
            help="Override one key, e.g. --set sequence.width=256. May be repeated.",
        ),
        click.option("--config", "config_path", metavar="FILE", help="YAML configuration, or preset:small."),
    ):
        function = option(function)
    return function


def resume_option(function: Function) -> Function:
    """`--resume auto|must|never`."""
    return click.option(
        "--resume",
        type=click.Choice(["auto", "must", "never"]),
        default="auto",
        show_default=True,
        help="What to do about a run of this name that exists.",
    )(function)


def num_workers_option(function: Function) -> Function:
    """`--workers N`, short for --set compute.num_workers=N."""
    return click.option(
        "--workers", type=click.IntRange(min=1), help="Short for --set compute.num_workers=N."
    )(function)


def with_workers(overrides: tuple[str, ...], workers: int | None) -> tuple[str, ...]:
    """Overrides with `--workers` written out."""
    return overrides if workers is None else (*overrides, f"compute.num_workers={workers}")
