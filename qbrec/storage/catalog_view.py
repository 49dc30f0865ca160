"""Reading side of the catalogue artifact, for every later stage."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qbrec.errors import DataError
from qbrec.storage.artifact import Artifact
from qbrec.storage.blocks import BlockSet, RaggedField
from qbrec.storage.hashing import hash64, rows_of
from qbrec.storage.ragged import Ragged
from qbrec.storage.user_index import users_of

if TYPE_CHECKING:
    import pyarrow as pa

Rows = NDArray[np.int64] | Sequence[int]

_ROWS, _TIMES = RaggedField("row", offsets="offset"), RaggedField("time", offsets="offset")


@dataclass(frozen=True)
class Histories:
    """Histories of users in memory, in the order of user numbers.

    Attributes:
        user: User number, int64 [U].
        domain: Domain number, uint8 [U].
        rows: Item rows of each user, oldest first.
        times: Timestamp of each interaction.
        cut: History-relative start of validation and test, int32 [U, 2]; [n, n] where a history trains only.
    """

    user: NDArray[np.int64]
    domain: NDArray[np.uint8]
    rows: Ragged
    times: Ragged
    cut: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.user)


class DomainRows(ABC):
    """Questions about item rows and domains that every view of a catalogue answers the same way."""

    @property
    @abstractmethod
    def path(self) -> Path:
        """Where the catalogue lies, for error messages."""

    @property
    @abstractmethod
    def domains(self) -> list[str]:
        """Domain names, by number."""

    @property
    @abstractmethod
    def item_domain(self) -> NDArray[np.uint8]:
        """Domain number of each row, uint8 [N]."""

    @property
    @abstractmethod
    def retired(self) -> NDArray[np.bool_]:
        """Rows that are kept but not recommended, bool [N]."""

    def domain_number(self, domain: str) -> int:
        """Number of a domain.

        Raises:
            DataError: There is no such domain.
        """
        if domain not in self.domains:
            raise DataError(
                f"there is no domain {domain!r}",
                where=str(self.path),
                fix=f"name one of {', '.join(self.domains)}",
            )
        return self.domains.index(domain)

    def domain_mask(self, domain: str) -> NDArray[np.bool_]:
        """Which rows belong to a domain, bool [N]."""
        return np.asarray(self.item_domain == self.domain_number(domain))

    def candidates(self, domain: str | None = None) -> NDArray[np.bool_]:
        """Rows that may be recommended: those of a domain (None: of all) that are not retired, bool [N].

        Raises:
            DataError: There is no such domain.
        """
        live = ~np.asarray(self.retired)
        return live if domain is None else live & self.domain_mask(domain)


class CatalogView(DomainRows):
    """What later stages ask of a catalogue; arrays and tables are mapped and opened when first asked for."""

    def __init__(self, artifact: Artifact) -> None:
        if artifact.kind != "catalog":
            raise DataError(f"this is a {artifact.kind} artifact, not a catalogue", where=str(artifact.path))
        self.artifact = artifact

    @property
    def path(self) -> Path:
        """Folder of the artifact."""
        return self.artifact.path

    @property
    def num_items(self) -> int:
        """Number of items: rows are 0 … num_items - 1."""
        return int(self.artifact.meta["num_items"])

    @property
    def domains(self) -> list[str]:
        """Domain names, by number."""
        return list(self.artifact.meta["domains"])

    def items(self) -> BlockSet:
        """Blocks of item features, in row order."""
        return BlockSet.open(self.artifact, "items")

    def histories(self) -> BlockSet:
        """Blocks of user histories, in user order."""
        return BlockSet.open(self.artifact, "histories")

    @cached_property
    def train_counts(self) -> NDArray[np.int64]:
        """Interactions of each item in the training parts, int64 [N]."""
        return self.artifact.load_npy("train_counts.npy")

    @cached_property
    def duplicate_group(self) -> NDArray[np.int64]:
        """First row of equal content for each row (its own, where there is no other), int64 [N]."""
        return self.artifact.load_npy("duplicates.npy")

    @cached_property
    def near_duplicate_group(self) -> NDArray[np.int64]:
        """First row of those of equal content or bought by the same users, for each row, int64 [N]."""
        return self.artifact.load_npy("near_duplicates.npy")

    @cached_property
    def retired(self) -> NDArray[np.bool_]:
        """Rows that are kept but not recommended, bool [N]; a catalogue without any has no such file."""
        if self.artifact.has("retired.npy"):
            return self.artifact.load_npy("retired.npy")
        return np.zeros(self.num_items, dtype=bool)

    @cached_property
    def item_domain(self) -> NDArray[np.uint8]:
        """Domain number of each row, uint8 [N]."""
        return self.artifact.load_npy("item_domain.npy")

    def representatives(self, rows: Rows) -> NDArray[np.int64]:
        """For each row the one that histories hold in its place: its own, where nothing was collapsed."""
        rows = np.asarray(rows, dtype=np.int64)
        if not self.artifact.has("representatives.npy"):
            return rows
        return np.asarray(self.artifact.load_npy("representatives.npy")[rows])

    def item_ids(self, rows: Rows) -> list[str]:
        """Item ids of rows, in their order."""
        return self._display("item_id", rows)

    def titles(self, rows: Rows) -> list[str]:
        """Titles of rows; empty where an item has none."""
        return [title or "" for title in self._display("title", rows)]

    def brands(self, rows: Rows) -> list[str]:
        """Brands of rows; empty where an item has none."""
        return [brand or "" for brand in self._display("brand", rows)]

    def categories(self, rows: Rows) -> list[list[str]]:
        """Category paths of rows, root first."""
        return [path or [] for path in self._display("categories", rows)]

    def display(self, rows: Rows) -> pa.Table:
        """All display columns of rows: row, domain, item_id, title, brand, categories and further ones."""
        return self._table.take(np.asarray(rows, dtype=np.int64))

    def lookup(self, item_ids: Sequence[str], domain: str) -> NDArray[np.int64]:
        """Rows of item ids of a domain, int64 [n]; -1 where an id is unknown."""
        self.domain_number(domain)
        return rows_of(self._hashes, hash64(domain, item_ids))

    def user_ids(self, users: Rows) -> list[str]:
        """User ids of user numbers, in their order."""
        ids: list[str] = self._users["user_id"].take(np.asarray(users, dtype=np.int64)).to_pylist()
        return ids

    def lookup_users(self, user_ids: Sequence[str], domain: str) -> NDArray[np.int64]:
        """Numbers of users of a domain, int64 [n]; -1 where an id is unknown."""
        self.domain_number(domain)
        return users_of(self._users, domain, user_ids)

    def load_histories(self, domain: str | None = None) -> Histories:
        """Histories of all users, or of one domain's, in memory.

        Raises:
            DataError: There is no such domain.
        """
        if domain is not None:
            self.domain_number(domain)
            if len(self.domains) > 1:
                return self.histories_of(self.load_cuts(domain)[0])
        blocks = self.histories()
        rows, times = blocks.ragged(_ROWS), blocks.ragged(_TIMES)
        user, numbers, cut = (blocks.column(name) for name in ("user", "domain", "cut"))
        return Histories(user, numbers, rows, times, cut)

    def load_cuts(self, domain: str) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Of a domain's histories which ones of all they are, int64 [U], and their `cut`, int32 [U, 2].

        Raises:
            DataError: There is no such domain.
        """
        blocks = self.histories()
        stored = np.flatnonzero(blocks.column("domain") == self.domain_number(domain))
        return stored, blocks.column("cut")[stored]

    def histories_of(self, stored: NDArray[np.int64]) -> Histories:
        """Some of all histories, in memory; nothing of the others is read.

        Args:
            stored: Which ones, int64 [U].
        """
        found: dict[str, Any] = self.histories().take(stored, ["user", "domain", _ROWS, _TIMES, "cut"])
        return Histories(found["user"], found["domain"], found["row"], found["time"], found["cut"])

    def load_training(self, domain: str) -> Ragged:
        """Item rows of the training parts of one domain's histories, in memory; the other users have none.

        Raises:
            DataError: There is no such domain.
        """
        blocks = self.histories()
        ours = blocks.column("domain") == self.domain_number(domain)
        return blocks.ragged(_ROWS).prefix(blocks.column("cut")[:, 0] * ours)

    @cached_property
    def _hashes(self) -> NDArray[np.uint64]:
        return self.artifact.load_npy("hashes.npy")

    @cached_property
    def _table(self) -> pa.Table:
        return self.artifact.load_table("items.arrow")

    @cached_property
    def _users(self) -> pa.Table:
        return self.artifact.load_table("users.arrow")

    def _display(self, column: str, rows: Rows) -> list[Any]:
        values: list[Any] = self._table[column].take(np.asarray(rows, dtype=np.int64)).to_pylist()
        return values
