"""A road without training: a real catalogue, made-up codes, an untrained encoder, a real evaluation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qbrec.catalog.stage import run as build_catalog
from qbrec.catalog.synth import generate
from qbrec.config import RootConfig, parse_config
from qbrec.engine.context import StageContext
from qbrec.evaluation.stage import run as evaluate
from qbrec.quantizer.labels import make_labels
from qbrec.quantizer.quality import bucket_figures, level_usage
from qbrec.sequence.encoder import SequenceEncoder
from qbrec.sequence.recommender import save_encoder
from qbrec.sequence.vocabulary import Vocabulary
from qbrec.storage.artifact import Artifact, ArtifactStore
from qbrec.storage.catalog_view import CatalogView

SIZES = (16, 16, 16)


@dataclass(frozen=True)
class TinyRun:
    config: RootConfig
    run_dir: Path
    artifacts: dict[str, Artifact]


def tiny_run(folder: Path, **sections: Any) -> TinyRun:
    """Everything that registering and reporting read; needs Ray for the catalogue."""
    made = generate(folder / "shop", num_items=150, num_users=120, images=False)
    domains = {"shop": {"items": str(made.items), "interactions": str(made.interactions)}}
    config = parse_config(
        {
            "run": {"name": "tiny", "storage": str(folder / "storage")},
            "data": {"domains": domains},
            "sequence": {"width": 32, "layers": 1, "heads": 2, "max_items": 10},
            "evaluation": {"bootstrap": 100, "baselines": ["popularity", "itemknn"]},
        }
        | sections
    )
    run_dir = folder / "storage" / "runs" / "tiny"
    context = stage(config, run_dir, "catalog", seed=0)
    run = TinyRun(config, run_dir, {"catalog": build_catalog(context, config, {})})
    return retrained(run, seed=1)


def retrained(run: TinyRun, *, seed: int) -> TinyRun:
    """Other codes, another encoder, the same catalogue."""
    artifacts = {"catalog": run.artifacts["catalog"]}
    artifacts["quantizer"] = _quantizer(run, seed)
    artifacts["finetune"] = _finetune(run, artifacts, seed)
    context = stage(run.config, run.run_dir, "evaluation", seed=seed)
    artifacts["evaluation"] = evaluate(context, run.config, artifacts)
    return replace(run, artifacts=artifacts)


def stage(config: RootConfig, run_dir: Path, name: str, *, seed: int) -> StageContext:
    store = ArtifactStore(config.run.storage)
    return StageContext.local(store, run_dir, stage=name, key=f"{seed:016x}" * 4)


def _quantizer(run: TinyRun, seed: int) -> Artifact:
    catalog = CatalogView(run.artifacts["catalog"])
    rows = np.arange(catalog.num_items)
    codes = np.random.default_rng(seed).integers(0, 16, (catalog.num_items, 3)).astype(np.uint8)
    context = stage(run.config, run.run_dir, "quantizer", seed=seed)
    writer = context.writer()
    writer.save_npy("semantic_ids.npy", codes)
    writer.save_safetensors(
        "codebooks.safetensors", {f"level.{i}": torch.zeros(k, 4) for i, k in enumerate(SIZES)}
    )
    writer.save_json("labels.json", make_labels(codes, SIZES, catalog.titles(rows), catalog.categories(rows)))
    figures = bucket_figures(codes, SIZES, group=np.asarray(catalog.duplicate_group))
    writer.save_json("quality.json", {"levels": level_usage(codes, SIZES), **figures})
    return context.commit(writer, meta={"levels": list(SIZES)}, inputs=run.artifacts)


def _finetune(run: TinyRun, artifacts: dict[str, Artifact], seed: int) -> Artifact:
    torch.manual_seed(seed)
    domains = tuple(CatalogView(artifacts["catalog"]).domains)
    context = stage(run.config, run.run_dir, "finetune", seed=seed)
    writer = context.writer()
    save_encoder(writer, SequenceEncoder(run.config.sequence, Vocabulary(SIZES, domains)))
    writer.save_json("curve.json", [])
    return context.commit(writer, meta={"steps": 0}, inputs=artifacts)
