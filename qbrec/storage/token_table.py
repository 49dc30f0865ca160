"""The codes that stage 3 reads of every item: its semantic ID, then its codes of single modalities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qbrec.errors import DataError
from qbrec.storage.artifact import REBUILD, Artifact

CODEBOOKS = "codebooks.safetensors"  # of the semantic ID
SEMANTIC_IDS = "semantic_ids.npy"
MODALITY_CODES = "modality_codes.npy"


@dataclass(frozen=True)
class TokenTable:
    """Codes of all items, and how the levels fall into codebook spaces.

    Attributes:
        codes: Unsigned [N, L_all]: the levels of the semantic ID, then those of each further modality.
        sizes: Codes per level [L_all]; a modality's levels count the code for items without it.
        num_joint: L, levels of the semantic ID: `codes[:, :num_joint]`.
        modalities: Name and number of levels of each further modality, in the order of the columns.
    """

    codes: NDArray[np.unsignedinteger[Any]]
    sizes: tuple[int, ...]
    num_joint: int
    modalities: tuple[tuple[str, int], ...] = ()


def codebooks_file(modality: str) -> str:
    """File of a single modality's codebooks in the quantizer artifact."""
    return f"codebooks.{modality}.safetensors"


def token_table(quantizer: Artifact) -> TokenTable:
    """Read the codes of an artifact of kind `quantizer`, or of its part of a bundle.

    Where there are semantic IDs only, they stay mapped; else the joined table is made in memory.

    Raises:
        DataError: A file is missing or damaged, or the tables do not fit one another.
    """
    joint = quantizer.load_npy(SEMANTIC_IDS)
    levels = tuple(int(size) for size in quantizer.meta["levels"])
    further = quantizer.meta.get("modalities", [])
    if not further:
        return TokenTable(joint, levels, len(levels))
    codes = quantizer.load_npy(MODALITY_CODES)
    sizes = levels + tuple(int(size) for modality in further for size in modality["levels"])
    expected = (len(joint), len(sizes) - len(levels))
    if codes.shape != expected:
        raise DataError(
            f"the modality codes have shape {codes.shape}, not {expected} as semantic IDs and manifest say",
            where=str(quantizer.path / MODALITY_CODES),
            fix=REBUILD,
        )
    names = tuple((str(modality["name"]), len(modality["levels"])) for modality in further)
    return TokenTable(np.concatenate([joint, codes], axis=1), sizes, len(levels), names)
