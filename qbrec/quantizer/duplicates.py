"""Items of equal content, listed apart: they may share an ID, and that is no collision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qbrec.quantizer.ids import LEVELS
from qbrec.quantizer.packing import lex_order
from qbrec.storage.artifact import ArtifactWriter

DUPLICATES = "duplicates.parquet"


def write_duplicates(writer: ArtifactWriter, codes: NDArray[Any], *, group: NDArray[np.int64]) -> None:
    """Write `DUPLICATES`, all items whose content another item has too, retired ones among them.

    Columns `semantic_id` (string, as `ids.id_text` writes it), `item_row` and `group` (int64), by group and
    row.

    Args:
        writer: Of the artifact.
        codes: Final IDs [N, L].
        group: Content group per item int64 [N], each the row of an item.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = np.flatnonzero(np.bincount(group, minlength=1)[group] > 1)
    rows = rows[lex_order(rows, group[rows])]
    table = pa.table({"semantic_id": _texts(codes[rows]), "item_row": rows, "group": group[rows]})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    writer.write_bytes(DUPLICATES, sink.getvalue().to_pybytes())


def _texts(codes: NDArray[Any]) -> Any:
    import pyarrow as pa
    import pyarrow.compute as pc

    def token(name: str, column: NDArray[Any]) -> Sequence[Any]:
        return f"<{name}_", pc.cast(pa.array(column), pa.string()), ">"

    parts = [
        part
        for name, column in zip(LEVELS[: codes.shape[1]], codes.T, strict=True)
        for part in token(name, column)
    ]
    return pc.binary_join_element_wise(*parts, "")
