"""`rqvae`: an auto-encoder around the codebooks, trained by the engine in three acts.

Warm up without codebooks, *then* k-means on the latents (on an untrained encoder it is what kills level 0),
then train through the codebooks. At last the codebooks are fitted once more to the final latents; of the two
the one with the smaller held-out error in the space of the input is kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qbrec.config.stages import QuantizerConfig, TrainConfig
from qbrec.engine.context import StageContext
from qbrec.engine.train import train
from qbrec.quantizer.autoencoder import AutoEncoder, QuantizedReconstruction, Reconstruction
from qbrec.quantizer.fit import FitMemory, Report, fit_codebooks
from qbrec.quantizer.kmeans.chunks import FixedPoint, Shard
from qbrec.quantizer.quantizer import Quantizer
from qbrec.quantizer.refine import revive
from qbrec.quantizer.rvq import Codebooks, decode, encode
from qbrec.quantizer.vectors import Standard, held_out_rows
from qbrec.storage.block_reader import BlockSet, Fields
from qbrec.storage.loader import BatchLoader


@dataclass(frozen=True)
class Source:
    """Where training batches come from: the fused vectors, their standardisation, the share held out."""

    blocks: BlockSet
    standard: Standard
    held_out: float


class VectorTask:
    """What `engine.train` optimises: a loss over standardised vectors."""

    def __init__(self, module: nn.Module, standard: Standard) -> None:
        self.module, self.standard = module, standard

    def prepare(self, batch: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Standardised rows float32 [b, D] on the device, and their number."""
        mean, std = self.standard
        rows = (batch.to(device).float() - mean) / std
        return rows, torch.tensor(float(len(rows)), device=device)

    def loss(self, module: nn.Module, batch: Tensor) -> Tensor:
        """Sum over the rows."""
        out: Tensor = module(batch)
        return out


def fit_rqvae(
    ctx: StageContext,
    shard: Shard,
    sizes: tuple[int, ...],
    source: Source,
    *,
    config: QuantizerConfig,
    seed: int,
    memory: FitMemory,
    report: Report,
) -> tuple[AutoEncoder, Codebooks, Shard]:
    """Train the auto-encoder and fit its codebooks; a killed fit goes on with its last act.

    Args:
        ctx: Rank, device, storage.
        shard: This rank's standardised rows.
        sizes: Codes per level.
        source: The same rows as training batches.
        config: `rqvae` and the lengths of k-means.
        seed: Seeds the k-means.
        memory: Where finished steps of the codebooks are kept.
        report: Called on every rank after each step with its name and figures.

    Returns:
        The network, codebooks float32 [K_l, d] in its latent space, and the latents as a shard.
    """
    settings = config.rqvae
    torch.manual_seed(ctx.sub_seed("quantizer.rqvae"))
    network = AutoEncoder(shard.x.shape[1], hidden=settings.hidden, latent=settings.latent).to(ctx.device)
    warm = Reconstruction(network)
    report("warm-up", _train(ctx, warm, source, shard, settings.warmup, act="warm-up"))
    network = warm.network
    first = fit_codebooks(
        _latents(network, shard),
        sizes,
        config=config.model_copy(update={"method": "rq_kmeans"}),
        comm=ctx,
        seed=seed,
        memory=memory,
        report=report,
    )
    whole = QuantizedReconstruction(network, first.levels, beta=settings.beta, gradient=settings.gradient)
    figures = _train(ctx, whole, source, shard, settings.train, act="train")
    network = whole.network
    learned = Codebooks(tuple(level.detach().float() for level in whole.levels))
    latents = _latents(network, shard)
    report("train", {**figures, "held_out": reconstruction_error(ctx, shard, latents, network, learned)})
    again = fit_codebooks(
        latents,
        sizes,
        config=config.model_copy(update={"method": "rq_kmeans"}),
        comm=ctx,
        seed=seed + 1,
    )
    candidates = [revive(latents, learned, comm=ctx), again]
    errors = [reconstruction_error(ctx, shard, latents, network, books) for books in candidates]
    best = int(np.argmin(errors))
    report("fit-again", {"held_out_learned": errors[0], "held_out_fitted": errors[1], "kept": float(best)})
    return network, candidates[best], latents


def _latents(network: AutoEncoder, shard: Shard) -> Shard:
    return Shard(network.encode(shard.x).contiguous(), shard.start, shard.total, shard.train)


def reconstruction_error(
    ctx: StageContext, shard: Shard, latents: Shard, network: AutoEncoder, books: Codebooks
) -> float:
    """Mean squared error of held-out rows (all, where none are) in the standardised space of the input."""
    x, z = shard.x, latents.x
    if shard.train is not None:
        x, z = x[~shard.train], z[~shard.train]
    left = (x - network.decode(decode(encode(z, books), books))).double().square().sum(1)
    error, count = _sum(ctx, shard.total, left)
    return error / max(count, 1)


PIECE = 65_536  # rows of one float64 temporary


def rqvae_steps(num_levels: int) -> list[str]:
    """Every step that `fit_rqvae` reports, in order."""
    return ["warm-up", *(f"level-{level}" for level in range(num_levels)), "revive", "train", "fit-again"]


def prefix_errors_through(
    ctx: StageContext, shard: Shard, codes: Tensor, quantizer: Quantizer, *, held_out: bool
) -> Tensor:
    """Squared error in the standardised input after 0, 1, … L levels (`rvq.prefix_errors` has no network).

    Args:
        ctx: The rank's context.
        shard: This rank's standardised rows.
        codes: int64 [n, L] of those rows.
        quantizer: With a network.
        held_out: Only the rows a fit did not see; all rows where none were held out.

    Returns:
        float64 [L + 1] sums; the first is the sum of squares.
    """
    x, picked = shard.x, codes
    if held_out and shard.train is not None:
        x, picked = x[~shard.train], codes[~shard.train]
    errors = torch.empty(codes.shape[1] + 1, len(x), dtype=torch.float64, device=x.device)
    for start in range(0, len(x), PIECE):
        rows = slice(start, start + PIECE)
        errors[0, rows] = x[rows].double().square().sum(1)
        for depth in range(1, len(errors)):
            again = quantizer.standardised(decode(picked[rows, :depth], quantizer.books))
            errors[depth, rows] = (x[rows] - again).double().square().sum(1)
    sums = [_sum(ctx, shard.total, values)[0] for values in errors]
    return torch.tensor(sums, dtype=torch.float64)


def _sum(ctx: StageContext, total: int, values: Tensor) -> tuple[float, int]:
    """Sum and number of non-negative values float64 [n] of all ranks, the same bits on any partition."""
    # A decoder's output has no bound of its own.
    top = ctx.all_reduce(values.max().reshape(1) if len(values) else values.new_zeros(1), op="max")
    fixed = FixedPoint.of(total, float(top))
    sums = torch.stack([fixed.encode(values).sum(), torch.tensor(len(values), device=values.device)])
    ctx.all_reduce(sums)
    return float(fixed.decode(sums[0])), int(sums[1])


def _train(
    ctx: StageContext, module: nn.Module, source: Source, shard: Shard, config: TrainConfig, *, act: str
) -> dict[str, float]:
    """Train in a place of its own below the stage's checkpoints; figures of the last evaluation."""
    inside = replace(ctx, stage=f"{ctx.stage}/{act}")
    select = np.ones(shard.total, dtype=bool)
    select[held_out_rows(ctx, shard.total, source.held_out)] = False
    loader = BatchLoader(
        source.blocks,
        batch_size=config.batch_size,
        micro_batch=config.micro_batch,
        seed=ctx.sub_seed(f"quantizer.rqvae.{act}"),
        rank=ctx.rank,
        world=ctx.world,
        collate=_collate,
        fields=("fused",),
        select=select,
        pin=ctx.device.type == "cuda",
    )
    held = shard.x if shard.train is None else shard.x[~shard.train]

    def evaluate(now: nn.Module) -> dict[str, float]:
        total = torch.zeros(2, dtype=torch.float64, device=ctx.device)
        for rows in held.split(4096):
            total += torch.stack([now(rows).double(), torch.tensor(float(len(rows)), device=ctx.device)])
        ctx.all_reduce(total)
        return {"held_out_loss": float(total[0] / total[1].clamp(min=1))}

    task = VectorTask(module, source.standard)
    result = train(inside, task, loader, config=config, label=f"quantizer {act}", evaluate=evaluate)
    return {name: value for name, value in result.best.items() if name not in ("step", "epoch")}


def _collate(fields: Fields, rows: NDArray[np.int64], epoch: int) -> Tensor:
    fused = fields["fused"]
    assert isinstance(fused, np.ndarray)
    return torch.from_numpy(np.ascontiguousarray(fused))
