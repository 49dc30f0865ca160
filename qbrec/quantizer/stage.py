"""Stage 2 from artifact to artifact: fused vectors in, codebooks and the table of semantic IDs out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qbrec.config.root import RootConfig
from qbrec.config.stages import QuantizerConfig
from qbrec.engine.context import StageContext
from qbrec.errors import DataError
from qbrec.quantizer.chunks import Shard, split_rows, standardisation, stratified
from qbrec.quantizer.collisions import Resolution, next_nearest
from qbrec.quantizer.fit import FitMemory, fit_codebooks, resolve_levels, step_names
from qbrec.quantizer.labels import make_labels
from qbrec.quantizer.packing import bucket_order, code_dtype, pack
from qbrec.quantizer.quality import PAIR_ROWS, bucket_figures, check_gate, cohesion, level_usage
from qbrec.quantizer.rvq import Codebooks, encode, prefix_errors
from qbrec.storage.artifact import Artifact, write_atomic
from qbrec.storage.blocks import BlockSet
from qbrec.storage.catalog_view import CatalogView

LABEL_ROWS = 1_000_000  # items whose words are read for the labels

Standard = tuple[Tensor, Tensor]


def run(ctx: StageContext, config: RootConfig, inputs: Mapping[str, Artifact]) -> Artifact:
    """Fit the quantizer on all fused vectors and give every item its semantic ID.

    Called on every rank; each reads and encodes its own rows. A killed run goes on with the next unfinished
    step.

    Args:
        ctx: Rank, devices, storage.
        config: The whole configuration; `quantizer` counts.
        inputs: `catalog` and `fusion`.

    Returns:
        The quantizer artifact: codebooks.safetensors (`level.<l>`, `mean`, `std`), semantic_ids.npy,
        raw_codes.npy, bucket_order.npy, labels.json, quality.json.

    Raises:
        ConfigError: Levels that cannot be fitted or packed.
        DataError: A fused vector is not finite, or the inputs do not belong together.
        GateError: The codebook has collapsed, or too many items share an ID.
    """
    cfg = config.quantizer
    blocks, catalog = BlockSet.open(inputs["fusion"], "fused"), CatalogView(inputs["catalog"])
    total = blocks.num_samples
    if total != catalog.num_items:
        raise DataError(
            f"{total} fused vectors for {catalog.num_items} items",
            where=str(inputs["fusion"].path),
            fix="run the fusion stage on this catalogue",
        )
    shard, standard = _load(ctx, blocks, cfg)
    held_out = int(total * cfg.held_out)
    sizes = resolve_levels(cfg.levels, num_items=total, num_train=total - held_out)
    steps = step_names(cfg, len(sizes))
    progress = ctx.progress(len(steps) + 2, "quantizer")

    def report(step: str, figures: dict[str, float]) -> None:
        if figures:
            ctx.log_metrics(steps.index(step), {f"{step}/{name}": value for name, value in figures.items()})
        progress.update(1, step=step)

    memory = FitMemory(ctx.checkpoint_dir, key=ctx.key, comm=ctx, device=ctx.device)
    seed = ctx.sub_seed("quantizer.fit")
    books = fit_codebooks(shard, sizes, config=cfg, comm=ctx, seed=seed, memory=memory, report=report)
    codes = encode(shard.x, books, beam=cfg.beam)
    errors, _ = prefix_errors(shard, codes, books, comm=ctx, held_out=True)
    narrow = torch.uint8 if max(sizes) <= 256 else torch.int32  # what every backend can gather
    raw = torch.cat(ctx.gather_bytes(codes.to(narrow))).cpu().numpy().astype(code_dtype(sizes))
    progress.update(1, step="codes")
    writer = ctx.writer()
    quality: dict[str, Any] = {}
    if ctx.is_main:
        resolution = _resolve(raw, books, cfg, catalog, blocks, standard)
        ids = resolution.codes
        quality = _quality(ctx, raw, resolution, sizes, catalog, blocks, standard, errors)
        write_atomic(ctx.run_dir / "quantizer-quality.json", json.dumps(quality, indent=1).encode())
        tensors = {f"level.{level}": book for level, book in enumerate(books.levels)}
        writer.save_safetensors("codebooks.safetensors", {**tensors, "mean": standard[0], "std": standard[1]})
        writer.save_npy("semantic_ids.npy", ids)
        writer.save_npy("raw_codes.npy", raw)
        writer.save_npy("bucket_order.npy", bucket_order(pack(ids, sizes), catalog.train_counts))
        writer.save_json("labels.json", _labels(ctx, ids, sizes, catalog))
        writer.save_json("quality.json", quality)
    _gate_everywhere(ctx, quality, cfg)
    progress.update(1, step="written")
    progress.close()
    meta = {
        "levels": list(sizes),
        "method": cfg.method,
        "beam": cfg.beam,
        "num_items": total,
        **_summary(quality),
    }
    artifact = ctx.commit(writer, meta=meta, inputs=inputs)
    if ctx.is_main:
        shutil.rmtree(ctx.checkpoint_dir, ignore_errors=True)  # the artifact holds all of it
    return artifact


def _load(ctx: StageContext, blocks: BlockSet, cfg: QuantizerConfig) -> tuple[Shard, Standard]:
    """This rank's rows, standardised per dimension, with the held-out ones marked; mean and deviation."""
    total = blocks.num_samples
    start, stop = split_rows(total, rank=ctx.rank, world=ctx.world)
    fused = torch.from_numpy(blocks.column("fused", start, stop)).float().to(ctx.device)
    bad = (~torch.isfinite(fused).all(1)).nonzero()
    # Every rank learns of it, so that all stop together.
    first = torch.tensor([total if not len(bad) else start + int(bad[0])], device=ctx.device)
    ctx.all_reduce(first, op="min")
    if int(first) < total:
        raise DataError(
            f"the fused vector of item row {int(first)} is not finite",
            where=f"artifact {blocks.fingerprint[:16]}",
            fix="the fusion training has diverged: lower fusion.train.learning_rate and run again",
        )
    train = None
    if int(total * cfg.held_out):
        held = stratified(total, int(total * cfg.held_out), seed=ctx.sub_seed("quantizer.held_out"))
        train = torch.ones(stop - start, dtype=torch.bool, device=ctx.device)
        train[torch.from_numpy(held[(held >= start) & (held < stop)] - start).to(ctx.device)] = False
    mean, std = standardisation(Shard(fused, start, total), ctx)
    return Shard(((fused - mean) / std).contiguous(), start, total, train), (mean, std)


def _vectors(blocks: BlockSet, rows: np.ndarray[Any, Any], standard: Standard) -> Tensor:
    """Standardised vectors of any rows, float32 [n, D]."""
    fused = blocks.take(rows, ["fused"])["fused"]
    assert isinstance(fused, np.ndarray)
    mean, std = standard
    return (torch.from_numpy(fused).float().to(mean.device) - mean) / std


def _resolve(
    raw: np.ndarray[Any, Any],
    books: Codebooks,
    cfg: QuantizerConfig,
    catalog: CatalogView,
    blocks: BlockSet,
    standard: Standard,
) -> Resolution:
    if cfg.collisions == "none":
        return Resolution(raw, 0, 0)

    def residuals(rows: np.ndarray[Any, Any]) -> Tensor:
        left = _vectors(blocks, rows, standard)
        for level, book in enumerate(books.levels[:-1]):
            left -= book[torch.from_numpy(raw[rows, level].astype(np.int64)).to(left.device)]
        return left

    return next_nearest(
        raw,
        books.sizes,
        group=np.asarray(catalog.duplicate_group),
        popularity=np.asarray(catalog.train_counts),
        capacity=cfg.capacity,
        last_level=books.levels[-1],
        residuals=residuals,
    )


def _quality(
    ctx: StageContext,
    raw: np.ndarray[Any, Any],
    resolution: Resolution,
    sizes: tuple[int, ...],
    catalog: CatalogView,
    blocks: BlockSet,
    standard: Standard,
    errors: Tensor,
) -> dict[str, Any]:
    group = np.asarray(catalog.duplicate_group)
    levels = level_usage(raw, sizes)
    whole = max(float(errors[0]), 1e-300)
    for level, figures in enumerate(levels):
        figures["r2_held_out"] = 1.0 - float(errors[level + 1]) / whole
    rows = stratified(len(raw), PAIR_ROWS, seed=ctx.sub_seed("quantizer.cohesion"))
    vectors = _vectors(blocks, rows, standard).cpu().numpy()
    seed = ctx.sub_seed("quantizer.shuffle")
    return {
        "num_items": len(raw),
        "levels": levels,
        **bucket_figures(resolution.codes, sizes, group=group),
        "raw": bucket_figures(raw, sizes, group=group),
        "moved": resolution.moved,
        "unresolved": resolution.unresolved,
        "cohesion": cohesion(vectors, resolution.codes[rows], sizes, seed=seed),
    }


def _labels(
    ctx: StageContext, ids: np.ndarray[Any, Any], sizes: tuple[int, ...], catalog: CatalogView
) -> dict[str, list[str]]:
    rows = stratified(len(ids), LABEL_ROWS, seed=ctx.sub_seed("quantizer.labels"))
    return make_labels(ids[rows], sizes, catalog.titles(rows), catalog.categories(rows))


def _gate_everywhere(ctx: StageContext, quality: dict[str, Any], cfg: QuantizerConfig) -> None:
    # Rank 0 knows the figures; every rank must stop with the same error.
    figures = torch.zeros(3, dtype=torch.float64, device=ctx.device)
    if ctx.is_main:
        first = quality["levels"][0]
        known = [first["codes"], first["perplexity"], quality["collision_rate"]]
        figures.copy_(torch.tensor(known, dtype=torch.float64))
    codes, perplexity, rate = ctx.broadcast(figures).tolist()
    seen = {"levels": [{"codes": int(codes), "perplexity": perplexity}], "collision_rate": rate}
    check_gate(seen, cfg.quality)


def _summary(quality: dict[str, Any]) -> dict[str, Any]:
    if not quality:
        return {}  # not rank 0: its manifest is the one that counts
    names = ("unique_ids", "no_collision_rate", "collision_rate", "largest_bucket", "moved", "unresolved")
    levels = quality["levels"]
    return {
        **{name: quality[name] for name in names},
        "perplexity": [level["perplexity"] for level in levels],
        "r2_held_out": [level["r2_held_out"] for level in levels],
    }
