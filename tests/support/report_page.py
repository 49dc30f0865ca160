"""A run with something in every chapter of its report, made in a second or two: nothing is trained."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from qbrec.config import parse_config
from qbrec.registry.comparison import Evaluated
from qbrec.registry.standing import Rival, Standing, paired_with
from qbrec.report import write_report
from qbrec.storage.catalog_view import CatalogView
from tests.support.registry_run import registry_run
from tests.support.tiny_run import TinyRun, retrained

SECONDS = {"catalog": 61.0, "quantizer": 1800.0, "finetune": 7200.0, "evaluation": 90.0}


def picture(seed: int, *, size: tuple[int, int] = (120, 80), form: str = "PNG") -> bytes:
    """An encoded picture of coarse coloured tiles."""
    tiles = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(tiles).resize(size, Image.Resampling.NEAREST).save(buffer, form)
    return buffer.getvalue()


def write_items(path: Path, pictures: Mapping[str, object], *, column: str = "image") -> str:
    """An item file, by name of the item; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"item_id": list(pictures), column: pa.array(list(pictures.values()))})
    pq.write_table(table, path, row_group_size=50)
    return str(path)


def pictured_run(folder: Path) -> TinyRun:
    """An evaluated run whose items have pictures (every seventh has none), with curves and times."""
    run = registry_run(folder, seed=5)
    catalog = CatalogView(run.artifacts["catalog"])
    ids = catalog.item_ids(np.arange(catalog.num_items))
    items = {name: picture(n) if n % 7 else None for n, name in enumerate(ids)}
    tree = run.config.model_dump(mode="json")
    tree["data"]["domains"]["shop"]["items"] = write_items(folder / "items.parquet", items)
    tree["compute"] |= {"cost_per_hour": 12.5}
    config = parse_config(tree)
    stages = {name: {"key": "k", "seconds": seconds} for name, seconds in SECONDS.items()}
    (run.run_dir / "run.json").write_text(json.dumps({"stages": stages}))
    with open(run.run_dir / "metrics.jsonl", "a") as file:
        for stage in ("fusion", "pretrain", "finetune"):
            for step in range(0, 1000, 10):
                metrics = {"loss": 9 / (step + 10) ** 0.3, "time/forward": 0.02, "time/backward": 0.04}
                if step % 100 == 0:
                    metrics |= {"ndcg@10": step / 20_000, "hr@10": step / 9_000}
                line = {"time": 0, "stage": stage, "step": step, "metrics": metrics}
                file.write(json.dumps(line) + "\n")
    return replace(run, config=config)


def judged(run: TinyRun) -> Standing:
    """Version 12, let pass by a gate, beside another training that serves."""
    catalog = run.artifacts["catalog"]
    ours, theirs = (
        Evaluated(one.artifacts["evaluation"], lambda: catalog) for one in (run, retrained(run, seed=4))
    )
    paired, problem = paired_with(ours, theirs, seed=0)
    reason = "difference +0.0123 (-0.0001 … +0.0250) on 200 users, lower end must be ≥ -0.0020"
    verdict = {
        "version": "12",
        "champion": "11",
        "gate": "default",
        "time": "2026-01-02T03:04:05Z",
        "passed": True,
        "checks": [{"name": "not worse than @champion in ndcg@10", "passed": True, "reason": reason}],
    }
    rival = Rival("11", "last-month", True, theirs.evaluation.load_json("metrics.json"), paired, problem)
    return Standing("qbrec", "12", serves=False, verdict=verdict, rival=rival)


def full_page(folder: Path) -> Path:
    """The report of such a run."""
    run = pictured_run(folder)
    return write_report(run.config, run.run_dir, run.artifacts, standing=judged(run))
