"""Semantic IDs of a catalogue and of the generations appended to it, read as one table.

The IDs of a generation are an artifact of the kind `id_generation`; published IDs never move, so those of the
catalogue and of earlier generations stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import count, takewhile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qbrec.errors import DataError
from qbrec.storage.artifact import Artifact
from qbrec.storage.token_table import MODALITY_CODES, SEMANTIC_IDS, token_table

KIND = "id_generation"
FUSED_KIND = "fused_generation"  # what the IDs of a generation are made of
ALIKE_KIND = "alike_generation"  # rows of the item graphs of a generation
# Artifacts by name: generation-1, ids-1, alike-1, generation-2, …
GENERATION, IDS, ALIKE = "generation", "ids", "alike"


class IdTable:
    """Semantic IDs of all rows that have one: those of the catalogue, then generation by generation.

    Args:
        quantizer: The quantizer whose codes they are.
        generations: IDs of the generations, oldest first; the last ones may have none yet.

    Attributes:
        sizes: Codes per level, L.

    Raises:
        DataError: An artifact is of another kind, or the IDs do not follow one another.
    """

    def __init__(self, quantizer: Artifact, generations: Sequence[Artifact] = ()) -> None:
        self.sizes: tuple[int, ...] = tuple(quantizer.meta["levels"])
        self._quantizer, self._generations = quantizer, list(generations)
        self._parts: list[NDArray[Any]] = [quantizer.load_npy(SEMANTIC_IDS)]
        before = {"quantizer": quantizer.fingerprint}
        rows = len(self._parts[0])
        for number, artifact in enumerate(generations, 1):
            if artifact.kind != KIND:
                what = f"this is a {artifact.kind} artifact, not the IDs of a generation"
                raise DataError(what, where=str(artifact.path))
            if not before.items() <= artifact.inputs.items() or artifact.meta["first_row"] != rows:
                raise DataError(
                    f"the semantic IDs of generation {number} do not go on from those before them",
                    where=str(artifact.path),
                    fix="name them in the order in which they were appended, none left out",
                )
            self._parts.append(artifact.load_npy(SEMANTIC_IDS))
            before[f"{IDS}-{number}"] = artifact.fingerprint
            rows += len(self._parts[-1])

    @property
    def num_items(self) -> int:
        """Rows that have an ID: N of the catalogue and of the generations given."""
        return sum(len(part) for part in self._parts)

    @cached_property
    def codes(self) -> NDArray[Any]:
        """Codes of every row, the smallest unsigned type [N, L]; mapped while nothing was appended."""
        return self._parts[0] if len(self._parts) == 1 else np.concatenate(self._parts)

    @cached_property
    def tokens(self) -> NDArray[Any]:
        """What stage 3 reads of every row: `codes`, then its codes of single modalities; [N, L_all]."""
        first = token_table(self._quantizer)
        if not first.modalities:
            return self.codes
        later = (artifact.load_npy(MODALITY_CODES) for artifact in self._generations)
        further = np.concatenate([first.codes[:, first.num_joint :], *later])
        return np.concatenate([self.codes, further], axis=1)

    @property
    def appended(self) -> NDArray[Any]:
        """Codes of the rows after the catalogue's, [M, L]."""
        return np.concatenate([self._parts[0][:0], *self._parts[1:]])


def numbered(artifacts: Mapping[str, Artifact], name: str) -> list[Artifact]:
    """`name-1`, `name-2`, … of a mapping, up to the first that is not there."""
    return [artifacts[key] for key in takewhile(artifacts.__contains__, (f"{name}-{n}" for n in count(1)))]


def current_ids(
    quantizer: Artifact, generations: Sequence[Artifact], found: Sequence[Artifact | None]
) -> list[Artifact]:
    """IDs that still hold: of the first generations, by this quantizer; later ones have to be made.

    Args:
        quantizer: The run's quantizer.
        generations: The generations, oldest first.
        found: What was noted as the IDs of each, in their order.
    """
    chain: dict[str, str] = {"quantizer": quantizer.fingerprint}
    kept: list[Artifact] = []
    for number, (generation, ids) in enumerate(zip(generations, found, strict=False), 1):
        chain[f"{GENERATION}-{number}"] = generation.fingerprint
        if ids is None or not chain.items() <= ids.inputs.items():
            break
        chain[f"{IDS}-{number}"] = ids.fingerprint
        kept.append(ids)
    return kept


def current_alike(
    neighbours: Artifact, ids: Sequence[Artifact], found: Sequence[Artifact | None]
) -> list[Artifact]:
    """Graph rows that still hold: of the first generations, beside these item graphs and these IDs.

    Args:
        neighbours: The run's item graphs.
        ids: IDs of the generations that have current ones, oldest first.
        found: What was noted as the graph rows of each generation, in their order.
    """
    kept: list[Artifact] = []
    for one, alike in zip(ids, found, strict=False):
        wanted = {"neighbours": neighbours.fingerprint, "ids": one.fingerprint}
        if alike is None or not wanted.items() <= alike.inputs.items():
            break
        kept.append(alike)
    return kept
