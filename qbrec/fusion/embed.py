"""A trained fusion network at work: item features in, fused vectors out, for old items and new ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qbrec.engine.rows import StoredRows
from qbrec.errors import DataError
from qbrec.fusion.batches import Collator, as_fields
from qbrec.fusion.model import BEHAVIOUR, FusionBatch, FusionModel, ModalitySpec
from qbrec.storage.artifact import Artifact
from qbrec.storage.ragged import Ragged

CHUNK = 2048  # items per forward: a block of the fused tars

FetchRows = Callable[[Tensor], Tensor]


class FusionEncoder:
    """Frozen fusion network that embeds items of any origin.

    Args:
        model: Trained network.
        device: Where it runs.
        own: Gives the ID rows float [n, D] of rows int64 [n]; None: there is no table, or it is not wanted.
    """

    def __init__(
        self, model: FusionModel, *, device: torch.device | str = "cpu", own: FetchRows | None = None
    ) -> None:
        self.model, self.device, self.own = model.to(device).eval(), torch.device(device), own
        self._collate = Collator(model.modalities, behaviour=None, own_rows=False, dropout=None)

    @classmethod
    def load(
        cls, artifact: Artifact, *, own_rows: bool = False, device: torch.device | str = "cpu"
    ) -> FusionEncoder:
        """The network of a fusion artifact.

        Args:
            artifact: Of kind `fusion`.
            own_rows: Read the ID rows of the items it was trained on as well: needed only to fuse those
                again.
            device: Where it runs.

        Raises:
            DataError: A file of the artifact is missing or damaged.
        """
        meta = artifact.meta
        model = FusionModel(
            [ModalitySpec(m["name"], m["kind"], m["dim"]) for m in meta["modalities"]],
            width=meta["width"],
            depth=meta["depth"],
            heads=meta["heads"],
            alignment_temperature=meta["alignment_temperature"],
            gated=meta["gated"],
            hashed_rows=meta["id_embedding"] == "hashed",
            statistics=artifact.load_safetensors("statistics.safetensors"),
        )
        model.load_state_dict(artifact.load_safetensors("model.safetensors"))
        own = StoredRows(artifact) if own_rows and meta["id_embedding"] == "table" else None
        return cls(model, device=device, own=own)

    def embed(
        self, features: Mapping[str, Ragged], *, size: int, structure: NDArray[np.int32] | None = None
    ) -> tuple[NDArray[np.float16], NDArray[np.uint8]]:
        """Fuse items the network has never seen (cold start, append): shared query, no behaviour.

        Args:
            features: Per modality float16 tokens, Ragged of length B with values [Σ, d]; an item without
                tokens, or a modality that is not given, counts as missing.
            size: B.
            structure: Hashed buckets int32 [B, S], -1 for none; None: no item has a structure.

        Returns:
            fused float16 [B, D] and depth uint8 [B].

        Raises:
            DataError: A modality is unknown to the network or has another width.
        """
        self._check(features, size)
        fused, depths = [], []
        for begin in range(0, size, CHUNK):
            end = min(begin + CHUNK, size)
            part = {name: ragged.slice(begin, end) for name, ragged in features.items()}
            buckets = None if structure is None else structure[begin:end]
            fields = as_fields(part, buckets, self.model.modalities, end - begin)
            vectors, depth = self.embed_batch(self._collate(fields, np.arange(end - begin), 0))
            fused.append(vectors)
            depths.append(depth)
        if not fused:
            return np.zeros((0, self.model.width), np.float16), np.zeros(0, np.uint8)
        return np.concatenate(fused), np.concatenate(depths)

    def embed_batch(self, batch: FusionBatch) -> tuple[NDArray[np.float16], NDArray[np.uint8]]:
        """Fused float16 [B, D] and depth uint8 [B] of a collated batch."""
        batch = batch.to(self.device)
        if self.own is not None:
            query = torch.zeros(len(batch.rows), self.model.width, device=self.device)
            known = batch.rows >= 0
            query[known] = self.own(batch.rows[known]).to(self.device)
            batch = replace(batch, own=query)
        fused, depth, _ = self.model.embed(batch)
        return fused.half().cpu().numpy(), depth.cpu().numpy()

    def _check(self, features: Mapping[str, Ragged], size: int) -> None:
        known = {s.name: s.dim for s in self.model.modalities if s.kind == "dense" and s.name != BEHAVIOUR}
        for name, ragged in features.items():
            if name not in known:
                raise DataError(
                    f"the fusion network has no modality {name!r}",
                    where="features of the items to embed",
                    fix=f"it was trained on: {', '.join(sorted(known)) or 'none'}",
                )
            if ragged.values.ndim != 2 or ragged.values.shape[1] != known[name]:
                raise DataError(
                    f"{name} features have shape {list(ragged.values.shape)}, not [tokens, {known[name]}]",
                    where="features of the items to embed",
                    fix="encode them with the encoder of the catalogue the network was trained on",
                )
            assert len(ragged) == size


@torch.no_grad()
def retrieval(
    fused: Tensor, views: Tensor, batch: FusionBatch, modalities: Sequence[ModalitySpec]
) -> dict[str, float]:
    """Alignment accuracy: how often the view nearest to an item's fused vector is its own (or equal content).

    Args:
        fused: [B, D].
        views: [M, B, D].
        batch: Where presence and content numbers come from.
        modalities: The model's.

    Returns:
        `retrieval/<modality>`: share of hits among the items that have it, for the modalities that any has.
    """
    found: dict[str, float] = {}
    unit = torch.nn.functional.normalize(fused.float(), dim=-1)
    for index, (spec, view) in enumerate(zip(modalities, views, strict=True)):
        have = batch.present[:, index]
        if not have.any():
            continue
        cosine = unit[have] @ torch.nn.functional.normalize(view[have].float(), dim=-1).T
        content = batch.content[have, index]
        found[f"retrieval/{spec.name}"] = float((content[cosine.argmax(1)] == content).float().mean())
    return found
