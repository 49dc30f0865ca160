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


def collapse_option(function: Function) -> Function:
    """`--collapse-duplicates`, short for --set catalog.duplicates.collapse=both."""
    return click.option(
        "--collapse-duplicates",
        is_flag=True,
        help="Keep one item of each group of near-duplicates. Short for --set "
        "catalog.duplicates.collapse=both.",
    )(function)


def with_flags(
    overrides: tuple[str, ...], *, workers: int | None, collapse_duplicates: bool
) -> tuple[str, ...]:
    """Overrides with `--workers` and `--collapse-duplicates` written out."""
    if workers is not None:
        overrides = (*overrides, f"compute.num_workers={workers}")
    if collapse_duplicates:
        overrides = (*overrides, "catalog.duplicates.collapse=both")
    return overrides
