"""`qbrec submit|status|logs|stop`: runs on a cluster, over its job server."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from qbrec.cli.options import run_options

if TYPE_CHECKING:
    from qbrec.jobs.attempts import Attempt
    from qbrec.jobs.progress import Seen
    from qbrec.jobs.ray_client import JobClient

Function = TypeVar("Function", bound=Callable[..., Any])


def _address_option(function: Function) -> Function:
    return click.option(
        "--address",
        metavar="URL",
        help="Dashboard of the cluster, e.g. http://127.0.0.1:8265. Default: RAY_API_SERVER_ADDRESS, then "
        "RAY_ADDRESS.",
    )(function)


def _run_argument(function: Function) -> Function:
    return click.argument("run")(function)


@click.command()
@run_options
@_address_option
@click.option("--no-wait", is_flag=True, help="Come back once the cluster has the job.")
@click.option(
    "--runtime-env",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Ray's runtime environment. Default: launch/runtime_env.yaml.",
)
def submit(
    config_path: str | None,
    overrides: tuple[str, ...],
    resume: str,
    address: str | None,
    no_wait: bool,
    runtime_env: Path | None,
) -> None:
    """Send a run to a cluster, show its log, and end with its exit code.

    A run is known by its storage and its name. Sent again, it goes on where it stopped, as a new attempt;
    while an attempt has not ended another one is refused. From a source checkout the code travels along
    (without what .rayignore names); an installed qbrec uses the nodes' own. The configuration travels whole;
    its paths have to be absolute, and mean the same on every node.

    Ctrl-C leaves the job running. A stopped job ends with 143.

    \b
    Examples:
      qbrec submit --config shop.yaml --address http://127.0.0.1:8265
      qbrec submit --config shop.yaml --set compute.num_workers=4 --no-wait
      RAY_AUTH_TOKEN_PATH=token qbrec submit --config shop.yaml --address https://ray.example.com
    """
    from qbrec.config import load_config
    from qbrec.jobs.cluster import connect
    from qbrec.jobs.portable import check_portable
    from qbrec.jobs.submit import submit as submit_run

    config = load_config(config_path, overrides=overrides)
    check_portable(config)
    client = connect(address, submitting=True)
    attempt = submit_run(client, config, resume=resume, runtime_env=runtime_env)
    click.echo(
        f"submitted {attempt.id} (attempt {attempt.number} of {attempt.run!r}, storage {attempt.storage}) to "
        f"{client.get_address()}",
        err=True,
    )
    if no_wait:
        click.echo(_next_steps(attempt, address), err=True)
        return
    _follow(client, attempt, address)


@click.command()
@_run_argument
@_address_option
@click.option("--json", "as_json", is_flag=True, help="Print a document.")
def status(run: str, address: str | None, as_json: bool) -> None:
    """How far a run is: status of its newest attempt, stage, epoch, step and time left, from its log.

    RUN is the name of the run, or the id of one attempt (qbrec-NAME-N).

    \b
    Examples:
      qbrec status shop --address http://127.0.0.1:8265
      qbrec status shop --json
    """
    from qbrec.errors import LaunchError
    from qbrec.jobs.attempts import newest
    from qbrec.jobs.cluster import connect
    from qbrec.jobs.progress import Seen, read_log

    client = connect(address)
    attempt = newest(client, run)
    try:
        seen = read_log(client.get_job_logs(attempt.id))
    except LaunchError as error:  # its node may be gone
        click.secho(f"its log cannot be had: {error}", err=True, fg="yellow")
        seen = Seen({})
    click.echo(json.dumps(_document(attempt, seen), indent=1) if as_json else _text(attempt, seen))


@click.command()
@_run_argument
@_address_option
@click.option("--follow", "-f", is_flag=True, help="Go on until the run ends, and end with its exit code.")
def logs(run: str, address: str | None, follow: bool) -> None:
    """The log of a run's newest attempt.

    RUN is the name of the run, or the id of one attempt (qbrec-NAME-N). Ctrl-C leaves the job running.

    \b
    Examples:
      qbrec logs shop
      qbrec logs qbrec-shop-2 --follow
    """
    from qbrec.jobs.attempts import newest
    from qbrec.jobs.cluster import connect

    client = connect(address)
    attempt = newest(client, run)
    if follow:
        _follow(client, attempt, address)
    else:
        click.echo(client.get_job_logs(attempt.id), nl=False)


@click.command()
@_run_argument
@_address_option
def stop(run: str, address: str | None) -> None:
    """Stop a run: it writes a checkpoint and ends; `qbrec submit` goes on from it.

    RUN is the name of the run, or the id of one attempt (qbrec-NAME-N).

    \b
    Example:
      qbrec stop shop
    """
    from qbrec.jobs.attempts import newest
    from qbrec.jobs.cluster import connect
    from qbrec.jobs.progress import read_log
    from qbrec.jobs.stop import stop as stop_attempt

    client = connect(address)
    attempt = newest(client, run)
    if attempt.has_ended:
        click.echo(f"{attempt.id} had ended already: {attempt.status}")
        return
    click.echo(f"stopping {attempt.id}: it has {attempt.stop_wait_s:g} s for its checkpoint", err=True)
    ended = stop_attempt(client, attempt)
    last = read_log(client.get_job_logs(attempt.id)).error
    click.echo(f"{ended.id} is {ended.status}")
    if ended.status == "STOPPED":
        click.echo(last or "it ended without a word: another attempt goes on from the last checkpoint")


def _follow(client: JobClient, attempt: Attempt, address: str | None) -> None:
    """Show the log until the job ends, and end this process with its exit code."""
    from qbrec.jobs.follow import follow

    try:
        ended = follow(client, attempt, lambda text: click.echo(text, nl=False))
    except KeyboardInterrupt:
        click.echo(f"\nnot followed any more, but the job goes on\n{_next_steps(attempt, address)}", err=True)
        sys.exit(130)
    click.echo(f"{ended.id}: {ended.status}, exit code {ended.exit_code}", err=True)
    if ended.status == "FAILED" and ended.message:
        click.secho(ended.message, err=True, fg="red")
    sys.exit(ended.exit_code)


def _next_steps(attempt: Attempt, address: str | None) -> str:
    there = f" --address {address}" if address else ""
    return (
        f"  status: qbrec status {attempt.run}{there}\n"
        f"  follow: qbrec logs {attempt.run} --follow{there}\n"
        f"  stop:   qbrec stop {attempt.run}{there}"
    )


def _document(attempt: Attempt, seen: Seen) -> dict[str, Any]:
    return {
        "run": attempt.run,
        "storage": attempt.storage,
        "attempt": attempt.number,
        "submission_id": attempt.id,
        "status": attempt.status,
        "exit_code": attempt.exit_code,
        "started": attempt.started,
        "ended": attempt.ended,
        **seen.document(),
    }


def _text(attempt: Attempt, seen: Seen) -> str:
    from qbrec.engine.progress import clock

    lines = [f"run       {attempt.run} (storage {attempt.storage})"]
    state = attempt.status
    if attempt.started is not None:
        lasted = clock((attempt.ended or time.time()) - attempt.started)
        state += f" after {lasted}, exit code {attempt.exit_code}" if attempt.has_ended else f" for {lasted}"
    lines.append(f"attempt   {attempt.number} ({attempt.id}): {state}")
    if seen.finished:
        done = (f"{stage} {'up to date' if s is None else f'{s:g} s'}" for stage, s in seen.finished.items())
        lines.append(f"finished  {', '.join(done)}")
    if seen.stage is not None:
        lines.append(f"stage     {seen.stage}")
    if (reading := seen.reading) is not None:
        left = [f"eta {clock(reading.eta_s)}"] if reading.eta_s is not None else []
        info = [f"{name} {value}" for name, value in reading.info.items()]
        lines.append(f"progress  {reading.label}: {', '.join([f'{reading.share:.0%}', *left, *info])}")
    if attempt.has_ended and seen.error is not None:
        lines.append(f"error     {seen.error}")
    if attempt.status in ("PENDING", "FAILED") and attempt.message:
        lines.append(f"message   {attempt.message}")
    return "\n".join(lines)
