"""What the columns of an item say as text: category path, fields, attributes, chunks of a description."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from qbrec.catalog.encoders.text import FIELDS, normalise


def strings(table: pa.Table, column: str) -> pa.Array:
    """A string column as one array; nulls where the table has no such column."""
    if column not in table.column_names:
        return pa.nulls(table.num_rows, pa.string())
    return table[column].combine_chunks().cast(pa.string())


def category_paths(table: pa.Table) -> pa.Array:
    """Category path of every item, root first, without empty names: list<string> [n], never null."""
    if "categories" not in table.column_names:
        return _lists(pa.array([], pa.string()), np.zeros(0, np.int64), table.num_rows)
    owner, names = flat(table["categories"])
    encoded = names.cast(pa.string()).dictionary_encode()
    # Every name is tidied once, however many items bear it.
    tidy = [(name or "").strip() for name in encoded.dictionary.to_pylist()]
    names = pa.array(tidy, pa.string()).take(encoded.indices)
    kept = pc.fill_null(pc.not_equal(names, ""), False)
    return _lists(names.filter(kept), owner[kept.to_numpy(zero_copy_only=False)], table.num_rows)


def flat(column: pa.ChunkedArray) -> tuple[NDArray[np.int64], pa.Array]:
    """Elements of a list column of any kind: the row of each, int64 [Σ], and the values."""
    array = column.combine_chunks()
    array = array.cast(pa.large_list(array.type.value_type))
    return np.asarray(pc.list_parent_indices(array), dtype=np.int64), pc.list_flatten(array)


def _lists(values: pa.Array, owner: NDArray[np.int64], n: int) -> pa.Array:
    offsets = np.zeros(n + 1, dtype=np.int32)
    np.cumsum(np.bincount(owner, minlength=n), out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), values)


def item_texts(table: pa.Table, paths: pa.Array, attributes: tuple[str, ...] = ()) -> dict[str, pa.Array]:
    """The text fields as they are: title, description, labels (categories and brand), attributes."""
    labels = pc.binary_join_element_wise(
        pc.binary_join(paths, " "), pc.fill_null(strings(table, "brand"), ""), " "
    )
    return {
        "title": strings(table, "title"),
        "description": strings(table, "description"),
        "labels": labels,
        "attributes": attribute_texts(table, attributes),
    }


def attribute_texts(table: pa.Table, attributes: tuple[str, ...]) -> pa.Array:
    """Columns of strings, lists of strings, numbers or truth values as "name: value; name: value".

    Args:
        table: n items; columns it lacks are left out.
        attributes: Names of the columns.

    Returns:
        Strings [n]; null where an item has none of them.
    """
    parts = []
    for name in attributes:
        if name not in table.column_names:
            continue
        if pa.types.is_nested(table[name].type):
            owner, values = flat(table[name])
            kept = values.is_valid()
            lists = _lists(
                values.filter(kept).cast(pa.string()),
                owner[kept.to_numpy(zero_copy_only=False)],
                table.num_rows,
            )
            values = pc.binary_join(lists, ", ")
        else:
            values = strings(table, name)
        values = pc.utf8_trim_whitespace(values)
        values = pc.if_else(pc.equal(values, ""), pa.scalar(None, pa.string()), values)
        # Arrow's null_handling="skip" loses the rows in which everything is null.
        parts.append(pc.fill_null(pc.binary_join_element_wise(f"{name}: ", values, "; ", ""), ""))
    if not parts:
        return pa.nulls(table.num_rows, pa.string())
    joined = pc.utf8_slice_codeunits(pc.binary_join_element_wise(*parts, ""), 0, -2)
    return pc.if_else(pc.equal(joined, ""), pa.scalar(None, pa.string()), joined)


@dataclass(frozen=True)
class TextTokens:
    """The texts of n items that say something, ordered by item, field and place in the description.

    Attributes:
        owner: Item of each, int64 [Σ].
        field: Number of its field in `FIELDS`, int64 [Σ].
        raw: As they are, strings [Σ].
        clean: Normalised, strings [Σ].
    """

    owner: NDArray[np.int64]
    field: NDArray[np.int64]
    raw: pa.Array
    clean: pa.Array


def text_tokens(texts: dict[str, pa.Array], *, description_tokens: int, chunk_characters: int) -> TextTokens:
    """One text per feature token of the items.

    Args:
        texts: Of `item_texts`.
        description_tokens: A description longer than a chunk becomes up to so many tokens; 1: it stays whole.
        chunk_characters: Length of a chunk.
    """
    owners, fields, raws = [], [], []
    for number, name in enumerate(FIELDS):
        owner, raw = np.arange(len(texts[name])), texts[name]
        if name == "description" and description_tokens > 1:
            owner, raw = _chunks(raw, description_tokens, chunk_characters)
        owners.append(owner)
        fields.append(np.full(len(owner), number))
        raws.append(raw.cast(pa.string()))
    raw = pa.concat_arrays(raws)
    owner, field = np.concatenate(owners), np.concatenate(fields)
    there = np.flatnonzero(raw.is_valid().to_numpy(zero_copy_only=False))
    clean = normalise(raw.take(pa.array(there)))
    says = pc.not_equal(clean, "").to_numpy(zero_copy_only=False)
    # Stable: chunks of one description stay in their order.
    order = np.argsort(owner[there[says]], kind="stable")
    chosen = there[says][order]
    return TextTokens(
        owner[chosen],
        field[chosen],
        raw.take(pa.array(chosen)),
        clean.take(pa.array(np.flatnonzero(says)[order])),
    )


def _chunks(texts: pa.Array, most: int, size: int) -> tuple[NDArray[np.int64], pa.Array]:
    """Texts cut between words into at most `most` pieces of `size` characters; what is longer is left off."""
    owners, pieces = [], []
    for owner, text in enumerate(texts.to_pylist()):
        rest, found = text or "", 0
        while rest and found < most:
            end = len(rest) if len(rest) <= size else rest.rfind(" ", 1, size + 1)
            end = end if end > 0 else size
            owners.append(owner)
            pieces.append(rest[:end])
            rest, found = rest[end:].lstrip(), found + 1
    return np.array(owners, dtype=np.int64), pa.array(pieces, pa.string())
