"""The network around the codebooks of `rqvae`: vectors to latents and back, and its training loss."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from qbrec.quantizer.kmeans.chunks import parallel
from qbrec.quantizer.kmeans.kernels.gemm import tile_rows

Gradient = Literal["rotation", "straight_through"]


class AutoEncoder(nn.Module):
    """Two mirrored perceptrons: D -> hidden … -> d and back.

    Args:
        width: D, of the standardised input.
        hidden: Widths of the hidden layers, from the input inwards.
        latent: d.
    """

    def __init__(self, width: int, *, hidden: Sequence[int], latent: int) -> None:
        super().__init__()
        sizes = [width, *hidden, latent]
        self.shape = {"width": width, "hidden": list(hidden), "latent": latent}
        self.encoder = _perceptron(sizes)
        self.decoder = _perceptron(sizes[::-1])

    def encode(self, x: Tensor) -> Tensor:
        """float32 [n, D] -> float32 [n, d]; the same bits for any number of threads."""
        return _by_tiles(self.encoder, x)

    def decode(self, z: Tensor) -> Tensor:
        """float32 [n, d] -> float32 [n, D]; the same bits for any number of threads."""
        return _by_tiles(self.decoder, z)


def _perceptron(sizes: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


def _by_tiles(layers: nn.Module, x: Tensor) -> Tensor:
    size = tile_rows(x.device)
    parts: list[Tensor] = [torch.empty(0)] * -(-len(x) // size)

    def body(tiles: range) -> None:
        with torch.no_grad():  # here: what holds in the caller's thread does not hold in this one
            for t in tiles:
                rows = x[t * size : (t + 1) * size]
                # The same shape for every GEMM: a kernel for a short tail may round differently.
                padded = nn.functional.pad(rows, (0, 0, 0, size - len(rows)))
                parts[t] = layers(padded)[: len(rows)]

    parallel(len(parts), body, device=x.device)
    if parts:
        return torch.cat(parts)
    with torch.no_grad():
        empty: Tensor = layers(x)
    return empty


class Reconstruction(nn.Module):
    """What the warm-up trains: the auto-encoder without codebooks.

    Args:
        network: It.
    """

    def __init__(self, network: AutoEncoder) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Squared error per dimension, summed over rows float32 [b, D]."""
        again: Tensor = self.network.decoder(self.network.encoder(x))
        return (again - x).square().mean(1).sum()


class QuantizedReconstruction(nn.Module):
    """What is trained after the warm-up: the auto-encoder through its codebooks (RQ-VAE, Lee et al. 2022).

    Codebooks are parameters: their gradient is that of the distance to the residuals they were chosen for,
    averaged over the ranks by the engine like any other, so nothing has to be kept exact beside it.

    Args:
        network: The auto-encoder.
        levels: Codebooks float32 [K_l, d] to start from.
        beta: Weight of the commitment: how much residuals are drawn to their codes.
        gradient: How it passes the choice of codes, see `rotate` and `straight_through`.
    """

    def __init__(
        self, network: AutoEncoder, levels: Sequence[Tensor], *, beta: float, gradient: Gradient
    ) -> None:
        super().__init__()
        self.network = network
        for index, level in enumerate(levels):
            # Its own parameters, not those of a list that is never called: ZeRO-3 gathers what a call needs.
            self.register_parameter(f"level_{index}", nn.Parameter(level.clone()))
        self.depth, self.beta, self.gradient = len(levels), beta, gradient

    @property
    def levels(self) -> list[Tensor]:
        """Codebooks float32 [K_l, d]."""
        return [getattr(self, f"level_{index}") for index in range(self.depth)]

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction, codebook and commitment losses, summed over rows float32 [b, D]."""
        latent: Tensor = self.network.encoder(x)
        residual, total = latent, torch.zeros_like(latent)
        loss = latent.new_zeros(())
        for level in self.levels:
            half = 0.5 * level.detach().square().sum(1)
            chosen = level[(residual.detach() @ level.detach().t() - half).argmax(1)]
            loss = loss + (residual.detach() - chosen).square().mean(1).sum()
            loss = loss + self.beta * (residual - chosen.detach()).square().mean(1).sum()
            total = total + chosen
            residual = residual - chosen.detach()
        passed = rotate(latent, total) if self.gradient == "rotation" else straight_through(latent, total)
        again: Tensor = self.network.decoder(passed)
        return loss + (again - x).square().mean(1).sum()


def straight_through(latent: Tensor, quantised: Tensor) -> Tensor:
    """`quantised` going forward, the identity of `latent` [b, d] going back (Bengio et al. 2013)."""
    return latent + (quantised - latent).detach()


def rotate(latent: Tensor, quantised: Tensor) -> Tensor:
    """`quantised` going forward; going back, gradients are turned and scaled as `latent` was to get there.

    The rotation trick (Fifty et al. 2024, arXiv 2410.06424): gradients keep their angle to the code.

    Args:
        latent: float [b, d].
        quantised: float [b, d].
    """
    length = latent.norm(dim=1, keepdim=True).clamp(min=1e-6)
    scale = (quantised.norm(dim=1, keepdim=True) / length).detach()
    source = (latent / length).detach()
    target = nn.functional.normalize(quantised, dim=1).detach()
    between = nn.functional.normalize(source + target, dim=1).detach()
    turned = (
        latent
        - 2 * between * (between * latent).sum(1, keepdim=True)
        + 2 * target * (source * latent).sum(1, keepdim=True)
    )
    out: Tensor = scale * turned
    # Rounding, and opposite vectors, for which there is no one rotation: the value is exact all the same.
    return out + (quantised - out).detach()
