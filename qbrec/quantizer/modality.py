"""Codes of single modalities beside the joint semantic ID: what encodes them, and their figures.

The joint ID stays the identity of an item; these codes are further tokens for stage 3, which then ranks with
both (as MQL4GRec and MACRec do). An item without a modality has the code "absent", K, at its every level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qbrec.quantizer.quality import level_usage
from qbrec.quantizer.rvq import Codebooks, encode
from qbrec.storage.artifact import Artifact, ArtifactWriter
from qbrec.storage.ragged import Ragged
from qbrec.storage.token_table import MODALITY_CODES, codebooks_file


@dataclass(frozen=True)
class ModalityQuantizer:
    """Frozen standardisation and codebooks of one modality: feature tokens in, codes out.

    Attributes:
        name: As the catalogue calls it.
        mean: Per dimension over the items that have it, float32 [D_m].
        std: Per dimension over the items that have it, float32 [D_m], above 0.
        books: Codebooks, without the code for items that lack the modality.
        beam: Partial codes kept while encoding; 1: greedy.
    """

    name: str
    mean: Tensor
    std: Tensor
    books: Codebooks
    beam: int = 1

    @property
    def sizes(self) -> tuple[int, ...]:
        """Codes per level, K_l + 1: the last one is for items that lack the modality."""
        return tuple(size + 1 for size in self.books.sizes)

    def encode(self, features: Ragged) -> Tensor:
        """Codes int64 [n, L_m] of n items by their feature tokens, float rows of D_m."""
        x = torch.from_numpy(mean_tokens(features)).to(self.mean.device)
        x -= self.mean
        x /= self.std
        codes = encode(x, self.books, beam=self.beam)
        return mark_absent(codes, torch.from_numpy(features.lengths > 0), self.books.sizes)

    def save(self, writer: ArtifactWriter) -> None:
        """Write `level.<l>` float32 [K_l, D_m], `mean`, `std` float32 [D_m]."""
        tensors = {f"level.{level}": book for level, book in enumerate(self.books.levels)}
        writer.save_safetensors(codebooks_file(self.name), {**tensors, "mean": self.mean, "std": self.std})

    @classmethod
    def load(cls, artifact: Artifact, name: str, *, device: torch.device | str = "cpu") -> ModalityQuantizer:
        """One modality's quantizer of an artifact of kind `quantizer`.

        Raises:
            DataError: The file is missing or damaged.
        """
        stored = {key: t.to(device) for key, t in artifact.load_safetensors(codebooks_file(name)).items()}
        depth = sum(key.startswith("level.") for key in stored)
        books = Codebooks(tuple(stored[f"level.{level}"] for level in range(depth)))
        return cls(name, stored["mean"], stored["std"], books, beam=int(artifact.meta["beam"]))


@dataclass(frozen=True)
class FittedModalities:
    """All further modalities of a quantizer, in the order of the configuration.

    Attributes:
        quantizers: One per modality.
        codes: Of all items, unsigned [N, Σ L_m].
        errors: Per modality the squared error of held-out items after 0, 1, … L_m levels.
    """

    quantizers: tuple[ModalityQuantizer, ...]
    codes: NDArray[np.unsignedinteger[Any]]
    errors: tuple[Tensor, ...]

    def save(self, writer: ArtifactWriter) -> None:
        """Write `modality_codes.npy` and one file of codebooks per modality; nothing where there is none."""
        if self.quantizers:
            writer.save_npy(MODALITY_CODES, self.codes)
        for quantizer in self.quantizers:
            quantizer.save(writer)

    def meta(self) -> list[dict[str, Any]]:
        """Name and codes per level of every modality, in the order of the columns."""
        return [{"name": q.name, "levels": list(q.sizes)} for q in self.quantizers]

    def figures(self) -> dict[str, Any]:
        """For quality.json: usage and held-out R² per level over the items that have the modality."""
        out: dict[str, Any] = {}
        first = 0
        for quantizer, errors in zip(self.quantizers, self.errors, strict=True):
            sizes = quantizer.books.sizes
            codes = self.codes[:, first : first + len(sizes)]
            codes = codes[codes[:, 0] < sizes[0]]
            levels = level_usage(codes, sizes)
            for level, figures in enumerate(levels):
                figures["r2_held_out"] = 1.0 - float(errors[level + 1]) / max(float(errors[0]), 1e-300)
            out[quantizer.name] = {"present": len(codes), "levels": levels}
            first += len(sizes)
        return out


def mean_tokens(features: Ragged) -> NDArray[np.float32]:
    """Mean feature token of every item, float32 [n, D]; zeros where it has none."""
    out = np.zeros((len(features), features.values.shape[1]), np.float32)
    have = features.lengths > 0
    if have.any():
        # Items without tokens take no values, so the starts of the others cut all values into theirs.
        sums = np.add.reduceat(features.values.astype(np.float32), features.offsets[:-1][have], axis=0)
        out[have] = sums / features.lengths[have, None].astype(np.float32)
    return out


def mark_absent(codes: Tensor, present: Tensor, sizes: Sequence[int]) -> Tensor:
    """Codes int64 [n, L_m], where `present` bool [n] is False replaced by the code K_l of the level."""
    absent = torch.tensor(list(sizes), dtype=torch.int64, device=codes.device)
    return torch.where(present.to(codes.device)[:, None], codes, absent)
