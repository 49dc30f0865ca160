"""Counter-based randomness on the device: hashes of 64-bit counters, in torch's int64."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor


def signed(value: int) -> int:
    """The 64 bits of `value` as int64, because torch has no arithmetic on uint64."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


GOLDEN, _MIX_1, _MIX_2 = (
    signed(constant) for constant in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


def mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser (Steele et al. 2014) of int64 numbers."""
    # int64 multiplication wraps as it should; shifts are made logical by masking.
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _MIX_1
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _MIX_2
    return x ^ ((x >> 31) & ((1 << 33) - 1))


@functools.cache
def stream(seed: int, epoch: int, purpose: int) -> int:
    """Key of one stream of randomness: `mix` on the host, because a tensor of one number is slow to make."""

    def mixed(x: int) -> int:
        x &= (1 << 64) - 1
        x = (x ^ (x >> 30)) * (_MIX_1 % (1 << 64)) & ((1 << 64) - 1)
        x = (x ^ (x >> 27)) * (_MIX_2 % (1 << 64)) & ((1 << 64) - 1)
        return x ^ (x >> 31)

    return signed(mixed(mixed(seed + GOLDEN) + epoch * GOLDEN + purpose))


def uniform(samples: Tensor, *, seed: int, epoch: int, purpose: int, index: Tensor | int = 0) -> Tensor:
    """Uniform numbers in [0, 1), a pure function of the arguments, the same on every device.

    Args:
        samples: int64 [n], global sample ids.
        seed: Seed of the stage.
        epoch: Epoch, from 0.
        purpose: Number of the decision about a sample; separate decisions take separate streams.
        index: int64 [n] or one int: which draw of this sample and purpose (its position, say).

    Returns:
        float32 [n], multiples of 2^-24.
    """
    key = mix(mix(samples * GOLDEN + 1) ^ stream(seed, epoch, purpose))
    step = signed((index + 1) * GOLDEN) if isinstance(index, int) else (index + 1) * GOLDEN
    bits = mix(key + step)
    # The top 24 bits are exact in float32, so CPU and GPU agree to the bit.
    return ((bits >> 40) & ((1 << 24) - 1)).to(torch.float32) * 2.0**-24


def hashed_normal(rows: Tensor, width: int) -> Tensor:
    """Vectors that are N(0, 1) and a pure function of the row, in every process and on every device.

    Args:
        rows: int64 [B].
        width: D.

    Returns:
        float32 [B, D].
    """
    place = torch.arange(-(-width // 2), device=rows.device)
    bits = mix(mix(rows * GOLDEN + 1)[:, None] + place * GOLDEN)
    # Box-Muller (1958) over two uniform numbers of 24 bits each, which float32 holds exactly.
    first = ((bits >> 40) & 0xFFFFFF).to(torch.float32).add(1.0) * 2.0**-24
    angle = ((bits >> 8) & 0xFFFFFF).to(torch.float32) * (2.0**-24 * 2 * math.pi)
    length = (-2 * first.log()).sqrt()
    return torch.cat([length * angle.cos(), length * angle.sin()], dim=1)[:, :width]
