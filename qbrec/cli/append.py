"""`qbrec append`: items added, changed and retired after the catalogue was built."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qbrec.cli.options import config_options

if TYPE_CHECKING:
    from qbrec.catalog.append.run import Request
    from qbrec.config import RootConfig
    from qbrec.storage.artifact import Artifact
    from qbrec.storage.generations import GenerationsView


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
    marked until they are given again. The run's models go on with the catalogue they were trained on: they
    neither rank the new items nor leave out the retired ones.

    Rows of items are whole: a column that is left out is empty. Features are made as those of the catalogue
    were, by its own encoders and settings; of the configuration only catalog.max_rejected_fraction,
    catalog.image.roots and catalog.image.hosts count. The same command again does nothing.

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
    from qbrec.catalog.append.run import Request
    from qbrec.config import load_config

    config = load_config(config_path, overrides=overrides)
    request = Request(domain or "", items, retire, snapshot)
    artifact, view, new = append_generation(config, request)
    if not new:
        click.echo(f"already appended: generation {len(view.generations)} is made of this very input")
    click.echo(_table(artifact, view))
    counts = artifact.meta["counts"]
    if counts["unknown"]:
        click.secho(
            f"{counts['unknown']} ids to be retired are not in the domain: "
            f"see {artifact.path / 'unknown.parquet'}",
            err=True,
            fg="yellow",
        )
    click.echo(artifact.path)


def append_generation(config: RootConfig, request: Request) -> tuple[Artifact, GenerationsView, bool]:
    """Append to the catalogue of a run and note the generation in its run.json.

    Args:
        config: The configuration; it names the run. What made the catalogue is read from its manifest.
        request: What to append; an empty domain means the run's target domain.

    Returns:
        The generation, the catalogue with it, and whether it was made now.

    Raises:
        ConfigError: A new domain's name cannot be used.
        DataError: There is no finished catalogue, or the input is bad.
        LaunchError: Another process has the run, or Ray fails.
    """
    from dataclasses import replace

    from qbrec.catalog.append.frozen import frozen_config
    from qbrec.catalog.append.run import build_generation, generation_key, recipe_of
    from qbrec.config import load_config
    from qbrec.engine.context import StageContext
    from qbrec.errors import DataError
    from qbrec.pipeline import say
    from qbrec.run_record import RunRecord, run_directory
    from qbrec.storage.artifact import ArtifactStore
    from qbrec.storage.generation import KIND
    from qbrec.storage.generations import GenerationsView, current_generations

    run_dir = run_directory(config)
    if "path" not in RunRecord.load(run_dir).stages.get("catalog", {}):
        raise DataError(
            "the run has no finished catalogue yet",
            where=str(run_dir),
            fix="`qbrec catalog` or `qbrec run` with the same configuration makes it",
        )
    # The run stays what it is: the present configuration only names it and says where to work.
    owned = load_config(run_dir / "config.yaml")
    storage = str(Path(config.run.storage).resolve())
    owned = owned.model_copy(
        update={"run": owned.run.model_copy(update={"storage": storage}), "compute": config.compute}
    )
    if not request.domain:
        request = replace(request, domain=owned.data.target_domain)
    _check_name(request.domain)
    record = RunRecord.own(owned, resume="must")
    try:
        store = ArtifactStore(storage, remote=owned.run.remote)
        store.prepare()
        catalog = store.open(record.stages["catalog"]["path"])
        noted: list[dict[str, str]] = record.extra.get("generations", [])
        found = current_generations(catalog, [store.open(place["path"]) for place in noted])
        if len(found) < len(noted):
            say(f"the catalogue was built anew: {len(noted) - len(found)} generations of the old one are off")
        frozen = owned.model_copy(update={"catalog": frozen_config(catalog, config.catalog)})
        sources = request.sources()
        if found:
            before = GenerationsView(catalog, found[:-1])
            if generation_key(before, request, config=frozen, sources=sources) == found[-1].key:
                return found[-1], GenerationsView(catalog, found), False
        view = GenerationsView(catalog, found)
        key = generation_key(view, request, config=frozen, sources=sources)
        artifact = store.find(KIND, key)
        if artifact is None:
            ctx = StageContext(
                store=store, run_dir=run_dir, stage=KIND, key=key, seed=owned.run.seed,
                compute=config.compute, recipe=recipe_of(request, config=frozen), owner=record.owner,
            )  # fmt: skip
            artifact = build_generation(ctx, frozen, view, request, sources=sources)
        artifact.verify()
        store.publish(artifact)
        record.extra["generations"] = [{"key": g.key, "path": str(g.path)} for g in [*found, artifact]]
        record.save()
        return artifact, GenerationsView(catalog, [*found, artifact]), True
    finally:
        record.close()


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


def _table(artifact: Artifact, view: GenerationsView) -> str:
    """What the last generation did, and how large the catalogue is with it."""
    meta: dict[str, Any] = artifact.meta
    counts: dict[str, int] = meta["counts"]
    domain = meta["domain"]
    rows = [(name, counts[name]) for name in ("added", "changed", "unchanged", "restored", "retired")]
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
    number = len(view.generations)
    before = view.generations[-2].artifact if number > 1 else view.base.artifact
    title = f"generation {number}, domain {domain}{'' if domain in before.meta['domains'] else ' (new)'}"
    width = max(len(name) for name, _ in rows)
    return "\n".join([title, *(f"{name:<{width}}  {count:>12,}" for name, count in rows)])
