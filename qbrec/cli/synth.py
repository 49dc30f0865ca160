"""`qbrec synth`: a synthetic catalogue with a known truth."""

from __future__ import annotations

import click


@click.command()
@click.argument("out", metavar="FOLDER")
@click.option("--items", type=click.IntRange(min=1), default=3000, show_default=True, help="Items.")
@click.option("--users", type=click.IntRange(min=1), default=6000, show_default=True, help="Users.")
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Same seed, same files."
)
@click.option(
    "--images/--no-images", default=True, show_default=True, help="Render a small picture per item."
)
def synth(out: str, items: int, users: int, seed: int, images: bool) -> None:
    """Write items.parquet, interactions.parquet and truth.parquet to FOLDER.

    A taxonomy with titles, descriptions, brands and pictures that follow it, users who walk it; some items
    lack the picture, some are duplicate listings, some were never bought.

    \b
    Examples:
      qbrec synth data/demo
      qbrec synth data/large --items 5000000 --users 500000 --no-images
    """
    from qbrec.catalog.synth import generate

    summary = generate(out, num_items=items, num_users=users, seed=seed, images=images)
    click.echo(
        f"{summary.num_items:,} items, {summary.num_users:,} users, "
        f"{summary.num_interactions:,} interactions in {out}"
    )
