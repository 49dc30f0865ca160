"""Batches of users' histories, for all that learn from them."""

from __future__ import annotations

from typing import TypeVar

from qbrec.config.stages import TrainConfig
from qbrec.engine.context import StageContext
from qbrec.errors import DataError
from qbrec.storage.block_reader import RaggedField
from qbrec.storage.catalog_view import CatalogView
from qbrec.storage.loader import BatchLoader, Collate

Batch = TypeVar("Batch")

HISTORY_FIELDS = ("domain", "cut", RaggedField("row", offsets="offset"))


def history_loader(
    ctx: StageContext,
    catalog: CatalogView,
    schedule: TrainConfig,
    *,
    collate: Collate[Batch],
    domain: int | None,
) -> BatchLoader[Batch]:
    """Batches of histories whose training part has at least two items, of one domain or of all (None).

    Args:
        ctx: The rank's context; the order of samples is the stage's own.
        catalog: Where the histories lie.
        schedule: Size of batches.
        collate: Called with `HISTORY_FIELDS`; it must cut off what comes after the training part.
        domain: Domain number.

    Raises:
        DataError: There is no such history.
    """
    blocks = catalog.histories()
    select = blocks.column("cut")[:, 0] >= 2
    if domain is not None:
        select &= blocks.column("domain") == domain
    if not select.any():
        raise DataError(
            "no user has two interactions before validation and test: there is nothing to learn from",
            where="all domains" if domain is None else f"domain number {domain}",
            fix="bring longer histories, or check data.domains and data.target",
        )
    return BatchLoader(
        blocks,
        batch_size=schedule.batch_size,
        micro_batch=schedule.micro_batch,
        seed=ctx.sub_seed(f"{ctx.stage}/order"),
        rank=ctx.rank,
        world=ctx.world,
        collate=collate,
        fields=HISTORY_FIELDS,
        select=select,
        pin=ctx.device.type == "cuda",
    )
