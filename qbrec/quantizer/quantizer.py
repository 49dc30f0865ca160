"""A fitted quantizer as one thing: vectors in, codes out, and back; what `append` and readers load."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qbrec.quantizer.rvq import Codebooks, decode, encode
from qbrec.storage.artifact import Artifact, ArtifactWriter

CODEBOOKS = "codebooks.safetensors"


@dataclass(frozen=True)
class Quantizer:
    """Frozen standardisation and codebooks.

    Attributes:
        mean: Per dimension of the input, float32 [D].
        std: Per dimension of the input, float32 [D], above 0.
        books: Codebooks.
        beam: Partial IDs kept while encoding; 1: greedy.
    """

    mean: Tensor
    std: Tensor
    books: Codebooks
    beam: int = 1

    @property
    def sizes(self) -> tuple[int, ...]:
        """Codes per level."""
        return self.books.sizes

    def latents(self, vectors: Tensor) -> Tensor:
        """Where codes are looked for: standardised vectors, float [n, D] -> float32 [n, D]."""
        return (vectors.float() - self.mean) / self.std

    def encode(self, vectors: Tensor) -> Tensor:
        """Codes int64 [n, L] of vectors float [n, D]."""
        return encode(self.latents(vectors).contiguous(), self.books, beam=self.beam)

    def decode(self, codes: Tensor) -> Tensor:
        """Vectors float32 [n, D] of codes int64 [n, <= L]; fewer columns decode a prefix."""
        return decode(codes, self.books) * self.std + self.mean

    def save(self, writer: ArtifactWriter) -> None:
        """Write `CODEBOOKS`: `level.<l>` float32 [K_l, D], `mean`, `std` float32 [D]."""
        tensors = {f"level.{level}": book for level, book in enumerate(self.books.levels)}
        writer.save_safetensors(CODEBOOKS, {**tensors, "mean": self.mean, "std": self.std})

    @classmethod
    def load(cls, artifact: Artifact, *, device: torch.device | str = "cpu") -> Quantizer:
        """The quantizer of an artifact of kind `quantizer`.

        Raises:
            DataError: A file is missing or damaged.
        """
        stored = {name: t.to(device) for name, t in artifact.load_safetensors(CODEBOOKS).items()}
        depth = sum(name.startswith("level.") for name in stored)
        books = Codebooks(tuple(stored[f"level.{level}"] for level in range(depth)))
        return cls(stored["mean"], stored["std"], books, beam=int(artifact.meta["beam"]))
