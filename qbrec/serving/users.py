"""Users whose lists are wanted: all of the catalogue, or those of Parquet files; cut into units of work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from qbrec.catalog.encoders.fields import flat, strings
from qbrec.catalog.sources import SourceFile, open_parquet
from qbrec.catalog.units import cut_file, read_unit
from qbrec.errors import DataError
from qbrec.storage.blocks import BlockSet, RaggedField
from qbrec.storage.ragged import Ragged

if TYPE_CHECKING:
    from qbrec.registry.recommend import Recommender
    from qbrec.storage.catalog_view import CatalogView

UNIT_USERS = 16_384  # of a file: half a minute of one core
_ROWS = RaggedField("row", offsets="offset")
NO_USER = "user_id: is not among the users of the domain"
NO_HISTORY = "history: is empty"
NO_ITEM = "history: no item of it is in the catalogue"


@dataclass(frozen=True)
class UserLists:
    """The users of one unit.

    Attributes:
        user_ids: Of those who get a list, string [U].
        histories: Their item rows, oldest first; U rows, none empty.
        rejected: Users who get none: `user_id`, `reason`.
        unknown_items: Items of histories that the catalogue does not have.
    """

    user_ids: pa.Array
    histories: Ragged
    rejected: pa.Table
    unknown_items: int = 0


def catalogue_units(histories: BlockSet) -> list[dict[str, Any]]:
    """One unit for every block of the histories; `rows` are its users, those of other domains too."""
    return [
        {"number": block, "block": block, "rows": int(size)}
        for block, size in enumerate(histories.block_sizes)
    ]


def file_units(
    files: Sequence[SourceFile], *, unit_rows: int = UNIT_USERS
) -> tuple[list[dict[str, Any]], bool]:
    """Slices of files with a column `user_id` and perhaps `history`; whether they have that one.

    Raises:
        DataError: A column is missing, of another type, or in some of the files only.
    """
    units: list[dict[str, Any]] = []
    with_history: bool | None = None
    for file in files:
        parquet = open_parquet(file.path)
        found = _check_columns(parquet.schema_arrow, file.path)
        if with_history not in (None, found):
            raise DataError(
                "some of the files have a column `history`, others have not",
                where=f"{files[0].path} and {file.path}",
                fix="bring the column in all files or in none",
            )
        with_history = found
        for piece in cut_file(file.path, parquet.metadata, unit_rows=unit_rows):
            units.append({"number": len(units), "rows": piece["end"] - piece["begin"], **piece})
    return units, bool(with_history)


class CatalogueUsers:
    """Users of one domain with their whole histories, validation and test items included.

    Args:
        catalog: The catalogue.
        domain: The domain.
    """

    def __init__(self, catalog: CatalogView, *, domain: str) -> None:
        self._catalog, self._domain, self._blocks = catalog, domain, catalog.histories()

    def of_block(self, block: int) -> UserLists:
        """Those of one block of the histories."""
        stored = self._blocks.read(block, ("user", "domain", "offset", "row"))
        mine = np.flatnonzero(stored["domain"] == self._catalog.domain_number(self._domain))
        histories = Ragged(stored["row"], stored["offset"].astype(np.int64)).take(mine)
        names = pa.array(self._catalog.user_ids(stored["user"][mine]), pa.string())
        return UserLists(names, histories, _rejected([], []))

    def histories(self, user_ids: Sequence[str]) -> Ragged:
        """Histories of n users by id; empty for those who are not among the domain's."""
        numbers = self._catalog.lookup_users(user_ids, self._domain)
        there = np.flatnonzero(numbers >= 0)
        lengths = np.zeros(len(numbers), np.int64)
        if not len(there):
            return Ragged.from_lengths(np.zeros(0, np.int64), lengths)
        found = self._blocks.take(numbers[there], [_ROWS])["row"]
        assert isinstance(found, Ragged)
        lengths[there] = found.lengths
        return Ragged.from_lengths(found.values, lengths)


def users_of_file(
    unit: dict[str, Any], recommender: Recommender, *, known: CatalogueUsers | None
) -> UserLists:
    """The users of a slice of a file.

    Args:
        unit: Of `file_units`.
        recommender: Knows the items.
        known: Has the histories of the users; None: the file brings them.

    Raises:
        DataError: The file changed or is damaged.
    """
    columns = ["user_id"] if known is not None else ["user_id", "history"]
    table = pa.concat_tables([part for _, part in read_unit(unit, columns, batch_rows=unit["rows"])])
    users = strings(table, "user_id")
    unknown = 0
    if known is None:
        histories, lengths, unknown = _brought(table["history"], recommender)
        reasons = np.where(lengths == 0, NO_HISTORY, np.where(histories.lengths == 0, NO_ITEM, ""))
    else:
        histories = known.histories(pc.fill_null(users, "").to_pylist())
        reasons = np.where(histories.lengths == 0, NO_USER, "")
    reasons = reasons.astype(object)
    reasons[np.asarray(pc.fill_null(pc.equal(users, ""), False))] = "user_id: is empty"
    reasons[np.asarray(users.is_null())] = "user_id: is null"
    good = reasons == ""
    return UserLists(
        users.filter(pa.array(good)),
        histories.take(np.flatnonzero(good)),
        _rejected(users.filter(pa.array(~good)), reasons[~good].tolist()),
        unknown,
    )


def _brought(column: pa.ChunkedArray, recommender: Recommender) -> tuple[Ragged, NDArray[np.int64], int]:
    """Histories as known item rows, how long they were, and how many items are unknown."""
    owner, names = flat(column)
    # Every name is hashed once, however often it occurs.
    encoded = names.cast(pa.string()).dictionary_encode()
    known = np.append(recommender.names.lookup(encoded.dictionary.to_pylist()), -1)  # the last one is null
    rows = known[np.asarray(pc.fill_null(encoded.indices, -1))]
    kept = rows >= 0
    lengths = np.bincount(owner, minlength=len(column))
    left = np.bincount(owner[kept], minlength=len(column))
    return Ragged.from_lengths(rows[kept], left), lengths, int(np.count_nonzero(~kept))


def _rejected(users: pa.Array | list[str], reasons: list[str]) -> pa.Table:
    return pa.table({"user_id": pa.array(users, pa.string()), "reason": pa.array(reasons, pa.string())})


def _check_columns(schema: pa.Schema, path: str) -> bool:
    def is_text(kind: pa.DataType) -> bool:
        return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))

    def is_texts(kind: pa.DataType) -> bool:
        return bool(
            pa.types.is_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind)
        ) and is_text(kind.value_type)

    for name, check, wanted in (("user_id", is_text, "string"), ("history", is_texts, "list<string>")):
        if name not in schema.names:
            if name == "history":
                return False
            raise DataError(
                f"there is no column {name!r}", where=path, fix="bring user_id and, if you like, history"
            )
        if not check(schema.field(name).type):
            raise DataError(
                f"the column {name!r} is {schema.field(name).type}, not {wanted}",
                where=path,
                fix=f"write it as {wanted}",
            )
    return True
