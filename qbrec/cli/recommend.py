"""`qbrec recommend`: ranked items for one history."""

from __future__ import annotations

import json

import click

from qbrec.cli.options import config_options


@click.command()
@config_options
@click.option("--history", "-H", multiple=True, metavar="ITEM", help="Item id, oldest first. Repeat it.")
@click.argument("more", nargs=-1, metavar="[ITEM]...")
@click.option("--k", type=int, default=10, show_default=True, help="How many items.")
@click.option("--keep-seen", is_flag=True, help="Rank items of the history too.")
@click.option(
    "--category", multiple=True, metavar="NAME", help="Only items of this category. Repeat it for several."
)
@click.option(
    "--only", type=click.Path(exists=True, dir_okay=False), help="Only the items of this file, one id a line."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def recommend(
    config_path: str | None,
    overrides: tuple[str, ...],
    history: tuple[str, ...],
    more: tuple[str, ...],
    k: int,
    keep_seen: bool,
    category: tuple[str, ...],
    only: str | None,
    as_json: bool,
) -> None:
    """Rank the whole catalogue for a history and print the best items.

    Items added by `qbrec append` are ranked too, and may stand in the history; retired ones are left out.

    \b
    Example:
      qbrec recommend --config launch/quickstart.yaml --history i000000017 i000000230 --k 5
      qbrec recommend --config shop.yaml --history A1 --category Lamps --only in-stock.txt
    """
    from qbrec.config import load_config
    from qbrec.pipeline import finished_artifacts
    from qbrec.registry.filters import read_ids
    from qbrec.registry.recommend import Recommender
    from qbrec.run_generations import with_generations

    config = load_config(config_path, overrides=overrides)
    artifacts = with_generations(config, finished_artifacts(config))
    recommender = Recommender.from_artifacts(artifacts, ranking=config.ranking)
    if recommender.num_waiting:
        click.secho(
            f"{recommender.num_waiting:,} appended items have no semantic ID yet and are not ranked: "
            "`qbrec run` with the same configuration gives them theirs",
            err=True,
            fg="yellow",
        )
    among = None
    if category or only:
        among = recommender.only(categories=category or None, item_ids=read_ids(only) if only else None)
    (items,) = recommender.recommend([[*history, *more]], k=k, keep_seen=keep_seen, among=among)
    if as_json:
        click.echo(json.dumps(items, indent=1))
        return
    for rank, item in enumerate(items, 1):
        click.echo(
            f"{rank:>3}  {item['item_id']:<20} {item['score']:>9.3f}  {item['semantic_id']:<22} "
            f"{item['label']}\n"
            f"     {item['title']}"
        )
