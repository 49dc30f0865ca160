"""What a catalogue has settled for later generations, and whether new items fit it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from qbrec.catalog.contract import Domain, read_items
from qbrec.catalog.encoders.models import BUILT_IN_TEXT, encoder_identity
from qbrec.catalog.encoders.text import HashedNgramEncoder
from qbrec.catalog.shards import stored_name
from qbrec.config import parse_config
from qbrec.config.sections import CatalogConfig
from qbrec.errors import DataError
from qbrec.storage.artifact import Artifact
from qbrec.storage.generations import GenerationsView

_NEW = "leave it out, or build a new catalogue from all items: `qbrec run` with another run.name"
_MADE = ("encoder", "dim", "revision", "files", "precision")  # what an encoder's vectors depend on


@dataclass(frozen=True)
class Frozen:
    """What a catalogue has settled for the generations that follow it.

    Attributes:
        widths: Width of every modality.
        display: Further columns of the new items, in the types in which the catalogue has them.
    """

    widths: dict[str, int]
    display: pa.Schema


def frozen_config(catalog: Artifact, current: CatalogConfig) -> CatalogConfig:
    """The configuration that new items are encoded by: the catalogue's own.

    Only what says which input is acceptable comes from the present one: `max_rejected_fraction`, and where
    pictures may be read (`image.roots`, `image.hosts`).

    Raises:
        DataError: The manifest does not say it.
    """
    recipe = catalog.manifest["config"].get("catalog")
    if recipe is None:
        raise DataError(
            "the manifest does not say how the catalogue was made",
            where=str(catalog.path),
            fix="build the catalogue with `qbrec run` or `qbrec catalog`",
        )
    config = parse_config({"catalog": recipe}, where=str(catalog.path)).catalog
    image = {"roots": current.image.roots, "hosts": current.image.hosts}
    return config.model_copy(
        update={
            "max_rejected_fraction": current.max_rejected_fraction,
            "image": config.image.model_copy(update=image),
        }
    )


def frozen_text(catalog: Artifact, config: CatalogConfig) -> HashedNgramEncoder | None:
    """The catalogue's built-in text encoder; None where it has none."""
    if config.text.encoder != BUILT_IN_TEXT or not catalog.has("encoder.safetensors"):
        return None
    return HashedNgramEncoder.from_state(catalog.load_safetensors("encoder.safetensors"))


def read_new_items(
    place: str | None, domain: str, view: GenerationsView, config: CatalogConfig
) -> tuple[list[Domain], Frozen]:
    """Check the columns of new items against the contract and against the catalogue.

    Args:
        place: Their Parquet; None: there are none.
        domain: Name of their domain, a new one perhaps.
        view: The catalogue so far.
        config: Of `frozen_config`.

    Returns:
        All domains by number (the others bring no files), and what is settled.

    Raises:
        ConfigError: `image_path` without allowed places.
        DataError: A column has a wrong type, or does not fit the catalogue.
    """
    names = [*view.domains, *([] if domain in view.domains else [domain])]
    if len(names) > 255:
        raise DataError("more than 255 domains", where=domain, fix="add the items to one of the domains")
    domains = [Domain(number, name, (), (), ()) for number, name in enumerate(names)]
    modalities = view.base.artifact.meta["modalities"]
    widths = {modality: int(facts["dim"]) for modality, facts in modalities.items()}
    if place is None:
        return domains, Frozen(widths, pa.schema([]))
    new = read_items(names.index(domain), domain, place, catalog=config, where="--items")
    domains[new.number] = new
    _check_modalities(new, widths, view.base.artifact.meta["encoders"], config)
    return domains, Frozen(widths, _display(new, view.display_schema))


def _check_modalities(
    new: Domain, widths: dict[str, int], encoders: Mapping[str, Mapping[str, Any]], config: CatalogConfig
) -> None:
    where = new.items[0].path
    brought = {m: f"the column {column!r}" for m, (column, _) in new.embeddings.items()}
    made = {}
    if new.encodes_text:
        made["text"] = "text"
    if new.picture_column:
        made["image"] = "pictures"
    for modality, what in (brought | made).items():
        if modality not in widths:
            raise DataError(
                f"the items bring {what}, but the catalogue has no modality {modality!r}",
                where=where,
                fix=_NEW,
            )
        if (modality in made) != (modality in encoders):
            other = "of pictures or text" if modality in encoders else f"from a column {modality}_embedding"
            raise DataError(
                f"the catalogue has its modality {modality!r} {other}, the new items bring {what}",
                where=where,
                fix="bring the same kind of column as the catalogue's items have",
            )
    for modality, (column, width) in new.embeddings.items():
        if width != widths[modality]:
            raise DataError(
                f"the vectors of {column!r} have {width} numbers, those of the catalogue {widths[modality]}",
                where=where,
                fix=f"use the encoder that the catalogue's were made with, or {_NEW}",
            )
    now = encoder_identity(config, dims={modality: widths[modality] for modality in made})
    for modality, identity in now.items():
        for fact in _MADE:
            then = encoders[modality].get(fact)
            if identity.get(fact) != then:
                raise DataError(
                    f"the encoder of {modality!r} is not the one of the catalogue: its {fact} is "
                    f"{identity.get(fact)!r} instead of {then!r}",
                    where=identity["encoder"],
                    fix="put the model's folder back as it was, or build a new catalogue",
                )


def _display(new: Domain, known: pa.Schema) -> pa.Schema:
    """Further columns of the new items, in the types in which the catalogue has them."""
    fields = []
    for field in new.display:
        name = stored_name(field.name)
        if name not in known.names or pa.types.is_null(known.field(name).type):
            fields.append(field)
            continue
        there = known.field(name).type
        try:
            both = pa.unify_schemas(
                [pa.schema([pa.field(name, there)]), pa.schema([pa.field(name, field.type)])],
                promote_options="permissive",
            )
            fits = both.field(name).type == there
        except pa.ArrowException:
            fits = False
        if not fits:
            raise DataError(
                f"the display column {field.name!r} is {field.type}, in the catalogue it is {there}",
                where=new.items[0].path,
                fix=f"write it as {there}, or {_NEW}",
            )
        fields.append(pa.field(field.name, there))
    return pa.schema(fields)
