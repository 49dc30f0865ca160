"""Codes of single modalities beside the joint semantic ID: residual k-means on an item's own features.

The joint ID stays the identity of an item; these codes are further tokens for stage 3, which then ranks with
both (as MQL4GRec and MACRec do). An item without a modality has the code "absent", K, at its every level.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qbrec.config.stages import QuantizerConfig
from qbrec.engine.context import StageContext
from qbrec.errors import ConfigError
from qbrec.quantizer.chunks import GRAIN, Collective, FixedPoint, Shard, max_abs, parallel, sum_of
from qbrec.quantizer.fit import ITEMS_PER_CODE, FitMemory, Report
from qbrec.quantizer.lloyd import KMeans
from qbrec.quantizer.packing import code_dtype
from qbrec.quantizer.quality import level_usage
from qbrec.quantizer.rvq import Codebooks, encode, fit_levels, prefix_errors
from qbrec.storage.artifact import Artifact, ArtifactWriter
from qbrec.storage.blocks import BlockSet, RaggedField
from qbrec.storage.ragged import Ragged
from qbrec.storage.token_table import MODALITY_CODES, codebooks_file

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


@dataclass(frozen=True)
class ModalityQuantizer:
    """Frozen standardisation and codebooks of one modality: feature tokens in, codes out.

    Attributes:
        name: As the catalogue calls it.
        mean: Per dimension over the items that have it, float32 [D_m].
        std: Per dimension over the items that have it, float32 [D_m], above 0.
        books: Codebooks, without the code for items that lack the modality.
        beam: Partial codes kept while encoding; 1: greedy.
    """

    name: str
    mean: Tensor
    std: Tensor
    books: Codebooks
    beam: int = 1

    @property
    def sizes(self) -> tuple[int, ...]:
        """Codes per level, K_l + 1: the last one is for items that lack the modality."""
        return tuple(size + 1 for size in self.books.sizes)

    def encode(self, features: Ragged) -> Tensor:
        """Codes int64 [n, L_m] of n items by their feature tokens, float rows of D_m."""
        x = torch.from_numpy(mean_tokens(features)).to(self.mean.device)
        x -= self.mean
        x /= self.std
        codes = encode(x, self.books, beam=self.beam)
        return mark_absent(codes, torch.from_numpy(features.lengths > 0), self.books.sizes)

    def save(self, writer: ArtifactWriter) -> None:
        """Write `level.<l>` float32 [K_l, D_m], `mean`, `std` float32 [D_m]."""
        tensors = {f"level.{level}": book for level, book in enumerate(self.books.levels)}
        writer.save_safetensors(codebooks_file(self.name), {**tensors, "mean": self.mean, "std": self.std})

    @classmethod
    def load(cls, artifact: Artifact, name: str, *, device: torch.device | str = "cpu") -> ModalityQuantizer:
        """One modality's quantizer of an artifact of kind `quantizer`.

        Raises:
            DataError: The file is missing or damaged.
        """
        stored = {key: t.to(device) for key, t in artifact.load_safetensors(codebooks_file(name)).items()}
        depth = sum(key.startswith("level.") for key in stored)
        books = Codebooks(tuple(stored[f"level.{level}"] for level in range(depth)))
        return cls(name, stored["mean"], stored["std"], books, beam=int(artifact.meta["beam"]))


@dataclass(frozen=True)
class FittedModalities:
    """All further modalities of a quantizer, in the order of the configuration.

    Attributes:
        quantizers: One per modality.
        codes: Of all items, unsigned [N, Σ L_m].
        errors: Per modality the squared error of held-out items after 0, 1, … L_m levels.
    """

    quantizers: tuple[ModalityQuantizer, ...]
    codes: NDArray[np.unsignedinteger[Any]]
    errors: tuple[Tensor, ...]

    def save(self, writer: ArtifactWriter) -> None:
        """Write `modality_codes.npy` and one file of codebooks per modality; nothing where there is none."""
        if self.quantizers:
            writer.save_npy(MODALITY_CODES, self.codes)
        for quantizer in self.quantizers:
            quantizer.save(writer)

    def meta(self) -> list[dict[str, Any]]:
        """Name and codes per level of every modality, in the order of the columns."""
        return [{"name": q.name, "levels": list(q.sizes)} for q in self.quantizers]

    def figures(self) -> dict[str, Any]:
        """For quality.json: usage and held-out R² per level over the items that have the modality."""
        out: dict[str, Any] = {}
        first = 0
        for quantizer, errors in zip(self.quantizers, self.errors, strict=True):
            sizes = quantizer.books.sizes
            codes = self.codes[:, first : first + len(sizes)]
            codes = codes[codes[:, 0] < sizes[0]]
            levels = level_usage(codes, sizes)
            for level, figures in enumerate(levels):
                figures["r2_held_out"] = 1.0 - float(errors[level + 1]) / max(float(errors[0]), 1e-300)
            out[quantizer.name] = {"present": len(codes), "levels": levels}
            first += len(sizes)
        return out


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
        mean, std = _standardise(x, plan, shard, ctx)
        fit = plan.present if shard.train is None else plan.present & shard.train
        part = Shard(x, shard.start, shard.total, fit)
        books = _fit(part, plan, config, comm=ctx, seed=_seed(ctx, plan), memory=memory, report=report)
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


def mean_tokens(features: Ragged) -> NDArray[np.float32]:
    """Mean feature token of every item, float32 [n, D]; zeros where it has none."""
    out = np.zeros((len(features), features.values.shape[1]), np.float32)
    have = features.lengths > 0
    if have.any():
        # Items without tokens take no values, so the starts of the others cut all values into theirs.
        sums = np.add.reduceat(features.values.astype(np.float32), features.offsets[:-1][have], axis=0)
        out[have] = sums / features.lengths[have, None].astype(np.float32)
    return out


def mark_absent(codes: Tensor, present: Tensor, sizes: Sequence[int]) -> Tensor:
    """Codes int64 [n, L_m], where `present` bool [n] is False replaced by the code K_l of the level."""
    absent = torch.tensor(list(sizes), dtype=torch.int64, device=codes.device)
    return torch.where(present.to(codes.device)[:, None], codes, absent)


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


def _standardise(x: Tensor, plan: Plan, shard: Shard, comm: Collective) -> tuple[Tensor, Tensor]:
    """Standardise the rows that have the modality in place, the others stay 0; mean and deviation [D_m].

    As `chunks.standardisation`, over some of the rows.
    """
    part = Shard(x, shard.start, shard.total)
    bound = max_abs(part, comm)

    def mean_of(centre: Tensor | None, limit: float) -> Tensor:
        fixed = FixedPoint.of(plan.num_present, limit)

        def body(grains: range) -> Tensor:
            out = torch.zeros(plan.width, dtype=torch.int64, device=x.device)
            for g in grains:
                rows = part.grain(g)
                have = x[rows][plan.present[rows]].double()
                out += fixed.encode((have if centre is None else (have - centre) ** 2).sum(0))
            return out

        sums = sum_of(parallel(part.num_grains, body, device=x.device))
        comm.all_reduce(sums)
        return fixed.decode(sums) / plan.num_present

    mean = mean_of(None, bound)
    std = mean_of(mean, (2 * bound) ** 2).sqrt()
    flat = std <= 1e-7 * max(bound, 1e-30)
    narrow = mean.float(), torch.where(flat, torch.ones_like(std), std).float()
    x -= narrow[0]
    x /= narrow[1]
    x[~plan.present] = 0
    return narrow


def _fit(
    shard: Shard,
    plan: Plan,
    config: QuantizerConfig,
    *,
    comm: Collective,
    seed: int,
    memory: FitMemory,
    report: Report,
) -> Codebooks:
    finished: list[Tensor] = []
    for step, size in zip(plan.steps, plan.sizes, strict=True):
        kept = memory.load(step, [(size, plan.width)])
        if kept is None:
            break
        finished.append(kept[0])
        report(step, {})

    def on_level(level: int, result: KMeans) -> None:
        memory.save(plan.steps[level], [result.centroids])
        figures = {"inertia": result.inertia, "iterations": result.iterations, "reseeded": result.reseeded}
        report(plan.steps[level], figures)

    return fit_levels(
        shard,
        plan.sizes,
        comm=comm,
        seed=seed,
        seeding=config.seeding,
        warmup=config.warmup,
        iterations=config.iterations,
        full_passes=config.full_passes,
        max_sample=config.sample,
        finished=finished,
        on_level=on_level,
    )
