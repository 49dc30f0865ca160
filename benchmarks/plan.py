"""Memory that `qbrec plan --gpu cpu` foresees beside what real stages take in fresh processes on this CPU.

A catalogue and histories are made up and written as artifacts; then the fusion stage and pretraining run on
them through their own functions, with DeepSpeed, the real loader, validation and checkpoints. Measured is the
largest resident size of the process. The last line is JSON.

    python benchmarks/plan.py [--zero-stage 1] [--scale 1.0] [--only fusion]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from made_up import write_histories

from qbrec.config import RootConfig, parse_config
from qbrec.plan.plan import Plan, make_plan
from qbrec.plan.scenario import GIB, Modality, Scenario, further_modalities
from qbrec.storage.artifact import Artifact, ArtifactStore
from qbrec.storage.blocks import BlockTarWriter, write_block_index

ROOT = Path(__file__).resolve().parents[1]
DIMS = {"image": (192, 3), "text": (256, 3)}  # width, most tokens
SLOTS, BUCKETS = 4, 65_536
LEVELS = (256,) * 4
INTERACTIONS = 30
STAGES = ("fusion", "pretrain", "wide")  # wide: pretraining again, of parameters rather than activations
BLOCK = 512
WIDE = {"items": 512, "users": 64, "group": 64, "micro": 16}  # a wide encoder, whose activations are few
TINY = {"items": 256, "users": 64, "group": 64, "micro": 16}  # what is left is the base of the formulas


def sizes(scale: float) -> dict[str, int]:
    """Of the made-up catalogue and the batches: a few steps; `scale` 1 takes some 2 GB."""
    group = max(int(4096 * scale**0.5) // 64 * 64, 64)
    micro = max(int(512 * scale), 8)
    return {"items": 2 * group, "users": 3 * micro, "group": group, "micro": micro}


def configuration(
    storage: Path, *, scale: float, zero_stage: int, tiny: bool = False, wide: bool = False
) -> RootConfig:
    size = TINY if tiny else WIDE if wide else sizes(scale)
    group, micro = size["group"], size["micro"]
    once = {"epochs": 1, "warmup_fraction": 0.0}
    tree: dict[str, Any] = {
        "run": {"name": "plan", "storage": str(storage)},
        "data": {"domains": {"shop": {"items": "none", "interactions": "none"}}},
        "catalog": {"structure_depth": SLOTS - 1, "structure_buckets": BUCKETS, "block_bytes": 1 << 20},
        "compute": {"device": "cpu", "zero_stage": zero_stage},
        "fusion": {
            "width": 16 if tiny else 256,
            "depth": 1 if tiny else 4,
            "group": group,
            "train": {**once, "batch_size": group, "micro_batch": group},
        },
        "quantizer": {"levels": list(LEVELS)},
        "sequence": {
            "width": 16 if tiny else 1024 if wide else 128,
            "layers": 1 if tiny else 4,
            "validation_users": 32,
            "candidates": 64 if tiny or wide else 16_384,
            "pretrain": {**once, "batch_size": micro, "micro_batch": micro},
        },
    }
    return parse_config(tree)


def foreseen(config: RootConfig, *, items: int, users: int, interactions: float) -> Plan:
    modalities = tuple(
        Modality(name, "dense", dim, (1 + most) / 2, most) for name, (dim, most) in DIMS.items()
    )
    scenario = Scenario(
        items=items,
        users=users,
        interactions=interactions,
        world=1,
        per_machine=1,
        gpu=None,
        cpu_flops=1e11,
        host_bytes=64 * GIB,
        disk_rate=1e9,
        mfu=0.2,
        overhead=0.0,
        modalities=(*modalities, *further_modalities(config, config.catalog)),
    )
    return make_plan(config, scenario)


def make_inputs(root: Path, *, items: int, users: int, seed: int = 0) -> tuple[dict[str, Artifact], float]:
    """Catalogue and quantizer artifacts; mean interactions of a user."""
    rng = np.random.default_rng(seed)
    store = ArtifactStore(root)
    writer = store.writer("catalog", "c" * 64)
    writer.prepare()
    tar = BlockTarWriter(writer.path, prefix="items")
    for begin in range(0, items, BLOCK):
        rows = np.arange(begin, min(begin + BLOCK, items))
        fields: dict[str, Any] = {
            "row": rows,
            "domain": np.zeros(len(rows), np.uint8),
            "structure": rng.integers(0, BUCKETS, (len(rows), SLOTS), dtype=np.int32),
            "content": rows,
        }
        for name, (dim, most) in DIMS.items():
            counts = rng.integers(1, most + 1, len(rows)).astype(np.uint8)
            fields[f"tokens.{name}"] = counts
            fields[f"feature.{name}"] = rng.standard_normal((int(counts.sum()), dim)).astype(np.float16)
        tar.add(fields, len(rows))
    write_block_index(writer.path / "blocks.items.npy", [tar.close()])
    lengths = 3 + rng.geometric(1 / (INTERACTIONS - 2), users) - 1
    trained = write_histories(writer.path, lengths, num_items=items, block=BLOCK, rng=rng)
    writer.save_npy("train_counts.npy", trained)
    writer.save_npy("item_domain.npy", np.zeros(items, np.uint8))
    statistics = {f"mean.{name}": torch.zeros(dim) for name, (dim, _) in DIMS.items()}
    statistics |= {f"std.{name}": torch.ones(dim) for name, (dim, _) in DIMS.items()}
    writer.save_safetensors("statistics.safetensors", statistics)
    modalities = {n: {"dim": dim, "present": items, "max_tokens": most} for n, (dim, most) in DIMS.items()}
    meta = {
        "num_items": items,
        "domains": ["shop"],
        "modalities": modalities,
        "structure_slots": SLOTS,
        "structure_buckets": BUCKETS,
    }
    catalog = writer.commit(meta=meta, inputs={}, config={}, seed=0)
    writer = store.writer("quantizer", "d" * 64)
    writer.prepare()
    codes = rng.integers(0, max(LEVELS), (items, len(LEVELS))).astype(np.uint8)
    writer.save_npy("semantic_ids.npy", codes)
    books = {f"level.{i}": torch.randn(codes, 64) for i, codes in enumerate(LEVELS)}
    writer.save_safetensors("codebooks.safetensors", books)
    quantizer = writer.commit(meta={"levels": list(LEVELS)}, inputs={}, config={}, seed=0)
    return {"catalog": catalog, "quantizer": quantizer}, float(lengths.mean())


def child(stage: str, root: Path, *, scale: float, zero_stage: int, tiny: bool) -> None:
    """Run one stage; print the largest resident size of this process."""
    from qbrec.engine.context import StageContext
    from qbrec.engine.launch import process_group

    wide = stage == "wide"
    config = configuration(root, scale=scale, zero_stage=zero_stage, tiny=tiny, wide=wide)
    store = ArtifactStore(root)
    inputs = {
        kind: store.open(next((root / "artifacts" / kind).iterdir())) for kind in ("catalog", "quantizer")
    }
    if stage == "fusion":
        from qbrec.fusion.stage import run
    else:
        from qbrec.sequence.stage import pretrain as run
    run_dir = root / f"run-{stage}-{tiny}"
    run_dir.mkdir()
    with process_group(config):
        context = StageContext.local(
            store, run_dir, stage="pretrain" if wide else stage, key=("e" if tiny else "f") * 64
        )
        context.compute = config.compute
        run(context, config, inputs)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def measure(stage: str, root: Path, *, scale: float, zero_stage: int, tiny: bool = False) -> int:
    """Peak of a fresh process that runs a stage, in bytes."""
    command = [sys.executable, __file__, "--child", stage, "--root", str(root), "--scale", str(scale)]
    command += ["--zero-stage", str(zero_stage), *(["--tiny"] if tiny else [])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    return int(done.stdout.split()[-1])


def compare(
    *, scale: float, zero_stage: int, stages: tuple[str, ...] = STAGES, base: bool = False
) -> dict[str, dict[str, float]]:
    """Foreseen and measured bytes by stage."""
    found: dict[str, dict[str, float]] = {}
    for stage in stages:
        wide = stage == "wide"
        size = WIDE if wide else sizes(scale)
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            _, interactions = make_inputs(root, items=size["items"], users=size["users"])
            config = configuration(root, scale=scale, zero_stage=zero_stage, wide=wide)
            plan = foreseen(config, items=size["items"], users=size["users"], interactions=interactions)
            memory = plan.stage("pretrain" if wide else stage).memory
            assert memory is not None
            began = time.monotonic()
            measured = measure(stage, root, scale=scale, zero_stage=zero_stage)
            planned = memory.host.peak
            found[stage] = {"planned_bytes": planned, "measured_bytes": measured, "ratio": planned / measured}
            print(
                f"{stage:<10} planned {planned / GIB:6.2f} GiB, measured {measured / GIB:6.2f} GiB, "
                f"ratio {planned / measured:.3f}  ({time.monotonic() - began:.0f} s)",
                flush=True,
            )
            for name, value in memory.host.parts().items():
                print(f"    {value / GIB:7.3f} GiB  {name}")
            if base:
                (root / "tiny").mkdir(exist_ok=True)
                make_inputs(root / "tiny", items=TINY["items"], users=TINY["users"], seed=stages.index(stage))
                tiny = measure(stage, root / "tiny", scale=scale, zero_stage=zero_stage, tiny=True)
                print(f"    a tiny network: {tiny / GIB:.3f} GiB", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--zero-stage", type=int, default=1)
    parser.add_argument("--scale", type=float, default=1.0, help="Of the batches.")
    parser.add_argument("--only", choices=STAGES, help="One stage.")
    parser.add_argument("--base", action="store_true", help="Also a tiny network: the base of the formulas.")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(
            options.child, options.root, scale=options.scale, zero_stage=options.zero_stage, tiny=options.tiny
        )
        return
    stages = (options.only,) if options.only else STAGES
    found = compare(scale=options.scale, zero_stage=options.zero_stage, stages=stages, base=options.base)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
