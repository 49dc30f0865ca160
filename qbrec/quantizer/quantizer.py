"""A fitted quantizer as one thing: vectors in, codes out, and back; what `append` and readers load."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qbrec.quantizer.autoencoder import AutoEncoder
from qbrec.quantizer.rvq import Codebooks, decode, encode
from qbrec.storage.artifact import Artifact, ArtifactWriter

CODEBOOKS, NETWORK = "codebooks.safetensors", "autoencoder.safetensors"


@dataclass(frozen=True)
class Quantizer:
    """Frozen standardisation, auto-encoder (method `rqvae`) and codebooks.

    Attributes:
        mean: Per dimension of the input, float32 [D].
        std: Per dimension of the input, float32 [D], above 0.
        books: Codebooks.
        beam: Partial IDs kept while encoding; 1: greedy.
        network: Around the codebooks; None: they quantise the standardised vectors themselves.
    """

    mean: Tensor
    std: Tensor
    books: Codebooks
    beam: int = 1
    network: AutoEncoder | None = None

    @property
    def sizes(self) -> tuple[int, ...]:
        """Codes per level."""
        return self.books.sizes

    def latents(self, vectors: Tensor) -> Tensor:
        """Where codes are looked for: float [n, D] -> float32 [n, d], d = D without a network."""
        standardised = (vectors.float() - self.mean) / self.std
        return standardised if self.network is None else self.network.encode(standardised)

    def encode(self, vectors: Tensor) -> Tensor:
        """Codes int64 [n, L] of vectors float [n, D]."""
        return encode(self.latents(vectors).contiguous(), self.books, beam=self.beam)

    def decode(self, codes: Tensor) -> Tensor:
        """Vectors float32 [n, D] of codes int64 [n, <= L]; fewer columns decode a prefix."""
        return self.standardised(decode(codes, self.books)) * self.std + self.mean

    def standardised(self, latents: Tensor) -> Tensor:
        """From latents float32 [n, d] back to standardised vectors float32 [n, D]."""
        return latents if self.network is None else self.network.decode(latents)

    def save(self, writer: ArtifactWriter) -> None:
        """Write `CODEBOOKS`: `level.<l>` float32 [K_l, d], `mean`, `std` float32 [D]; and the network."""
        tensors = {f"level.{level}": book for level, book in enumerate(self.books.levels)}
        writer.save_safetensors(CODEBOOKS, {**tensors, "mean": self.mean, "std": self.std})
        if self.network is not None:
            writer.save_safetensors(NETWORK, {k: v.float() for k, v in self.network.state_dict().items()})

    @classmethod
    def load(cls, artifact: Artifact, *, device: torch.device | str = "cpu") -> Quantizer:
        """The quantizer of an artifact of kind `quantizer`.

        Raises:
            DataError: A file is missing or damaged.
        """
        stored = {name: t.to(device) for name, t in artifact.load_safetensors(CODEBOOKS).items()}
        depth = sum(name.startswith("level.") for name in stored)
        books = Codebooks(tuple(stored[f"level.{level}"] for level in range(depth)))
        network = None
        if artifact.has(NETWORK):
            shape = artifact.meta["network"]
            network = AutoEncoder(shape["width"], hidden=shape["hidden"], latent=shape["latent"])
            network.load_state_dict(artifact.load_safetensors(NETWORK))
            network.to(device).eval()
        return cls(stored["mean"], stored["std"], books, beam=int(artifact.meta["beam"]), network=network)
