"""Item graphs made by several ranks: the same file, bit for bit, whatever their number."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from qbrec.config import parse_config
from qbrec.engine.context import StageContext
from qbrec.neighbours.stage import run
from qbrec.storage.artifact import ArtifactStore
from tests.support.quantizer_inputs import write_fused
from tests.support.sequence_inputs import DOMAINS, ITEMS, make_inputs
from tests.support.spawn import run_ranks

CONFIG = {
    "data": {"domains": {name: {"items": "-", "interactions": "-"} for name in DOMAINS}, "target": "games"},
    "ranking": {"neighbours": 6, "alike": 5},
}
GRAPHS = ("follows", "fused", "next", "together")


def _stage(rank: int, world: int, folder: str, most: dict[str, int]) -> tuple[str, dict[str, int], list[int]]:
    """Path of the artifact, its arrows, and the items that this rank counted, in order."""
    store = ArtifactStore(folder)
    inputs = {kind: store.find(kind, kind[0] * 64) for kind in ("catalog", "fusion")}
    inputs["quantizer"] = store.find("quantizer", "d" * 64)
    ctx = StageContext.local(store, f"{folder}/runs/{world}", stage="neighbours", key=str(world) * 64)
    ctx.rank, ctx.world = rank, world
    counted: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        for name, value in most.items():
            patch.setattr(f"qbrec.{name}", value)
        patch.setattr("qbrec.neighbours.counting.count_arrows", _noting(counted))
        artifact = run(ctx, parse_config(CONFIG), {kind: found for kind, found in inputs.items() if found})
    return str(artifact.path), artifact.meta["arrows"], counted


def _noting(counted: list[int]):  # type: ignore[no-untyped-def]
    from qbrec.ranking.counted import count_arrows

    def noting(*args, items, **options):  # type: ignore[no-untyped-def]
        counted.extend(items)
        return count_arrows(*args, items=items, **options)

    return noting


@pytest.mark.parametrize("small", [False, True])
def test_one_two_and_four_ranks_make_the_same_graphs(small: bool, tmp_path: Path) -> None:
    make_inputs(tmp_path, num_users=200)
    vectors = np.random.default_rng(0).standard_normal((2 * ITEMS, 16))
    write_fused(ArtifactStore(tmp_path), torch.from_numpy(vectors))
    most = {
        "neighbours.alike.EXACT_ITEMS": 10,  # cell by cell
        "neighbours.alike.CHUNK": 3,
        "neighbours.counting.GATHERED": 7,
        "ranking.cooccurrence.CHUNK_PAIRS": 100,
    }
    alone, arrows, items = _stage(0, 1, str(tmp_path), most if small else {})
    assert items == [*range(2 * ITEMS)]
    store = ArtifactStore(tmp_path)
    wanted = store.open(alone).manifest["files"]
    assert tuple(sorted(arrows)) == GRAPHS
    assert min(arrows.values()) > 2 * ITEMS // 3
    for world in (2, 4):
        found = run_ranks(_stage, world, str(tmp_path), most if small else {})
        assert [item for _, _, counted in found for item in counted] == items
        shares = [len(counted) for _, _, counted in found]
        assert min(shares) > 0
        assert {path for path, _, _ in found} == {found[0][0]} != {alone}
        made = store.open(found[0][0])
        assert made.manifest["files"] == wanted
        assert made.meta["arrows"] == arrows
