"""Semantic IDs of a generation by the frozen codebooks: an artifact of the kind `id_generation`.

    semantic_ids.npy [n, L]     of the new items, in the order of their rows, in the type of the catalogue's
    raw_codes.npy [n, L]        as encoded
    modality_codes.npy          codes of single modalities, where the quantizer has such
    drift.json                  how far the new items are from what the codebooks were fitted on

Changed items keep their ID: it was published.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from qbrec.config.root import RootConfig
from qbrec.engine.context import StageContext
from qbrec.errors import DataError
from qbrec.quantizer.append.beside import Placed, Taken, place_beside
from qbrec.quantizer.append.drift import drift_figures, encode_rows
from qbrec.quantizer.modality import ModalityQuantizer
from qbrec.quantizer.quantizer import Quantizer
from qbrec.quantizer.rvq import residual_before
from qbrec.quantizer.vectors import take_fused
from qbrec.storage.artifact import Artifact
from qbrec.storage.blocks import BlockSet
from qbrec.storage.generations import GenerationsView
from qbrec.storage.id_table import GENERATION, IDS, IdTable, numbered
from qbrec.storage.ragged import Ragged
from qbrec.storage.token_table import MODALITY_CODES, SEMANTIC_IDS

Ints = NDArray[np.int64]


def run(ctx: StageContext, config: RootConfig, inputs: Mapping[str, Artifact]) -> Artifact:
    """Give the new items of the last of the generations their IDs; one rank.

    Args:
        ctx: Device and storage.
        config: `quantizer.collisions`, `quantizer.capacity` and `quantizer.quality.max_drift` count.
        inputs: `catalog`, `generation-1` … `generation-n`, `quantizer`, `fused` (what the fusion network made
            of generation n), `ids-1` … `ids-(n - 1)`.

    Raises:
        ConfigError: Policy `digit`, and an ID has no digit left.
        DataError: A fused vector is not finite, or a file is damaged.
    """
    view = GenerationsView(inputs["catalog"], numbered(inputs, GENERATION))
    table = IdTable(inputs["quantizer"], numbered(inputs, IDS))
    generation, fused = view.generations[-1], inputs["fused"]
    first, count = generation.first_row, generation.num_added
    assert table.num_items == first, "earlier generations have their IDs"
    quantizer = Quantizer.load(inputs["quantizer"], device=ctx.device)
    blocks = BlockSet.open(fused, "fused") if count else None
    vectors = _new_vectors(blocks, first, count, width=len(quantizer.mean))
    new = encode_rows(quantizer, vectors)
    reference = encode_rows(quantizer, _finite(fused.load_npy("reference.fused.npy"), fused))
    drift = drift_figures(new, reference, max_drift=config.quantizer.quality.max_drift)
    raw = new[0]

    def residuals(rows: Ints, codes: NDArray[Any]) -> Tensor:
        assert blocks is not None
        latents = quantizer.latents(take_fused(blocks, rows, ctx.device))
        return residual_before(len(quantizer.sizes) - 1, latents, codes, quantizer.books)

    placed = Placed(np.empty((0, len(table.sizes)), table.codes.dtype), 0, 0, 0)
    if count:
        content = contents(view)
        # Nobody is ever shown a collapsed item: its ID takes no room.
        live = np.ones(first, dtype=bool)
        live[: view.base.num_items] = ~np.asarray(view.base.retired)
        placed = place_beside(
            raw,
            content[first:],
            taken=Taken(table.codes[live], content[:first][live]),
            sizes=table.sizes,
            quantizer=quantizer,
            config=config.quantizer,
            residuals=residuals,
        )
    writer = ctx.writer()
    writer.save_npy(SEMANTIC_IDS, placed.codes)
    writer.save_npy("raw_codes.npy", raw)
    further = _modality_codes(view, inputs["quantizer"])
    if further is not None:
        writer.save_npy(MODALITY_CODES, further)
    writer.save_json("drift.json", drift)
    meta: dict[str, Any] = {
        "parent": [inputs["quantizer"], *numbered(inputs, IDS)][-1].fingerprint,
        "first_row": first,
        "num_added": count,
        "levels": list(table.sizes),
        "shared": placed.shared,
        "moved": placed.moved,
        "unresolved": placed.unresolved,
        "drift": drift,
    }
    return ctx.commit(writer, meta=meta, inputs=inputs)


def _finite(reference: NDArray[np.float16], fused: Artifact) -> NDArray[np.float16]:
    """The rows of the reference that can be measured against."""
    kept = reference[np.isfinite(reference).all(1)]
    if not len(kept):
        raise DataError(
            "no item of the catalogue has a finite vector when fused as an appended one",
            where=str(fused.path),
            fix="train the run anew with compute.precision=float32",
        )
    return kept


def contents(view: GenerationsView) -> Ints:
    """Content of every row as it was when the row was added, what its ID was made of; int64 [N]."""
    parts = [view.base.items().column("content")]
    for number, generation in enumerate(view.generations, 1):
        if generation.num_added:
            parts.append(view.new_blocks(number)[0].column("content"))
    return np.concatenate(parts)


def _modality_codes(view: GenerationsView, quantizer: Artifact) -> NDArray[Any] | None:
    """Codes [n, Σ L_m] of the new items' single modalities; None where the quantizer has none."""
    names = [entry["name"] for entry in quantizer.meta.get("modalities", [])]
    if not names:
        return None
    table = quantizer.load_npy(MODALITY_CODES)
    out: NDArray[Any] = np.empty((view.generations[-1].num_added, table.shape[1]), table.dtype)
    blocks = view.new_blocks(len(view.generations))[0] if len(out) else None
    frozen = [ModalityQuantizer.load(quantizer, name) for name in names]
    for block in range(blocks.num_blocks if blocks is not None else 0):
        assert blocks is not None
        codes = []
        for one in frozen:
            tokens, counts = (blocks.view(block, f"{part}.{one.name}") for part in ("feature", "tokens"))
            codes.append(one.encode(Ragged.from_lengths(tokens, counts.astype(np.int64))).cpu().numpy())
        out[blocks.starts[block] : blocks.starts[block + 1]] = np.concatenate(codes, axis=1)
    return out


def _new_vectors(blocks: BlockSet | None, first: int, count: int, *, width: int) -> NDArray[np.float16]:
    """Fused vectors of the new items, float16 [count, D]; they stand before the changed ones."""
    if blocks is None:
        return np.zeros((0, width), np.float16)
    assert (blocks.column("row", 0, count) == np.arange(first, first + count)).all()
    fused: NDArray[np.float16] = blocks.column("fused", 0, count)
    bad = np.flatnonzero(~np.isfinite(fused).all(1))
    if len(bad):
        raise DataError(
            f"the fused vector of item row {first + int(bad[0])} is not finite",
            where=f"artifact {blocks.fingerprint[:16]}",
            fix="look at the features of that item: are their numbers those of the catalogue's encoder?",
        )
    return fused
