"""`qbrec registry list|show|diff`: what is registered."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from qbrec.cli.options import config_options

if TYPE_CHECKING:
    from qbrec.config import RootConfig

_JSON = click.option("--json", "as_json", is_flag=True, help="Print a document instead of a table.")


@click.group()
def registry() -> None:
    """Look at the versions of the registered model; nothing is changed.

    A version is named by its number or by an alias: 3, champion, @previous.
    """


@registry.command("list")
@config_options
@_JSON
def list_command(config_path: str | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """List all versions, newest first: aliases, run, time, metrics, the gate's last verdict.

    \b
    Example:
      qbrec registry list --config shop.yaml
    """
    from qbrec.registry.describe import list_versions

    config = _config(config_path, overrides)
    found = list_versions(config)
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    if not found:
        click.echo(f"{config.registry.model_name!r} has no version yet: `qbrec register` makes one")
        return
    names = list(found[0]["means"])
    rows = [["version", "aliases", "run", "registered", *map(str.upper, names), "gate"]]
    for one in found:
        verdict = one["verdict"]
        rows.append(
            [
                one["version"],
                " ".join(f"@{alias}" for alias in one["aliases"]),
                one["run"] or "",
                one["created"],
                *(_number(one["means"][name]) for name in names),
                "" if verdict is None else f"{_word(verdict['passed'])} ({verdict['gate']})",
            ]
        )
    _table(rows)


@registry.command("show")
@click.argument("version", default="champion")
@config_options
@_JSON
def show_command(version: str, config_path: str | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show one version, by default @champion: metrics, semantic IDs, verdicts, fingerprints, size, card.

    \b
    Example:
      qbrec registry show 3 --config shop.yaml
    """
    from qbrec.registry.describe import show_version

    found = show_version(_config(config_path, overrides), version)
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    aliases = "".join(f" @{alias}" for alias in found["aliases"])
    click.echo(f"version {found['version']}{aliases}, registered {found['created']}, run {found['run']}")
    if found["problem"]:
        click.secho(found["problem"], err=True, fg="red")
    else:
        _measured(found)
    _verdicts(found)
    _title("fingerprints")
    _table([[kind, print_] for kind, print_ in found["fingerprints"].items()])
    _title("card")
    click.echo(found["card"].rstrip())


@registry.command("diff")
@click.argument("version", default="challenger")
@click.argument("against", default="champion")
@config_options
@_JSON
def diff_command(
    version: str, against: str, config_path: str | None, overrides: tuple[str, ...], as_json: bool
) -> None:
    """Compare two versions, by default @challenger with @champion.

    Keys of the configuration that differ, metrics of both with the paired 95 % interval over the same users,
    and which artifacts are equal.

    \b
    Example:
      qbrec registry diff 3 1 --config shop.yaml
    """
    from qbrec.registry.describe import diff_versions

    found = diff_versions(_config(config_path, overrides), version, against)
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    sides = [f"version {found[side]['version']}" for side in ("version", "against")]
    _title("configuration")
    keys = found["configuration"]
    _table([["key", *sides], *([key, *map(_value, both.values())] for key, both in keys.items())])
    if not keys:
        click.echo("equal")
    _title("metrics, seen items removed")
    rows = [["", *sides, "difference, 95 % interval"], *_paired(found["metrics"], "")]
    for name, part in found["slices"].items():
        rows += _paired(part, f"{name}/")
    _table(rows)
    if found["unpaired"]:
        click.echo(f"no intervals: {found['unpaired']}")
    _title("artifacts")
    _table([[kind, "equal" if one["equal"] else "differs"] for kind, one in found["artifacts"].items()])


def _config(path: str | None, overrides: tuple[str, ...]) -> RootConfig:
    from qbrec.config import load_config

    return load_config(path, overrides=overrides)


def _measured(found: dict[str, Any]) -> None:
    protocol = found["protocol"]
    _title(f"metrics: {protocol['num_users']:,} users, {protocol['num_candidates']:,} items, 95 % intervals")
    rows = [[name, *_cell(cell)] for name, cell in found["metrics"].items()]
    rows += [[f"{name}/ndcg@10", *_cell(cells["ndcg@10"])] for name, cells in found["slices"].items()]
    for race, cells in (found["coldstart"] or {}).items():
        rows.append([f"cold start, {race}/ndcg@10", *_cell(cells["ndcg@10"])])
    _table(rows)
    ids = found["ids"]
    _title("semantic IDs")
    levels = [f"{level['perplexity']:.1f} of {level['codes']}" for level in ids["levels"]]
    click.echo(f"  perplexity by level  {', '.join(levels)}")
    click.echo(f"  alone on their ID    {ids['no_collision_rate']:.1%}, {ids['unique_ids']:,} different IDs")
    click.echo(f"  most items on one    {ids['largest_bucket']:,}")
    _title(f"size: {_bytes(found['bytes'])}")
    _table(
        [
            [name, _bytes(part["bytes"]), "" if part["embedded"] else "kept outside"]
            for name, part in found["parts"].items()
        ]
    )


def _verdicts(found: dict[str, Any]) -> None:
    _title("gate")
    verdict = found["verdict"]
    if verdict is None:
        click.echo("never judged")
        return
    against = f"version {verdict['champion']}" if verdict["champion"] else "none"
    word = _word(verdict["passed"])
    click.echo(f"{word} by {verdict['gate']} on {verdict['time']}, @champion then: {against}")
    for check in verdict["checks"]:
        click.echo(f"  {'ok ' if check['passed'] else 'NO '} {check['name']}: {check['reason']}")
    for one in reversed(found["history"][:-1]):
        why = f": {', '.join(one['refused'])}" if one["refused"] else ""
        click.echo(f"  before: {_word(one['passed'])} by {one['gate']} on {one['time']}{why}")


def _paired(rows: dict[str, Any], prefix: str) -> Iterator[list[str]]:
    for name, row in rows.items():
        gap = row["difference"]
        shown = "" if gap is None else f"{gap['mean']:+.4f} ({gap['low']:+.4f} … {gap['high']:+.4f})"
        yield [prefix + name, _number(row["version"]), _number(row["against"]), shown]


def _cell(cell: dict[str, float]) -> list[str]:
    return [_number(cell["mean"]), f"({cell['low']:.4f}–{cell['high']:.4f})"]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _value(value: str | None) -> str:
    return "–" if value is None else value


def _word(passed: bool) -> str:
    return "passed" if passed else "refused"


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


def _title(text: str) -> None:
    click.secho(f"\n{text}", bold=True)


def _table(rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo(
            "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )
