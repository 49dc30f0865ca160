"""Append items to a finished catalogue: one generation (DESIGN section 3), the driver's side.

read ids → check → encode as the catalogue was → compare with what is stored → items-*.tar, changed-*.tar

The driver holds some bytes per item; features stay in Ray's object store.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from qbrec.catalog import rejected
from qbrec.catalog.append.classify import TALLY
from qbrec.catalog.append.compare import Compared, compare_items
from qbrec.catalog.append.frozen import Frozen, read_new_items
from qbrec.catalog.append.retire import list_identity, rows_to_retire
from qbrec.catalog.build_items import ItemSteps
from qbrec.catalog.contract import Domain
from qbrec.catalog.parts import block_size, new_array
from qbrec.catalog.shards import ShardJob
from qbrec.catalog.sources import list_files
from qbrec.catalog.store_items import store_items, write_shards
from qbrec.config.root import RootConfig
from qbrec.engine.context import StageContext
from qbrec.engine.ray_data import ray_errors
from qbrec.engine.ray_session import ensure_ray
from qbrec.errors import DataError
from qbrec.storage.artifact import Artifact, ArtifactWriter, artifact_key
from qbrec.storage.generation import KIND
from qbrec.storage.generations import GenerationsView

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Request:
    """What is to be appended.

    Attributes:
        domain: Domain of the items, a new one perhaps.
        items: Parquet in the input contract: file, folder or glob; None: nothing is added or changed.
        retire: List of item ids to be retired (`retire.read_ids`); None: there is none.
        snapshot: The items are all that the domain has: the others are retired.
    """

    domain: str
    items: str | None = None
    retire: str | None = None
    snapshot: bool = False

    def sources(self) -> dict[str, str]:
        """What identifies the input: SHA-256 over path, size and time of the items, and over the list.

        Raises:
            DataError: A place names no file.
        """
        found = {}
        if self.items is not None:
            files = [[f.path, f.size, f.mtime_ns] for f in list_files(self.items, where="--items")]
            found["items"] = hashlib.sha256(json.dumps(files).encode()).hexdigest()
        if self.retire is not None:
            found["retire"] = list_identity(self.retire)
        return found


def generation_key(
    view: GenerationsView, request: Request, *, config: RootConfig, sources: dict[str, str]
) -> str:
    """Key of the generation that a request makes of a catalogue and its generations so far.

    Args:
        view: These.
        request: The request.
        config: Configuration with the catalogue's own section, see `frozen.frozen_config`.
        sources: Of `Request.sources`.
    """
    recipe = recipe_of(request, config=config)
    return artifact_key(KIND, config=recipe, seed=config.run.seed, inputs=view.inputs | sources)


def recipe_of(request: Request, *, config: RootConfig) -> dict[str, Any]:
    """What of configuration and request goes into the key and the manifest."""
    catalog = config.catalog.model_dump(mode="json")
    return {"catalog": catalog, "domain": request.domain, "snapshot": request.snapshot}


def build_generation(
    ctx: StageContext, config: RootConfig, view: GenerationsView, request: Request, *, sources: dict[str, str]
) -> Artifact:
    """Write one generation.

    Args:
        ctx: Of the driver, with the generation's key.
        config: Configuration with the catalogue's own section.
        view: The catalogue and its generations so far.
        request: What is to be appended.
        sources: Of `Request.sources`, before anything was read.

    Raises:
        ConfigError: `image_path` without allowed places.
        DataError: The input breaks the contract, does not fit the catalogue, contradicts itself or changed
            while it was read; or too many rows are bad.
        LaunchError: Ray cannot be reached or fails.
    """
    domains, frozen = read_new_items(request.items, request.domain, view, config.catalog)
    if request.items is None:
        view.domain_number(request.domain)
    writer = ctx.writer()
    listed, unknown = np.zeros(0, np.int64), list[str]()
    if request.retire is not None:
        listed, unknown = rows_to_retire(request.retire, request.domain, view)
    facts: dict[str, Any] = {"rejected": {}, "skipped_pictures": {}, "modalities": {}}
    compared = Compared.nothing(view.num_items)
    if request.items is not None:
        ensure_ray(config.compute)
        with ray_errors("catalog"):
            steps = ItemSteps(ctx, config, domains, writer.path, frozen)
            steps.scan(fit=False)
            compared = compare_items(ctx, steps, view)
            facts["rejected"], facts["skipped_pictures"] = steps.settle()
            facts["modalities"] = {
                m: {"dim": frozen.widths[m], "present": present, "max_tokens": most}
                for m, (_, _, present, most) in zip(steps.modalities, compared.sizes.tolist(), strict=True)
            }
            _check_list(request, view, listed, compared.given)
            _store(ctx, config, writer, view, domains, frozen, compared)
    retired, again = _retired(request, view, writer, listed, compared.given)
    for name, rows in (("retired", retired), ("restored", compared.restored)):
        if len(rows):
            writer.save_npy(f"{name}.npy", rows)
    if unknown:
        pq.write_table(pa.table({"item_id": pa.array(unknown, pa.string())}), writer.path / "unknown.parquet")
    if request.sources() != sources:
        raise DataError(
            "the input changed while it was read",
            where=" and ".join(place for place in (request.items, request.retire) if place),
            fix="leave the files alone and run the same command again",
        )
    num_added = int(compared.items[0].sum())
    tally = dict(zip(TALLY, compared.tally.tolist(), strict=True))
    meta = facts | {
        "domain": request.domain,
        "domains": [domain.name for domain in domains],
        "first_row": view.num_items,
        "num_added": num_added,
        "num_changed": int(compared.items[1:].sum()),
        "num_items": view.num_items + num_added,
        "counts": tally | {"retired": len(retired), "already_retired": again, "unknown": len(unknown)},
    }
    before = {f"generation-{n}": g.artifact for n, g in enumerate(view.generations, 1)}
    return ctx.commit(writer, meta=meta, inputs={"catalog": view.base.artifact} | before)


def _store(
    ctx: StageContext,
    config: RootConfig,
    writer: ArtifactWriter,
    view: GenerationsView,
    domains: list[Domain],
    frozen: Frozen,
    compared: Compared,
) -> None:
    """Write new items, and new versions of known ones."""
    names = tuple(domain.name for domain in domains)
    directory, catalog = writer.path, config.catalog
    block_bytes = block_size(catalog.block_bytes, int(compared.bytes.sum()))
    added, first = compared.packed(slice(0, 1), catalog.shard_bytes)
    if added:
        job = ShardJob(directory, frozen.widths, names, view.num_items + first, block_bytes)
        store_items(ctx, writer, added, job)
    changed, first = compared.packed(slice(1, None), catalog.shard_bytes)
    if changed:
        job = ShardJob(directory, frozen.widths, names, first, block_bytes, prefix="changed")
        rows = new_array(directory, "changed", np.int64, int(first[-1]))

        def take(span: slice, result: dict[str, Any]) -> None:
            rows[span] = result["rows"]
            assert not span.start or rows[span.start - 1] < rows[span.start], "shards follow one another"

        write_shards(ctx, changed, job, label="writing changes", take=take)
        rows.flush()  # type: ignore[attr-defined]


def _check_list(request: Request, view: GenerationsView, listed: Ints, given: NDArray[np.bool_]) -> None:
    both = listed[given[listed]]
    if len(both):
        (name,) = view.item_ids(both[:1])
        raise DataError(
            f"{len(both)} items are both given and to be retired, such as {name!r}",
            where=f"--items {request.items} and --retire {request.retire}",
            fix="take them out of one of the two",
        )


def _retired(
    request: Request,
    view: GenerationsView,
    writer: ArtifactWriter,
    listed: Ints,
    given: NDArray[np.bool_],
) -> tuple[Ints, int]:
    """Rows that are retired now, ascending, and how many of those listed were retired before."""
    gone = view.retired_later(listed)
    retired = listed[~gone]
    if request.snapshot and request.domain in view.domains:
        # A bad row says that its item is still sold: what is stored of it stays.
        bad = view.rows_of_hashes(rejected.item_hashes(writer.path))
        given[bad[bad >= 0]] = True
        missing = np.flatnonzero(view.domain_mask(request.domain) & ~given)
        retired = np.union1d(retired, missing[~view.retired_later(missing)])
    return retired, int(gone.sum())
