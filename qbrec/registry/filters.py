"""What requests may be narrowed to: categories of the catalogue, or a list of item ids."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qbrec.errors import DataError

if TYPE_CHECKING:
    from qbrec.storage.generations import GenerationsView

_CHUNK = 500_000  # rows whose category paths are in memory at once
_SUGGEST_FROM = 20_000


def in_categories(
    catalog: GenerationsView, rows: NDArray[np.int64], categories: Sequence[str], *, num_items: int
) -> NDArray[np.bool_]:
    """Which items have one of the categories in their path, as they are now.

    Args:
        catalog: The catalogue and its generations.
        rows: Items asked about, int64 [n].
        categories: Names, as in the input's `categories`.
        num_items: N.

    Returns:
        bool [N], False for items not asked about.

    Raises:
        DataError: No item asked about is in one of them.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    mask, missing, known = np.zeros(num_items, bool), set(categories), set[str]()
    wanted = pa.array(list(categories), pa.string())
    for begin in range(0, len(rows), _CHUNK):
        part = rows[begin : begin + _CHUNK]
        table = catalog.display(part)
        if "categories" not in table.column_names:
            continue
        paths = table["categories"].combine_chunks()
        names, owners = pc.list_flatten(paths), pc.list_parent_indices(paths)
        hit = pc.is_in(names, value_set=wanted)
        mask[part[np.asarray(owners.filter(hit))]] = True
        missing -= set(pc.unique(names.filter(hit)).to_pylist())
        if missing and len(known) < _SUGGEST_FROM:
            known |= set(pc.unique(names).to_pylist())
    if missing:
        unknown = min(missing)
        near = difflib.get_close_matches(unknown, sorted(name for name in known if name), n=3, cutoff=0.5)
        raise DataError(
            f"no item on offer is in the category {unknown!r}",
            where="category",
            fix=f"did you mean {', '.join(map(repr, near))}?"
            if near
            else "use a category of the items' paths",
        )
    return mask


def with_ids(
    catalog: GenerationsView, item_ids: Sequence[str], domain: str, *, num_items: int
) -> NDArray[np.bool_]:
    """Which items are named, bool [N]; items beyond N, which have no semantic ID yet, are left out.

    Raises:
        DataError: The catalogue does not have one of them.
    """
    rows = np.asarray(catalog.lookup(list(item_ids), domain))
    if (rows < 0).any():
        raise DataError(
            f"unknown item id {item_ids[int(np.flatnonzero(rows < 0)[0])]!r} in domain {domain!r}",
            where="filter",
            fix="use item ids of the catalogue that was trained on, or appended to it",
        )
    rows = catalog.representatives(rows)  # of near-duplicates one listing stands for all
    mask = np.zeros(num_items, bool)
    mask[rows[rows < num_items]] = True
    return mask


def read_ids(path: str | Path) -> list[str]:
    """Item ids of a text file, one a line; empty lines do not count.

    Raises:
        DataError: The file cannot be read or holds none.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"the list of items cannot be read: {error}",
            where=str(path),
            fix="give a text file, one id a line",
        ) from error
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise DataError("the list of items is empty", where=str(path), fix="write one item id a line")
    return found
