"""`qbrec import`: the input contract from the formats people have."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from qbrec.catalog.importers.dataset import Dataset
    from qbrec.catalog.importers.run import Summary

Function = TypeVar("Function", bound=Callable[..., Any])


def _shared(function: Function) -> Function:
    """Options of every format, handed on as `out`, `force` and those of `ImportOptions`."""
    for option in (
        click.option("--force", is_flag=True, help="Replace what lies in the folder."),
        click.option("--all-items", is_flag=True, help="Keep items that no one interacted with, too."),
        click.option(
            "--repeats",
            type=click.Choice(["all", "earliest"]),
            default="all",
            show_default=True,
            help="Which interactions of the same user with the same item to keep.",
        ),
        click.option(
            "--core",
            type=click.IntRange(min=1),
            default=1,
            show_default=True,
            help="Keep the k-core: users and items with that many interactions, over and over.",
        ),
        click.option("--min-rating", type=float, help="Leave out interactions rated lower, or not rated."),
        click.option("--out", required=True, metavar="FOLDER", help="Where to write."),
    ):
        function = option(function)
    return function


def _texts(function: Function) -> Function:
    """Options of the Amazon formats."""
    for option in (
        click.option("--keep-html", is_flag=True, help="Leave tags, entities and white space in texts."),
        click.option(
            "--images/--no-images", default=True, show_default=True, help="Write addresses of pictures."
        ),
        click.option(
            "--meta", "metadata", multiple=True, metavar="FILE|URL", help="Metadata. May be repeated."
        ),
        click.option(
            "--reviews", multiple=True, required=True, metavar="FILE|URL", help="Reviews. May be repeated."
        ),
    ):
        function = option(function)
    return function


@click.group("import")
def importer() -> None:
    """Write items.parquet and interactions.parquet from a public data set or from CSV.

    Sources are files or http(s) addresses, gzip or not; a connection that breaks is resumed. Nothing is in
    FOLDER before all is. What was left out, and why, is printed and lies in FOLDER/import.json.

    \b
    Examples:
      qbrec import amazon-2018 --reviews Arts_5.json.gz --meta meta_Arts.json.gz --out data/arts
      qbrec import movielens ml-25m.zip --min-rating 4 --core 5 --out data/ml
      qbrec import csv --interactions clicks.csv.gz --items items.csv --out data/shop
    """


@importer.command("amazon-2018")
@_texts
@click.option("--also-buy", is_flag=True, help="Carry the items bought together along as a column.")
@_shared
def amazon_2018(
    reviews: tuple[str, ...],
    metadata: tuple[str, ...],
    images: bool,
    keep_html: bool,
    also_buy: bool,
    **shared: Any,
) -> None:
    """Amazon Reviews 2018, 5-core or full; the files of 2014 too.

    https://nijianmo.github.io/amazon/index.html

    \b
    Examples:
      qbrec import amazon-2018 --reviews Arts_5.json.gz --meta meta_Arts.json.gz --out data/arts
      qbrec import amazon-2018 --reviews Arts.json.gz --meta meta_Arts.json.gz --core 5 --out data/arts
    """
    from qbrec.catalog.importers.amazon_2018 import amazon_2018 as read

    _run(
        read(reviews=reviews, metadata=metadata, images=images, keep_html=keep_html, also_buy=also_buy),
        shared,
    )


@importer.command("amazon-2023")
@_texts
@_shared
def amazon_2023(
    reviews: tuple[str, ...], metadata: tuple[str, ...], images: bool, keep_html: bool, **shared: Any
) -> None:
    """Amazon Reviews 2023: reviews (.jsonl) or the benchmark's interactions (.csv).

    https://amazon-reviews-2023.github.io

    \b
    Examples:
      qbrec import amazon-2023 --reviews All_Beauty.jsonl.gz --meta meta_All_Beauty.jsonl.gz --out data/beauty
      qbrec import amazon-2023 --reviews Video_Games.csv.gz --meta meta_Video_Games.jsonl.gz --out data/games
    """
    from qbrec.catalog.importers.amazon_2023 import amazon_2023 as read

    _run(read(reviews=reviews, metadata=metadata, images=images, keep_html=keep_html), shared)


@importer.command()
@click.argument("place", metavar="ZIP|FOLDER|URL")
@_shared
def movielens(place: str, **shared: Any) -> None:
    """MovieLens 1M, 10M, 20M, 25M, 32M or latest: the zip file, its address, or the folder.

    https://grouplens.org/datasets/movielens

    \b
    Examples:
      qbrec import movielens ml-1m.zip --out data/ml-1m
      qbrec import movielens https://files.grouplens.org/datasets/movielens/ml-25m.zip --out data/ml
    """
    from qbrec.catalog.importers.movielens import movielens as read
    from qbrec.catalog.importers.source import local_copy

    with local_copy(place) as path:
        _run(read(place, path=path), shared)


@importer.command("csv")
@click.option("--interactions", multiple=True, required=True, metavar="FILE|URL", help="May be repeated.")
@click.option("--items", metavar="FILE|URL", help="Items, one a line.")
@click.option("--user-column", default="user_id", show_default=True, metavar="NAME")
@click.option("--item-column", default="item_id", show_default=True, metavar="NAME")
@click.option("--time-column", default="timestamp", show_default=True, metavar="NAME")
@click.option("--rating-column", metavar="NAME", help="Needed for --min-rating.")
@click.option("--items-item-column", metavar="NAME", help="The id in --items.  [default: as --item-column]")
@click.option("--title-column", metavar="NAME", help="This and the next ones: of --items, where it has them.")
@click.option("--description-column", metavar="NAME")
@click.option("--brand-column", metavar="NAME")
@click.option("--categories-column", metavar="NAME")
@click.option("--image-column", "image_path_column", metavar="NAME", help="Paths or addresses of pictures.")
@click.option("--keep-column", multiple=True, metavar="NAME", help="Carry it along. May be repeated.")
@click.option("--categories-separator", default="|", show_default=True, help="Root first.")
@click.option(
    "--time-unit",
    type=click.Choice(["s", "ms", "us", "iso"]),
    default="s",
    show_default=True,
    help="Timestamps count these since 1970, or are ISO 8601 text (UTC where it names no offset).",
)
@click.option("--delimiter", help=r"One character, or \t.  [default: tab in .tsv, else comma]")
@click.option("--no-header", is_flag=True, help="The first line is data; columns are called 1, 2, ….")
@click.option("--no-quotes", is_flag=True, help="Quotes are ordinary characters.")
@click.option("--encoding", default="utf-8", show_default=True)
@_shared
def from_csv(
    interactions: tuple[str, ...],
    items: str | None,
    user_column: str,
    item_column: str,
    time_column: str,
    rating_column: str | None,
    items_item_column: str | None,
    keep_column: tuple[str, ...],
    categories_separator: str,
    time_unit: str,
    delimiter: str | None,
    no_header: bool,
    no_quotes: bool,
    encoding: str,
    **shared: Any,
) -> None:
    """Plain CSV or TSV with columns named by options.

    \b
    Examples:
      qbrec import csv --interactions clicks.csv.gz --items items.csv --time-unit ms --out data/shop
      qbrec import csv --interactions Books.csv --no-header --item-column 1 --user-column 2 \\
                       --rating-column 3 --time-column 4 --min-rating 4 --out data/books
    """
    from qbrec.catalog.importers.csv_files import TEXTS, Columns, csv_files
    from qbrec.errors import ConfigError

    texts = {name: shared.pop(f"{name}_column") for name in TEXTS}
    if shared["min_rating"] is not None and rating_column is None:
        raise ConfigError("no column of ratings is named", where="--min-rating", fix="add --rating-column")
    if items is None and (any(texts.values()) or keep_column or items_item_column):
        raise ConfigError("columns of items are named, but no file", where="--items", fix="add --items FILE")
    columns = Columns(
        user=user_column,
        item=item_column,
        time=time_column,
        rating=rating_column,
        items_item=items_item_column,
        texts={name: column for name, column in texts.items() if column},
        keep=keep_column,
    )
    delimiter = "\t" if delimiter == r"\t" else delimiter
    if delimiter is not None and (len(delimiter) != 1 or not delimiter.isascii() or delimiter in '\r\n"'):
        raise ConfigError(f"{delimiter!r} is no delimiter", where="--delimiter", fix="name one character")
    if not categories_separator:
        raise ConfigError("the separator is empty", where="--categories-separator", fix="name a character")
    _run(
        csv_files(
            interactions=interactions,
            items=items,
            columns=columns,
            delimiter=delimiter,
            header=not no_header,
            quotes=not no_quotes,
            encoding=encoding,
            unit=time_unit,
            separator=categories_separator,
        ),
        shared,
    )


def _run(dataset: Dataset, shared: dict[str, Any]) -> None:
    from qbrec.catalog.importers.run import ImportOptions, import_dataset

    out, force = shared.pop("out"), shared.pop("force")
    for part in (dataset.interactions, dataset.items):
        for source in part.sources if part else ():
            size = f"{source.size / 1e6:,.1f} MB" if source.size else "size unknown"
            click.echo(f"  {source.place}  {size}")
    _print(import_dataset(dataset, out=out, options=ImportOptions(**shared), force=force))


def _print(summary: Summary) -> None:
    """The counts as a table, and what to do next."""
    record = summary.record
    rows = [(f"{name} read", count) for name, count in record["read"].items()]
    rows += [(f"  {reason}", -count) for reason, count in record["left_out"].items()]
    rows += [(f"{name} written", count) for name, count in record["written"].items()]
    rows += [(f"  {what}", count) for what, count in record["noted"].items()]
    width = max(len(name) for name, _ in rows)
    for name, count in rows:
        click.echo(f"  {name:<{width}}  {count:>13,}")
    if "metadata" not in record["read"]:
        click.echo("\nThe items have nothing but ids: a run needs metadata, or a column <name>_embedding.")
        return
    click.echo("\nnext:")
    click.echo(f"  qbrec run --set data.domains.main.items={summary.items} \\")
    end = " \\" if record["image_hosts"] else ""
    click.echo(f"            --set data.domains.main.interactions={summary.interactions}{end}")
    if record["image_hosts"]:
        click.echo(f"            --set 'catalog.image.hosts=[{', '.join(record['image_hosts'])}]'")
