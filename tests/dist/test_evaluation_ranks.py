"""Evaluation shared among ranks: every user once, whatever their number."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from qbrec.config import parse_config
from qbrec.engine.context import StageContext
from qbrec.evaluation.stage import run
from qbrec.sequence.encoder import SequenceEncoder
from qbrec.sequence.recommender import save_encoder
from qbrec.sequence.vocabulary import Vocabulary
from qbrec.storage.artifact import ArtifactStore
from qbrec.storage.catalog_view import CatalogView
from tests.support.sequence_inputs import DOMAINS, LEVELS, make_inputs
from tests.support.spawn import run_ranks

pytestmark = pytest.mark.dist

CONFIG = {
    "data": {"domains": {name: {"items": "-", "interactions": "-"} for name in DOMAINS}, "target": "games"},
    "sequence": {"width": 32, "layers": 1, "heads": 2, "max_items": 8},
    "evaluation": {"baselines": ["popularity", "itemknn"], "batch_users": 7, "bootstrap": 50},
}


def _evaluate(rank: int, world: int, root: str) -> str:
    CatalogView.near_duplicate_group = property(  # type: ignore[assignment,method-assign]
        lambda self: np.arange(self.num_items) // 2
    )
    folder = Path(root)
    store = ArtifactStore(folder)
    kinds = {"catalog": "c", "quantizer": "d", "finetune": "f"}
    inputs = {kind: store.find(kind, letter * 64) for kind, letter in kinds.items()}
    ctx = StageContext(
        store=store,
        run_dir=folder / "run",
        stage="evaluation",
        key=str(world) * 64,
        seed=0,
        rank=rank,
        world=world,
    )
    ctx.run_dir.mkdir(exist_ok=True)
    return str(run(ctx, parse_config(CONFIG), inputs).path)  # type: ignore[arg-type]


def test_four_ranks_count_as_one(tmp_path: Path) -> None:
    make_inputs(tmp_path)
    torch.manual_seed(0)
    writer = ArtifactStore(tmp_path).writer("finetune", "f" * 64)
    writer.prepare()
    save_encoder(writer, SequenceEncoder(parse_config(CONFIG).sequence, Vocabulary(LEVELS, DOMAINS)))
    writer.commit(meta={}, inputs={}, config={}, seed=0)
    store = ArtifactStore(tmp_path)
    found = [store.open(run_ranks(_evaluate, world, str(tmp_path))[0]) for world in (1, 4)]
    tables = [pq.read_table(one.file("ranks.parquet")) for one in found]
    assert tables[0].num_rows == found[0].meta["num_users"] > 10
    assert tables[0].num_rows % 4  # somebody has fewer users than the others
    assert tables[0].equals(tables[1])
    metrics = [one.load_json("metrics.json") for one in found]
    assert metrics[0] == metrics[1]
    assert 0 < metrics[0]["coverage"]["qbrec"] <= 1
