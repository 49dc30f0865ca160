"""`qbrec recommend`: ranked items for one history, or for many users."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from qbrec.cli.options import config_options
from qbrec.errors import ConfigError

if TYPE_CHECKING:
    from qbrec.config import RootConfig
    from qbrec.serving.model import ServedModel
    from qbrec.serving.worker import Wanted


@click.command()
@config_options
@click.option("--history", "-H", multiple=True, metavar="ITEM", help="Item id, oldest first. Repeat it.")
@click.argument("more", nargs=-1, metavar="[ITEM]...")
@click.option(
    "--users",
    metavar="all|PATH",
    help="Lists for many: all users of the catalogue, or those of Parquet with user_id and perhaps history.",
)
@click.option("--out", metavar="DIR", help="Where the lists of --users go: a folder, s3://… or gs://….")
@click.option("--model", metavar="URI", help="models:/qbrec@champion or models:/qbrec/3; default: the run's.")
@click.option("--workers", type=click.IntRange(min=1), help="Short for --set compute.num_workers=N.")
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
    users: str | None,
    out: str | None,
    model: str | None,
    workers: int | None,
    k: int,
    keep_seen: bool,
    category: tuple[str, ...],
    only: str | None,
    as_json: bool,
) -> None:
    """Rank the whole catalogue for a history and print the best items.

    With --users, write the lists of many users as Parquet (user_id, item_id, score, semantic_id); the same
    command goes on where it was cut off. Items added by `qbrec append` are ranked too, and may stand in the
    history; retired ones are left out.

    \b
    Example:
      qbrec recommend --config launch/quickstart.yaml --history i000000017 i000000230 --k 5
      qbrec recommend --config shop.yaml --history A1 --category Lamps --only in-stock.txt
      qbrec recommend --config shop.yaml --users all --out lists --workers 8
    """
    from qbrec.config import load_config
    from qbrec.registry.filters import read_ids
    from qbrec.serving.worker import Wanted

    _check(users, out, histories=bool(history or more))
    if workers is not None:
        overrides = (*overrides, f"compute.num_workers={workers}")
    config = load_config(config_path, overrides=overrides)
    wanted = Wanted(k, keep_seen, category or None, tuple(read_ids(only)) if only else None)
    served = _model(config, model)
    if users is not None and out is not None:
        _many(served, config, users=users, out=out, wanted=wanted, as_json=as_json)
    else:
        _one(served, [*history, *more], wanted=wanted, as_json=as_json)


def _check(users: str | None, out: str | None, *, histories: bool) -> None:
    if (users is None) != (out is None):
        raise ConfigError(
            "--users and --out belong together",
            where="options",
            fix="say whose lists, and where they shall go",
        )
    if users is not None and histories:
        raise ConfigError(
            "--users and --history exclude each other",
            where="options",
            fix="write histories into a Parquet file for --users",
        )


def _model(config: RootConfig, uri: str | None) -> ServedModel:
    from qbrec.serving.model import ServedModel

    if uri is not None:
        from qbrec.serving.versions import fetch_bundle, find_version

        return ServedModel.of_bundle(fetch_bundle(config, find_version(config, uri)))
    from qbrec.pipeline import finished_artifacts
    from qbrec.run_generations import with_generations

    return ServedModel.of_run(config, with_generations(config, finished_artifacts(config)))


def _one(served: ServedModel, history: list[str], *, wanted: Wanted, as_json: bool) -> None:
    recommender = served.open()
    if recommender.num_waiting:
        _warn(
            f"{recommender.num_waiting:,} appended items have no semantic ID yet and are not ranked: "
            "`qbrec run` with the same configuration gives them theirs"
        )
    among = wanted.filter_of(recommender)
    (items,) = recommender.recommend([history], k=wanted.k, keep_seen=wanted.keep_seen, among=among)
    if as_json:
        click.echo(json.dumps(items, indent=1))
        return
    for rank, item in enumerate(items, 1):
        click.echo(
            f"{rank:>3}  {item['item_id']:<20} {item['score']:>9.3f}  {item['semantic_id']:<22} "
            f"{item['label']}\n"
            f"     {item['title']}"
        )


def _many(
    served: ServedModel, config: RootConfig, *, users: str, out: str, wanted: Wanted, as_json: bool
) -> None:
    from qbrec.serving.batch import recommend_users

    summary = recommend_users(served, users=users, out=out, wanted=wanted, compute=config.compute, warn=_warn)
    if as_json:
        click.echo(json.dumps(summary, indent=1))
        return
    parts = f"{summary['units']} parts, {summary['units_kept']} of them from before"
    speed = f"{summary['users_per_second']:,.0f} users/s"
    click.echo(
        f"{summary['users']:,} users → {out}  ({parts}, {summary['rejected']:,} users rejected, {speed})"
    )


def _warn(text: str) -> None:
    click.secho(text, err=True, fg="yellow")
