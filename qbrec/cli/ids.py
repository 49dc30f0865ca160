"""`qbrec ids`: look at semantic IDs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from qbrec.cli.options import config_options

if TYPE_CHECKING:
    from qbrec.config import RootConfig
    from qbrec.quantizer.append.grown_ids import GrownIds
    from qbrec.storage.generations import GenerationsView


@click.group()
def ids() -> None:
    """Show semantic IDs with their labels; find items by prefix. Items added by `qbrec append` too."""


@ids.command()
@config_options
@click.argument("items", nargs=-1, metavar="[ITEM]...")
@click.option(
    "--count", type=click.IntRange(min=1), default=5, show_default=True, help="Items shown if none is named."
)
@click.option("--domain", help="Domain of the items; default: the target domain.")
def show(
    config_path: str | None,
    overrides: tuple[str, ...],
    items: tuple[str, ...],
    count: int,
    domain: str | None,
) -> None:
    """Semantic ID and label of items; of a few popular ones where none is named.

    \b
    Example:
      qbrec ids show --config launch/quickstart.yaml i000000017 i000000230
    """
    from qbrec.config import load_config
    from qbrec.errors import DataError

    config = load_config(config_path, overrides=overrides)
    view, table = _open(config)
    if items:
        rows = view.lookup(list(items), domain or config.data.target_domain)
        unknown = [item for item, row in zip(items, rows, strict=True) if row < 0]
        if unknown:
            raise DataError(
                f"unknown item {unknown[0]!r}",
                where=f"domain {domain or config.data.target_domain}",
                fix="item ids are those of items.parquet and of what was appended",
            )
    else:
        rows = view.base.train_counts.argsort()[::-1][:count].copy()
    _print(view, table, [int(row) for row in rows])


@ids.command()
@config_options
@click.argument("prefix")
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True, help="Items shown.")
def find(config_path: str | None, overrides: tuple[str, ...], prefix: str, limit: int) -> None:
    """Items whose semantic ID starts with PREFIX, written 12.7 or '<a_12><b_7>'.

    \b
    Example:
      qbrec ids find --config launch/quickstart.yaml 12.7
    """
    from qbrec.config import load_config

    view, table = _open(load_config(config_path, overrides=overrides))
    rows = table.find(prefix)
    click.echo(f"{len(rows)} items")
    _print(view, table, [int(row) for row in rows[:limit]])


def _open(config: RootConfig) -> tuple[GenerationsView, GrownIds]:
    """Items and IDs of a run, its generations among them."""
    from qbrec.pipeline import finished_artifacts
    from qbrec.quantizer.append.grown_ids import GrownIds
    from qbrec.run_generations import with_generations
    from qbrec.storage.generations import GenerationsView
    from qbrec.storage.id_table import GENERATION, IDS, numbered

    artifacts = with_generations(config, finished_artifacts(config))
    view = GenerationsView(artifacts["catalog"], numbered(artifacts, GENERATION))
    return view, GrownIds(artifacts["quantizer"], numbered(artifacts, IDS))


def _print(view: GenerationsView, table: GrownIds, rows: list[int]) -> None:
    for shown, item, title in zip(table.show(rows), view.item_ids(rows), view.titles(rows), strict=True):
        others = f"  (+{shown.bucket - 1} more on this ID)" if shown.bucket > 1 else ""
        click.echo(f"{item:<20} {shown.text:<28} {shown.label}{others}")
        click.echo(f"{'':<20} {title or '(no title)'}")
