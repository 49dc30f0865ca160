"""How far appended items are from what the codebooks were fitted on: when to fit them anew.

Items of the catalogue were fused with their own ID rows and their behaviour, appended ones with the shared
query and without behaviour, so their errors cannot be compared as they are. Like is compared with like: the
reference is a sample of the catalogue's items, fused once more as if they had been appended (`reference.*` of
the fused generation), then encoded and measured exactly as the new ones are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qbrec.quantizer.packing import code_dtype
from qbrec.quantizer.quantizer import Quantizer

QUANTILE = 0.95
_ROWS = 65_536  # encoded at once


def encode_rows(quantizer: Quantizer, fused: NDArray[np.float16]) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Codes of fused vectors and what the codes lose.

    Args:
        quantizer: Frozen.
        fused: float16 [n, D].

    Returns:
        Codes, the smallest unsigned type [n, L]; squared error per dimension of the standardised vectors,
        float32 [n].
    """
    raw = np.empty((len(fused), len(quantizer.sizes)), code_dtype(quantizer.sizes))
    errors = np.empty(len(fused), np.float32)
    for begin in range(0, len(fused), _ROWS):
        part = slice(begin, begin + _ROWS)
        vectors = torch.from_numpy(np.array(fused[part])).float().to(quantizer.mean.device)
        codes = quantizer.encode(vectors)
        raw[part] = codes.cpu().numpy()
        errors[part] = _errors(quantizer, vectors, codes).cpu().numpy()
    return raw, errors


def _errors(quantizer: Quantizer, vectors: Tensor, codes: Tensor) -> Tensor:
    return (((vectors - quantizer.decode(codes)) / quantizer.std) ** 2).mean(1)


def drift_figures(
    new: tuple[NDArray[Any], NDArray[np.float32]],
    reference: tuple[NDArray[Any], NDArray[np.float32]],
    *,
    max_drift: float,
) -> dict[str, Any]:
    """What drift.json says.

    Args:
        new: Codes [n, L] and errors float32 [n] of the new items, by row: in the order of a hash, so that the
            first ones are a random sample.
        reference: The same of the reference, at least one row.
        max_drift: Threshold of `drift`.

    Returns:
        `num_new`, `num_reference`, `max_drift`, `refit` (whether `drift` exceeds it), and, unless there is no
        new item: `error_new`, `error_reference` (means), `drift` (the first over the second),
        `share_beyond` (new items whose error exceeds the 95th percentile of the reference's; 0.05 without
        drift), and `perplexity_new` and `perplexity_reference` of the codes at level 0, both over the first
        `perplexity_items` items: perplexity grows with the number of items.
    """
    figures: dict[str, Any] = {
        "num_new": len(new[0]),
        "num_reference": len(reference[0]),
        "max_drift": max_drift,
        "refit": False,
    }
    if not len(new[0]):
        return figures
    mean_new, mean_reference = (float(errors.mean(dtype=np.float64)) for _, errors in (new, reference))
    drift = mean_new / max(mean_reference, 1e-12)  # a tiny catalogue may be encoded without any error
    alike = min(len(new[0]), len(reference[0]))
    return figures | {
        "error_new": mean_new,
        "error_reference": mean_reference,
        "drift": drift,
        "refit": drift > max_drift,
        "share_beyond": float((new[1] > np.quantile(reference[1], QUANTILE)).mean()),
        "perplexity_new": _perplexity(new[0][:alike, 0]),
        "perplexity_reference": _perplexity(reference[0][:alike, 0]),
        "perplexity_items": alike,
    }


def _perplexity(codes: NDArray[Any]) -> float:
    share = np.unique(codes, return_counts=True)[1] / len(codes)
    return float(np.exp(-(share * np.log(share)).sum()))
