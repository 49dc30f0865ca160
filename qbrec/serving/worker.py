"""One unit of a batch, as a Ray actor ranks and writes it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from qbrec.serving.model import ServedModel
from qbrec.serving.output import SCHEMA, BatchFolder, Counts
from qbrec.serving.users import CatalogueUsers, UserLists, users_of_file

if TYPE_CHECKING:
    from qbrec.ranking.recommend import Allowed
    from qbrec.registry.recommend import Recommender


@dataclass(frozen=True)
class Wanted:
    """What is asked of the model, for every user.

    Attributes:
        k: Items of a list.
        keep_seen: Whether items of the history may be in it.
        categories: Only items of these; None: of all.
        only: Only these items; None: all.
    """

    k: int = 10
    keep_seen: bool = False
    categories: tuple[str, ...] | None = None
    only: tuple[str, ...] | None = None

    def filter_of(self, recommender: Recommender) -> Allowed | None:
        """The filter made ready; None where there is none.

        Raises:
            DataError: A category or item is unknown, or nothing is left.
        """
        if self.categories is None and self.only is None:
            return None
        return recommender.only(categories=self.categories, item_ids=self.only)


@dataclass(frozen=True)
class BatchJob:
    """What an actor needs beside its units.

    Attributes:
        model: The model.
        wanted: What is asked of it.
        out: Folder of the batch.
        own_histories: Whether users have the histories of the catalogue; False: files bring them.
        device: `cpu` or `cuda`.
        threads: Of one actor, on the CPU.
    """

    model: ServedModel
    wanted: Wanted
    out: str
    own_histories: bool
    device: str = "cpu"
    threads: int = 1


class RankWorker:
    """An actor of the pool: opens the model with its first unit, so that what is wrong with it is told.

    Args:
        job: The same for all actors.
    """

    def __init__(self, job: BatchJob) -> None:
        import torch

        # Sums depend on how they are cut: the same number everywhere gives the same lists everywhere.
        torch.set_num_threads(job.threads)
        self._job, self._out = job, BatchFolder(job.out)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Rank and write one unit (`users.catalogue_units`, `users.file_units`); what became of its users."""
        (unit,) = table.to_pylist()
        users = self._users(unit)
        counts: Counts = {
            "users": len(users.user_ids),
            "rejected": users.rejected.num_rows,
            "unknown_items": users.unknown_items,
        }
        self._out.write(unit["number"], self._lists(users), users.rejected, counts)
        return pa.Table.from_pylist([{"number": unit["number"], "rows": unit["rows"], **counts}])

    @cached_property
    def _recommender(self) -> Recommender:
        return self._job.model.open(device=self._job.device)

    @cached_property
    def _among(self) -> Allowed | None:
        return self._job.wanted.filter_of(self._recommender)

    @cached_property
    def _known(self) -> CatalogueUsers | None:
        from qbrec.storage.catalog_view import CatalogView

        if not self._job.own_histories:
            return None
        catalog = CatalogView(self._job.model.artifact("catalog"))
        return CatalogueUsers(catalog, domain=self._recommender.domain)

    def _users(self, unit: dict[str, Any]) -> UserLists:
        if "block" not in unit:
            return users_of_file(unit, self._recommender, known=self._known)
        assert self._known is not None
        return self._known.of_block(unit["block"])

    def _lists(self, users: UserLists) -> pa.Table:
        wanted = self._job.wanted
        rows, scores = self._recommender.rank(
            users.histories, k=wanted.k, keep_seen=wanted.keep_seen, among=self._among
        )
        found = rows >= 0
        offsets = np.concatenate([[0], np.cumsum(found.sum(axis=1))]).astype(np.int32)
        # The same items come again and again: each is named once.
        distinct, back = np.unique(rows[found], return_inverse=True)
        names = pa.array(self._recommender.names.item_ids(distinct), pa.string())
        semantic = pa.array([self._recommender.names.semantic_id(int(row)) for row in distinct], pa.string())
        columns = [
            users.user_ids,
            _lists_of(names.take(pa.array(back)), offsets),
            _lists_of(pa.array(scores[found], pa.float32()), offsets),
            _lists_of(semantic.take(pa.array(back)), offsets),
        ]
        return pa.table(columns, schema=SCHEMA)


def _lists_of(values: pa.Array, offsets: NDArray[np.int32]) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(offsets), values)
