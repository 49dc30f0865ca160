"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
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
        click.option(
            "--config",
            "config_path",
            metavar="FILE",
            help="YAML file, preset:small, preset:large, or env:VARIABLE.",
        ),
    ):
        function = option(function)
    return function


def run_options(function: Function) -> Function:
    """What every command that runs stages takes: `config_options`, their short forms, and `--resume`.

    `--workers`, `--seeds` and `--collapse-duplicates` are handed on as overrides; `resume` is auto, must or
    never.
    """

    @wraps(function)
    def command(
        overrides: tuple[str, ...],
        workers: int | None,
        seeds: int | None,
        collapse_duplicates: bool,
        **options: Any,
    ) -> Any:
        overrides = with_flags(
            overrides, workers=workers, seeds=seeds, collapse_duplicates=collapse_duplicates
        )
        return function(overrides=overrides, **options)

    for option in (
        click.option(
            "--resume",
            type=click.Choice(["auto", "must", "never"]),
            default="auto",
            show_default=True,
            help="What to do about a run of this name that exists.",
        ),
        click.option(
            "--collapse-duplicates",
            is_flag=True,
            help="Keep one item of each group of near-duplicates. Short for --set "
            "catalog.duplicates.collapse=both.",
        ),
        click.option("--seeds", type=click.IntRange(min=1), help="Short for --set evaluation.seeds=N."),
        click.option("--workers", type=click.IntRange(min=1), help="Short for --set compute.num_workers=N."),
        config_options,
    ):
        command = option(command)
    return command  # type: ignore[return-value]


def with_flags(
    overrides: tuple[str, ...], *, workers: int | None, seeds: int | None = None, collapse_duplicates: bool
) -> tuple[str, ...]:
    """Overrides with `--workers`, `--seeds` and `--collapse-duplicates` written out."""
    if workers is not None:
        overrides = (*overrides, f"compute.num_workers={workers}")
    if seeds is not None:
        overrides = (*overrides, f"evaluation.seeds={seeds}")
    if collapse_duplicates:
        overrides = (*overrides, "catalog.duplicates.collapse=both")
    return overrides
