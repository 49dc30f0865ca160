"""The bundle: what of a run's artifacts is needed to serve, as plain files in one folder.

Every part is a subset of one artifact's files beside that artifact's own manifest, so that a bundle is read,
and its files verified, by exactly the code that reads the artifacts. A part beyond `registry.max_part_bytes`
stays where it is and is referred to by path and fingerprint.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qbrec.config import RootConfig
from qbrec.errors import DataError
from qbrec.ranking.graphs import GRAPHS
from qbrec.sequence.bonus import BONUS_FILE
from qbrec.sequence.item_codes import ITEM_CODES
from qbrec.storage.artifact import MANIFEST, Artifact, ArtifactStore, write_atomic
from qbrec.storage.id_table import ALIKE, GENERATION, IDS, numbered
from qbrec.storage.token_table import MODALITY_CODES, SEMANTIC_IDS

BUNDLE_FILE = "bundle.json"
CARD_FILE = "MODEL_CARD.md"
FORMAT_VERSION = 2

# What recommending reads; `evaluation` is there for the gate, which compares two versions user by user.
PARTS: dict[str, tuple[str, ...]] = {
    "catalog": (
        "items.arrow",
        "hashes.npy",
        "item_domain.npy",
        "train_counts.npy",
        "retired.npy",
        "representatives.npy",
    ),
    "quantizer": (SEMANTIC_IDS, MODALITY_CODES, "codebooks.safetensors", "labels.json", "quality.json"),
    "neighbours": (GRAPHS,),
    "finetune": ("encoder.safetensors", "encoder.json", ITEM_CODES, BONUS_FILE),
    "evaluation": ("metrics.json", "ranks.parquet"),
}
# The same of every generation: generation-1, ids-1, alike-1, generation-2, …
GENERATION_PARTS: dict[str, tuple[str, ...]] = {
    GENERATION: (
        "items.arrow",
        "hashes.npy",
        "item_domain.npy",
        "changed.arrow",
        "changed.npy",
        "retired.npy",
        "restored.npy",
    ),
    IDS: (SEMANTIC_IDS, MODALITY_CODES, "drift.json"),
    ALIKE: (GRAPHS,),
}


def parts_of(artifacts: Mapping[str, Artifact]) -> dict[str, tuple[str, ...]]:
    """`PARTS` of a run, by kind: without item graphs where its model has no bonus.

    Raises:
        DataError: It has no `finetune` artifact.
    """
    beside_graphs = "neighbours" in require(artifacts, "finetune").inputs
    return {kind: names for kind, names in PARTS.items() if kind != "neighbours" or beside_graphs}


def write_bundle(folder: Path, *, config: RootConfig, artifacts: Mapping[str, Artifact], card: str) -> Path:
    """Fill an empty folder with everything that serving needs.

    Args:
        folder: Where to; made if missing.
        config: The run's configuration (target domain, ranking, size limit).
        artifacts: `catalog`, `quantizer`, `finetune`, `evaluation`, and the generations appended since:
            `generation-1`, `ids-1`, `alike-1`, `generation-2`, …
        card: The model card, Markdown.

    Raises:
        DataError: An artifact is missing or damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, dict[str, Any]] = {}
    wanted = parts_of(artifacts) | {
        f"{kind}-{number}": names
        for kind, names in GENERATION_PARTS.items()
        for number in range(1, len(numbered(artifacts, kind)) + 1)
    }
    for kind, names in wanted.items():
        artifact = require(artifacts, kind)
        present = [artifact.file(name) for name in names if artifact.has(name)]
        size = sum(path.stat().st_size for path in present)
        embedded = size <= config.registry.max_part_bytes
        parts[kind] = {"fingerprint": artifact.fingerprint, "bytes": size, "embedded": embedded}
        parts[kind]["path"] = kind if embedded else str(artifact.path.resolve())
        if embedded:
            (folder / kind).mkdir(exist_ok=True)
            for path in [artifact.path / MANIFEST, *present]:
                shutil.copyfile(path, folder / kind / path.name)
    document = {
        "format_version": FORMAT_VERSION,
        "run": config.run.name,
        "domain": require(artifacts, "catalog").meta["target_domain"],
        "ranking": config.ranking.model_dump(mode="json"),
        "parts": parts,
    }
    write_atomic(folder / CARD_FILE, card.encode())
    write_atomic(folder / BUNDLE_FILE, json.dumps(document, indent=1, sort_keys=True).encode())
    return folder


def read_bundle(folder: Path) -> dict[str, Any]:
    """The bundle's own description; raises DataError if it is no bundle of this format."""
    path = Path(folder) / BUNDLE_FILE
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError("this folder is no bundle", where=str(path), fix="register the run again") from None
    except ValueError:
        raise DataError(
            "the bundle's description is damaged", where=str(path), fix="register the run again"
        ) from None
    if document.get("format_version") != FORMAT_VERSION:
        raise DataError(
            f"bundle format {document.get('format_version')} is not the format {FORMAT_VERSION} read here",
            where=str(path),
            fix="serve it with the qbrec release that registered it, or register the run again",
        )
    return document


def open_part(folder: Path, kind: str) -> Artifact:
    """One part of a bundle as the artifact it was taken from.

    Raises:
        DataError: It is missing, or a part kept outside the bundle is no longer what was registered.
    """
    entry = read_bundle(folder)["parts"][kind]
    path = Path(folder) / entry["path"] if entry["embedded"] else Path(entry["path"])
    artifact = ArtifactStore(path.parent).open(path)
    if artifact.fingerprint != entry["fingerprint"]:
        raise DataError(
            f"the {kind} artifact is not the one that was registered",
            where=str(path),
            fix="register the run again",
        )
    return artifact


def open_served(folder: Path) -> dict[str, Artifact]:
    """The parts that recommending reads: `catalog`, `quantizer`, `finetune`, and all generations.

    Raises:
        DataError: See `open_part`.
    """
    names = [name for name in read_bundle(folder)["parts"] if name != "evaluation"]
    return {name: open_part(folder, name) for name in names}


def require(artifacts: Mapping[str, Artifact], kind: str) -> Artifact:
    """An artifact of the run; raises DataError that says which stage is missing."""
    if kind not in artifacts:
        raise DataError(
            f"the run has no {kind} artifact",
            where=", ".join(sorted(artifacts)),
            fix="finish it with `qbrec run`",
        )
    return artifacts[kind]
