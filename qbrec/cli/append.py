"""`qbrec append`: items added, changed and retired after the catalogue was built."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from qbrec.cli.options import config_options

if TYPE_CHECKING:
    from qbrec.append_run import Appended


@click.command()
@config_options
@click.option("--items", metavar="PATH", help="Parquet of items: a file, a folder or a glob.")
@click.option("--domain", metavar="NAME", help="Their domain, also a new one; default: the target domain.")
@click.option(
    "--retire", metavar="FILE", help="Items no longer sold: .parquet or .csv with item_id, or one id a line."
)
@click.option("--snapshot", is_flag=True, help="The items are all that the domain has: retire the others.")
def append(
    config_path: str | None,
    overrides: tuple[str, ...],
    items: str | None,
    domain: str | None,
    retire: str | None,
    snapshot: bool,
) -> None:
    """Add, change and retire items of a finished catalogue.

    Writes one generation: new items get rows after all others, changed ones keep theirs, retired ones are
    marked until they are given again.

    The models of the run then learn of it without being trained: new items are fused by its network and get
    semantic IDs by its codebooks, published IDs stay as they are, changed items keep theirs; the item graphs
    join new items to those of like content. From then on
    `qbrec recommend`, `qbrec ids` and `qbrec register` know new items and leave out retired ones. A warning
    says when new items have drifted so far from the catalogue that the run should be trained anew
    (quantizer.quality.max_drift). A run that is not trained yet gives the IDs when it is: at the end of
    `qbrec run`, or with the same command again.

    Rows of items are whole: a column that is left out is empty. Features are made as those of the catalogue
    were, by its own encoders and settings; of the configuration only catalog.max_rejected_fraction,
    catalog.image.roots, catalog.image.hosts and quantizer.quality.max_drift count. The same command again
    does nothing.

    Interactions are not part of a generation: users of a new domain, and what was done with new items, enter
    with a new catalogue (`qbrec run` with another run.name), and so does another modality.

    \b
    Examples:
      qbrec append --config shop.yaml --items new/2026-11-21.parquet
      qbrec append --config shop.yaml --items 's3://shop/items/*.parquet' --snapshot
      qbrec append --config shop.yaml --retire sold_out.txt
      qbrec append --config shop.yaml --domain garden --items garden/items.parquet
    """
    if items is None and retire is None:
        raise click.UsageError("Nothing to append: name --items, --retire or both.")
    if snapshot and items is None:
        raise click.UsageError("--snapshot needs --items: all items that the domain has.")
    from qbrec.append_run import append_generation
    from qbrec.catalog.append.run import Request
    from qbrec.config import load_config
    from qbrec.pipeline import say

    if domain is not None:
        _check_name(domain)
    config = load_config(config_path, overrides=overrides)
    done = append_generation(config, Request(domain or "", items, retire, snapshot), say=say, warn=_warn)
    if not done.new:
        number = len(done.view.generations)
        click.echo(f"already appended: generation {number} is made of this very input")
    click.echo(_table(done))
    unknown = done.artifact.meta["counts"]["unknown"]
    if unknown:
        _warn(
            f"{unknown} ids to be retired are not in the domain: see {done.artifact.path / 'unknown.parquet'}"
        )
    if done.missing and done.view.num_items > done.view.base.num_items:
        _warn(
            f"new items have no semantic IDs yet: {done.missing}; `qbrec run` with the same configuration "
            "gives them theirs"
        )
    click.echo(done.artifact.path)


def _warn(text: str) -> None:
    click.secho(text, err=True, fg="yellow")


def _table(done: Appended) -> str:
    """What the last generation did, and how large the catalogue is with it."""
    view = done.view
    meta: dict[str, Any] = done.artifact.meta
    counts: dict[str, int] = meta["counts"]
    domain = meta["domain"]
    rows: list[tuple[str, int | float]] = [
        (name, counts[name]) for name in ("added", "changed", "unchanged", "restored", "retired")
    ]
    if counts["already_retired"]:
        rows.append(("retired before", counts["already_retired"]))
    rows.append(("rejected", sum(meta["rejected"].values())))
    rows += [(f"  {reason}", count) for reason, count in sorted(meta["rejected"].items())]
    rows += [
        (f"items of {domain}", int(view.domain_mask(domain).sum())),
        ("  on offer", int(view.candidates(domain).sum())),
        ("items in all", view.num_items),
        ("  on offer", int(view.candidates().sum())),
    ]
    rows += _ids_rows(done)
    number = len(view.generations)
    before = view.generations[-2].artifact if number > 1 else view.base.artifact
    title = f"generation {number}, domain {domain}{'' if domain in before.meta['domains'] else ' (new)'}"
    width = max(len(name) for name, _ in rows)
    return "\n".join([title, *(f"{name:<{width}}  {count:>12,}" for name, count in rows)])


def _ids_rows(done: Appended) -> list[tuple[str, int | float]]:
    """What the quantizer made of the last generation's new items."""
    if done.missing or not done.artifact.meta["num_added"]:
        return []
    meta = done.ids[-1].meta
    return [
        ("new semantic IDs", meta["num_added"]),
        ("  of an equal item", meta["shared"]),
        ("  next nearest", meta["moved"]),
        ("  above capacity", meta["unresolved"]),
        ("drift", round(meta["drift"]["drift"], 2)),
    ]


def _check_name(domain: str) -> None:
    from pydantic import TypeAdapter, ValidationError

    from qbrec.config.sections import Name
    from qbrec.errors import ConfigError

    try:
        TypeAdapter(Name).validate_python(domain)
    except ValidationError:
        raise ConfigError(
            f"{domain!r} cannot be the name of a domain",
            where="--domain",
            fix="use up to 64 letters, digits, '.', '_' and '-', a letter or digit first",
        ) from None
