"""From fields of the item blocks to a `FusionBatch`: padding, content numbers, counter-based dropout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qbrec.fusion.model import BEHAVIOUR, STRUCTURE, FusionBatch, ModalitySpec
from qbrec.storage.block_reader import Fields, FieldSpec, RaggedField
from qbrec.storage.hashing import combine64, mix64, uniform
from qbrec.storage.ragged import Ragged


def item_fields(modalities: Sequence[ModalitySpec]) -> list[FieldSpec]:
    """What has to be read from the catalogue's `items` blocks for these modalities."""
    fields: list[FieldSpec] = ["row"]
    for spec in modalities:
        if spec.kind == "bag":
            fields.append(STRUCTURE)
        elif spec.name != BEHAVIOUR:
            fields.append(RaggedField(f"feature.{spec.name}", counts=f"tokens.{spec.name}"))
    return fields


@dataclass(frozen=True)
class Dropout:
    """What is hidden from the fused vector in training; the views of the loss are never hidden.

    Attributes:
        identity: Probability that an item takes the shared query instead of its own ID row.
        modality: Probability that a modality of an item is hidden (never all of them).
        seed: Of the counter-based random stream: the same item in the same epoch draws the same, on any rank
            and after any resume.
    """

    identity: float
    modality: float
    seed: int


class Collator:
    """Makes batches of items.

    Args:
        modalities: The model's, in its order.
        behaviour: Behaviour features by item row, float [N, d]; None: the modality is absent everywhere.
        own_rows: Whether items take their own row of the ID table; else all take the shared query.
        dropout: For training; None: nothing is hidden.
    """

    def __init__(
        self,
        modalities: Sequence[ModalitySpec],
        *,
        behaviour: NDArray[Any] | None,
        own_rows: bool,
        dropout: Dropout | None,
    ) -> None:
        self.modalities, self.behaviour, self.own_rows = tuple(modalities), behaviour, own_rows
        self.dropout = dropout

    def __call__(self, fields: Fields, samples: NDArray[np.int64], epoch: int) -> FusionBatch:
        """Batch of the items in `fields` (see `item_fields`); `samples` and `epoch` key the dropout."""
        rows = fields["row"]
        assert isinstance(rows, np.ndarray)
        features: dict[str, torch.Tensor] = {}
        tokens: dict[str, torch.Tensor] = {}
        buckets = np.full((len(rows), 0), -1, np.int64)
        present, content = [], []
        for spec in self.modalities:
            if spec.kind == "bag":
                stored = fields[STRUCTURE]
                assert isinstance(stored, np.ndarray)
                buckets = stored.astype(np.int64)
                present.append((buckets >= 0).any(1))
                one_each = np.ones(len(rows), np.int64)
                content.append(content_numbers(Ragged.from_lengths(buckets + 1, one_each)))
                continue
            ragged = self._behaviour(rows, spec) if spec.name == BEHAVIOUR else fields[f"feature.{spec.name}"]
            assert isinstance(ragged, Ragged)
            features[spec.name], tokens[spec.name] = _pad(ragged, spec.dim)
            present.append(ragged.lengths > 0)
            content.append(content_numbers(ragged))
        exists = np.stack(present, axis=1)
        query = rows.astype(np.int64) if self.own_rows else np.full(len(rows), -1, np.int64)
        visible = exists
        if self.dropout is not None:
            query, visible = _drop(query, exists, samples, epoch, self.dropout)
        return FusionBatch(
            rows=torch.from_numpy(query),
            features=features,
            tokens=tokens,
            buckets=torch.from_numpy(buckets),
            visible=torch.from_numpy(visible),
            present=torch.from_numpy(exists),
            content=torch.from_numpy(np.stack(content, axis=1)),
        )

    def _behaviour(self, rows: NDArray[np.int64], spec: ModalitySpec) -> Ragged:
        if self.behaviour is None:
            return Ragged(np.zeros((0, spec.dim), np.float16), np.zeros(len(rows) + 1, np.int64))
        vectors = self.behaviour[rows]
        seen = (vectors != 0).any(1)
        return Ragged.from_lengths(vectors[seen], seen.astype(np.int64))


def content_numbers(ragged: Ragged) -> NDArray[np.int64]:
    """A 64-bit hash of each row's feature tokens: equal content has equal numbers; int64 [B].

    Args:
        ragged: values [Σ, d] of any 2- or 8-byte type; the bytes count, and the order of the tokens.
    """
    words = np.ascontiguousarray(ragged.values)
    words = words.view(np.dtype(f"u{words.dtype.itemsize}")).astype(np.uint64)
    with np.errstate(over="ignore"):
        factors = mix64(np.arange(words.shape[1], dtype=np.uint64)) | np.uint64(1)
        token = mix64((words * factors).sum(1, dtype=np.uint64))
        place = np.arange(len(words)) - np.repeat(ragged.offsets[:-1], ragged.lengths)
        running = np.zeros(len(words) + 1, np.uint64)
        np.cumsum(combine64(place.astype(np.uint64), token), out=running[1:])
        return (running[ragged.offsets[1:]] - running[ragged.offsets[:-1]]).view(np.int64)


def _pad(ragged: Ragged, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(int(ragged.lengths.max(initial=0)), 1)
    mask = np.arange(longest) < ragged.lengths[:, None]
    padded = np.zeros((len(ragged), longest, dim), np.float32)
    padded[mask] = ragged.values
    return torch.from_numpy(padded), torch.from_numpy(mask)


def _drop(
    query: NDArray[np.int64],
    exists: NDArray[np.bool_],
    samples: NDArray[np.int64],
    epoch: int,
    dropout: Dropout,
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    counter = combine64(samples.astype(np.uint64), np.array([epoch], np.uint64))
    shared = uniform(counter, stream=dropout.seed) < dropout.identity
    draws = [uniform(counter, stream=dropout.seed + 1 + i) for i in range(exists.shape[1])]
    visible = exists & (np.stack(draws, axis=1) >= dropout.modality)
    bare = ~visible.any(1)
    visible[bare] = exists[bare]
    return np.where(shared, -1, query), visible


def as_fields(
    features: Mapping[str, Ragged],
    structure: NDArray[np.int32] | None,
    modalities: Sequence[ModalitySpec],
    size: int,
) -> Fields:
    """Fields of items that are in no block (appended ones); a modality that is not given is absent."""
    fields: Fields = {"row": np.full(size, -1, np.int64)}
    for spec in modalities:
        if spec.kind == "bag":
            fields[STRUCTURE] = np.full((size, 1), -1, np.int32) if structure is None else structure
        elif spec.name != BEHAVIOUR:
            empty = Ragged(np.zeros((0, spec.dim), np.float16), np.zeros(size + 1, np.int64))
            fields[f"feature.{spec.name}"] = features.get(spec.name, empty)
    return fields
