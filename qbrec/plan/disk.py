"""Bytes on disk: what the artifacts hold per item, user and interaction."""

from __future__ import annotations

from collections.abc import Sequence

from qbrec.config import RootConfig
from qbrec.config.stages import TrainConfig
from qbrec.fusion.model import BEHAVIOUR
from qbrec.plan.scenario import Modality, Resolved, Scenario
from qbrec.quantizer.packing import code_dtype
from qbrec.ranking.counted import COUNTED

PAGE = 4096  # bytes that a system reads at least
DISPLAY = 200  # bytes of an item's id, title, brand and categories
USER = 32  # bytes of a user's id and hash


def item_runs(modalities: Sequence[Modality]) -> list[float]:
    """Bytes of an item that lie side by side, field by field: row and features."""
    runs = [8.0]
    for modality in modalities:
        if modality.kind == "bag":
            runs.append(4.0 * modality.longest)
        elif modality.name != BEHAVIOUR:
            runs += [2.0 * modality.tokens * modality.dim, 1.0]
    return runs


def item_bytes(modalities: Sequence[Modality]) -> float:
    """Of an item in the catalogue's blocks: the above, its domain and the hash of its content."""
    return sum(item_runs(modalities)) + 1 + 8


def catalog_disk(scenario: Scenario) -> dict[str, int]:
    """Of the catalogue."""
    items, users = scenario.items, scenario.users
    return {
        "item features": round(items * item_bytes(scenario.modalities)),
        "histories": round(users * (16 * scenario.interactions + 8 + 1 + 8 + 8)),
        # Hashes, training counts, duplicates, near-duplicates, domain; what is shown of an item; users.
        "index": items * (4 * 8 + 1 + DISPLAY) + users * USER,
    }


def quantizer_disk(config: RootConfig, scenario: Scenario, resolved: Resolved) -> dict[str, int]:
    """Of codebooks and semantic IDs."""
    codes = scenario.items * len(resolved.levels) * code_dtype(resolved.levels).itemsize
    return {
        "semantic IDs": codes,
        "codes as encoded": codes,
        "items by ID": 8 * scenario.items,
        "codebooks": 4 * sum(resolved.levels) * config.fusion.width,
    }


def view_widths(config: RootConfig, scenario: Scenario) -> list[int]:
    """Widths of the vectors by which items can be alike: what each encoder makes, and the fused ones."""
    stored = [m.dim for m in scenario.modalities if m.kind == "dense" and m.name != BEHAVIOUR]
    return [*stored, config.fusion.width]


def graph_bytes(config: RootConfig, scenario: Scenario) -> int:
    """Of the item graphs, at most, on disk as in memory: arrows of 4 + 4 bytes."""
    if not config.ranking.neighbours:
        return 0
    views = len(view_widths(config, scenario))
    arrows = len(COUNTED) * config.ranking.neighbours + views * config.ranking.alike
    return 8 * scenario.items * arrows


def checkpoint_files(train: TrainConfig) -> int:
    """Checkpoints on disk at one time: the last ones, the best one, and the one being written."""
    return train.keep_checkpoints + 2
