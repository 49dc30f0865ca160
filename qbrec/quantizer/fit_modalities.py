"""Fitting codes of single modalities: residual k-means on an item's own features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qbrec.config.stages import QuantizerConfig
from qbrec.engine.context import StageContext
from qbrec.errors import ConfigError
from qbrec.quantizer.fit import ITEMS_PER_CODE, FitMemory, Report, fit_saved_levels
from qbrec.quantizer.kmeans.chunks import GRAIN, Collective, Shard, standardise
from qbrec.quantizer.modality import FittedModalities, ModalityQuantizer, mark_absent, mean_tokens
from qbrec.quantizer.packing import code_dtype
from qbrec.quantizer.rvq import encode, prefix_errors
from qbrec.storage.artifact import Artifact
from qbrec.storage.blocks import BlockSet, RaggedField
from qbrec.storage.ragged import Ragged

AUTO_LEVELS = 2
READ_ROWS = 4 * GRAIN  # items whose feature tokens are in memory at once


@dataclass(frozen=True)
class Plan:
    """One modality that is to be fitted.

    Attributes:
        name: As the catalogue calls it.
        width: D_m.
        sizes: Codes per level, K_l; the code for items without the modality comes on top.
        present: Which of this rank's rows have it, bool [n].
        num_present: Items that have it, over all ranks.
        num_fit: Those of them that the fit may see.
    """

    name: str
    width: int
    sizes: tuple[int, ...]
    present: Tensor
    num_present: int
    num_fit: int

    @property
    def steps(self) -> list[str]:
        """Steps of its fit, in order."""
        return [f"{self.name}-level-{level}" for level in range(len(self.sizes))]


def plan_modalities(
    config: QuantizerConfig, catalog: Artifact, shard: Shard, *, comm: Collective, first_size: int
) -> tuple[Plan, ...]:
    """What `quantizer.modalities` asks for beside the joint ID; checked before anything is fitted.

    Args:
        config: Names and levels.
        catalog: The catalogue artifact.
        shard: This rank's rows of the joint fit: which they are, and which of them are held out.
        comm: Process group.
        first_size: Codes of the joint ID's first level.

    Raises:
        ConfigError: The catalogue does not have such a modality, or too few items have it.
    """
    known: Mapping[str, Mapping[str, Any]] = catalog.meta.get("modalities", {})
    names = config.modalities[1:]
    unknown = next((name for name in names if name not in known), None)
    if unknown is not None:
        raise ConfigError(
            f"the catalogue has no modality {unknown!r}",
            where="quantizer.modalities",
            fix=f"beside joint it knows {', '.join(sorted(known))}" if known else "leave it at [joint]",
        )
    plans = []
    for name in names:
        tokens = BlockSet.open(catalog, "items").column(
            f"tokens.{name}", shard.start, shard.start + len(shard.x)
        )
        present = torch.from_numpy(tokens > 0).to(shard.x.device)
        fit = present if shard.train is None else present & shard.train
        counts = torch.stack([present.sum(), fit.sum()])
        num_present, num_fit = comm.all_reduce(counts).tolist()
        sizes = modality_sizes(config, name, first_size=first_size, num_present=num_present, num_fit=num_fit)
        plans.append(Plan(name, int(known[name]["dim"]), sizes, present, num_present, num_fit))
    return tuple(plans)


def modality_sizes(
    config: QuantizerConfig, name: str, *, first_size: int, num_present: int, num_fit: int
) -> tuple[int, ...]:
    """Codes per level of one modality.

    `auto`: two levels as large as the joint ID's first one, or as the largest power of two that leaves 8 of
    the items that have the modality per code.

    Raises:
        ConfigError: A level has more codes than there are items to fit.
    """
    if config.modality_levels == "auto":
        fair = 1 << max(1, (num_present // ITEMS_PER_CODE).bit_length() - 1)
        sizes: tuple[int, ...] = (min(first_size, fair),) * AUTO_LEVELS
    else:
        sizes = config.modality_levels
    if max(sizes) > num_fit:
        raise ConfigError(
            f"a level has {max(sizes)} codes, but only {num_fit} items with {name} are there to fit them",
            where="quantizer.modality_levels",
            fix=f"use smaller levels, or leave {name} out of quantizer.modalities",
        )
    return sizes


def fit_modalities(
    ctx: StageContext,
    plans: Sequence[Plan],
    config: QuantizerConfig,
    catalog: Artifact,
    shard: Shard,
    *,
    memory: FitMemory,
    report: Report,
) -> FittedModalities:
    """Fit and encode every further modality; called on every rank.

    A rank holds its own rows of one modality at a time; finished levels are kept in `memory`.

    Args:
        ctx: Rank, devices, seeds.
        plans: From `plan_modalities`.
        config: Lengths of the fit, beam.
        catalog: The catalogue artifact.
        shard: This rank's rows of the joint fit.
        memory: Where finished steps are kept.
        report: Called on every rank after each step with its name and figures.

    Returns:
        The same codebooks and codes, bit for bit, on every rank and for any number of ranks and threads.
    """
    quantizers, errors, columns = [], [], []
    for plan in plans:
        x = _read(BlockSet.open(catalog, "items"), plan, shard).to(ctx.device)
        mean, std = standardise(Shard(x, shard.start, shard.total), ctx, rows=plan.present)
        fit = plan.present if shard.train is None else plan.present & shard.train
        part = Shard(x, shard.start, shard.total, fit)
        books = fit_saved_levels(
            part,
            plan.sizes,
            plan.steps,
            config=config,
            comm=ctx,
            seed=_seed(ctx, plan),
            memory=memory,
            report=report,
        )
        codes = encode(x, books, beam=config.beam)
        # What the figures are measured on: the held-out items that have it, or all that have it.
        measured = plan.present & ~fit if plan.num_fit < plan.num_present else plan.present
        test = Shard(x, shard.start, shard.total, ~measured)
        errors.append(prefix_errors(test, codes, books, comm=ctx, held_out=True)[0])
        columns.append(mark_absent(codes, plan.present, plan.sizes))
        quantizers.append(ModalityQuantizer(plan.name, mean, std, books, beam=config.beam))
    if not quantizers:
        return FittedModalities((), np.zeros((shard.total, 0), np.uint8), ())
    sizes = [size for quantizer in quantizers for size in quantizer.sizes]
    narrow = torch.uint8 if max(sizes) <= 256 else torch.int32  # what every backend can gather
    table = torch.cat(ctx.gather_bytes(torch.cat(columns, 1).to(narrow))).cpu().numpy()
    return FittedModalities(tuple(quantizers), table.astype(code_dtype(sizes)), tuple(errors))


def _seed(ctx: StageContext, plan: Plan) -> int:
    return ctx.sub_seed(f"quantizer.modality.{plan.name}")


def _read(items: BlockSet, plan: Plan, shard: Shard) -> Tensor:
    """Mean tokens of this rank's rows, float32 [n, D_m]."""
    field = RaggedField(f"feature.{plan.name}", counts=f"tokens.{plan.name}")
    x = np.zeros((len(shard.x), plan.width), np.float32)
    for begin in range(0, len(x), READ_ROWS):
        rows = np.arange(begin, min(begin + READ_ROWS, len(x)), dtype=np.int64)
        features = items.take(rows + shard.start, [field])[field.values]
        assert isinstance(features, Ragged)
        x[rows] = mean_tokens(features)
    return torch.from_numpy(x)
