"""Stage 2 from artifact to artifact: fused vectors in, codebooks and the table of semantic IDs out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from qbrec.config.root import RootConfig
from qbrec.engine.context import StageContext
from qbrec.errors import DataError
from qbrec.quantizer.assess import assess, summary
from qbrec.quantizer.duplicates import write_duplicates
from qbrec.quantizer.fit import FitMemory, fit_codebooks, resolve_levels, step_names
from qbrec.quantizer.fit_modalities import fit_modalities, plan_modalities
from qbrec.quantizer.kmeans.chunks import stratified
from qbrec.quantizer.labels import make_labels
from qbrec.quantizer.packing import bucket_order, code_dtype, pack
from qbrec.quantizer.quality import check_gate
from qbrec.quantizer.quantizer import Quantizer
from qbrec.quantizer.resolve import resolve
from qbrec.quantizer.rqvae import Source, fit_rqvae, prefix_errors_through, rqvae_steps
from qbrec.quantizer.rvq import encode, prefix_errors
from qbrec.quantizer.vectors import load_shard
from qbrec.storage.artifact import Artifact, write_atomic
from qbrec.storage.blocks import BlockSet
from qbrec.storage.catalog_view import CatalogView

LABEL_ROWS = 1_000_000  # items whose words are read for the labels


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
        raw_codes.npy, bucket_order.npy, duplicates.parquet, labels.json, quality.json; with further
        modalities (`modality`) also modality_codes.npy and codebooks.<name>.safetensors. With collisions
        resolved by `digit` the IDs, and meta["levels"], have one level more than the codebooks.

    Raises:
        ConfigError: Levels that cannot be fitted or packed, or a modality the catalogue does not have.
        DataError: A fused vector is not finite, or the inputs do not belong together.
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
    shard, standard = load_shard(ctx, blocks, held_out=cfg.held_out)
    sizes = resolve_levels(
        cfg.levels,
        num_items=total,
        num_train=total - int(total * cfg.held_out),
        further=1 if cfg.collisions == "digit" else 0,
    )
    plans = plan_modalities(cfg, inputs["catalog"], shard, comm=ctx, first_size=sizes[0])
    through = cfg.method == "rqvae"
    fitting = rqvae_steps(len(sizes)) if through else step_names(cfg, len(sizes))
    steps = [*fitting, *(step for plan in plans for step in plan.steps)]
    progress = ctx.progress(len(steps) + 2, "quantizer")

    def report(step: str, figures: dict[str, float]) -> None:
        if figures:
            ctx.log_metrics(steps.index(step), {f"{step}/{name}": value for name, value in figures.items()})
        progress.update(1, step=step)

    memory = FitMemory(ctx.checkpoint_dir, key=ctx.key, comm=ctx, device=ctx.device)
    seed = ctx.sub_seed("quantizer.fit")
    if through:
        source = Source(blocks, standard, cfg.held_out)
        network, books, latents = fit_rqvae(
            ctx, shard, sizes, source, config=cfg, seed=seed, memory=memory, report=report
        )
        quantizer = Quantizer(*standard, books, beam=cfg.beam, network=network)
        codes = encode(latents.x, books, beam=cfg.beam)
        errors = prefix_errors_through(ctx, shard, codes, quantizer, held_out=True)
        everywhere = prefix_errors_through(ctx, shard, codes, quantizer, held_out=False)
    else:
        books = fit_codebooks(shard, sizes, config=cfg, comm=ctx, seed=seed, memory=memory, report=report)
        quantizer = Quantizer(*standard, books, beam=cfg.beam)
        codes = encode(shard.x, books, beam=cfg.beam)
        errors, _ = prefix_errors(shard, codes, books, comm=ctx, held_out=True)
        everywhere, _ = prefix_errors(shard, codes, books, comm=ctx, held_out=False)
    narrow = torch.uint8 if max(sizes) <= 256 else torch.int32  # what every backend can gather
    raw = torch.cat(ctx.gather_bytes(codes.to(narrow))).cpu().numpy().astype(code_dtype(sizes))
    further = fit_modalities(ctx, plans, cfg, inputs["catalog"], shard, memory=memory, report=report)
    progress.update(1, step="codes")
    writer = ctx.writer()
    quality: dict[str, Any] = {}
    final = sizes  # with the policy `digit` rank 0, whose manifest is the one that counts, adds a level
    if ctx.is_main:
        resolution = resolve(
            raw, quantizer, cfg, catalog=catalog, blocks=blocks, seed=ctx.sub_seed("quantizer.shuffle")
        )
        ids, final = resolution.codes, resolution.sizes
        quality = assess(
            ctx,
            raw,
            resolution,
            quantizer,
            catalog=catalog,
            blocks=blocks,
            errors=errors,
            errors_everywhere=everywhere,
        )
        quality["modalities"] = further.figures()
        write_atomic(ctx.run_dir / "quantizer-quality.json", json.dumps(quality, indent=1).encode())
        quantizer.save(writer)
        further.save(writer)
        writer.save_npy("semantic_ids.npy", ids)
        writer.save_npy("raw_codes.npy", raw)
        writer.save_npy("bucket_order.npy", bucket_order(pack(ids, final), catalog.train_counts))
        write_duplicates(writer, ids, group=np.asarray(catalog.duplicate_group))
        writer.save_json("labels.json", _labels(ctx, ids, final, catalog))
        writer.save_json("quality.json", quality)
    progress.update(1, step="written")
    progress.close()
    meta = {
        "levels": list(final),
        "modalities": further.meta(),
        "method": cfg.method,
        "beam": cfg.beam,
        **({"network": quantizer.network.shape} if quantizer.network is not None else {}),
        "num_items": total,
        **summary(quality),
    }
    artifact = ctx.commit(writer, meta=meta, inputs=inputs)
    if ctx.is_main:
        shutil.rmtree(ctx.checkpoint_dir, ignore_errors=True)  # the artifact holds all of it
    return artifact


def _labels(
    ctx: StageContext, ids: np.ndarray[Any, Any], sizes: tuple[int, ...], catalog: CatalogView
) -> dict[str, list[str]]:
    rows = stratified(len(ids), LABEL_ROWS, seed=ctx.sub_seed("quantizer.labels"))
    return make_labels(ids[rows], sizes, catalog.titles(rows), catalog.categories(rows))


def gate(artifact: Artifact, config: RootConfig) -> None:
    """Refuse semantic IDs on which nothing should be trained.

    Raises:
        GateError: The codebook has collapsed, or too many items share an ID; see `quality.check_gate`.
    """
    check_gate(artifact.load_json("quality.json"), config.quantizer.quality)
