"""The whole fit: residual k-means, then the steps of RVQ that prove themselves on held-out items."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from qbrec.config.stages import QuantizerConfig
from qbrec.errors import CheckpointError, ConfigError
from qbrec.quantizer.kmeans.chunks import Collective, FixedPoint, Shard, max_abs
from qbrec.quantizer.kmeans.lloyd import KMeans
from qbrec.quantizer.packing import code_bits
from qbrec.quantizer.refine import MovingAverages, least_squares, revive
from qbrec.quantizer.rvq import Codebooks, decode, encode, fit_levels
from qbrec.storage.artifact import write_atomic

LARGE_CATALOGUE = 10_000_000  # items from which `auto` takes larger levels: 256^4 cells become crowded
ITEMS_PER_CODE = 8  # `auto` shrinks the levels of a tiny catalogue until every code can have some
MAX_LEVELS = 26  # one letter each in the text form of an ID

Report = Callable[[str, dict[str, float]], None]


def resolve_levels(
    levels: Literal["auto"] | tuple[int, ...], *, num_items: int, num_train: int, further: int = 0
) -> tuple[int, ...]:
    """Codes per level.

    `auto`: 4 x 256 below ten million items, 4 x 2048 from there on; below 2,048 items the largest power of
    two that leaves 8 items per code.

    Args:
        levels: From the configuration.
        num_items: N.
        num_train: Items that the fit sees.
        further: Levels that collisions will add.

    Raises:
        ConfigError: An ID does not fit into 63 bits, or a level has more codes than there are items to fit.
    """
    if levels == "auto":
        if num_items >= LARGE_CATALOGUE:
            return (2048,) * 4
        return (min(256, 1 << max(1, (num_items // ITEMS_PER_CODE).bit_length() - 1)),) * 4
    code_bits(levels)
    if len(levels) + further > MAX_LEVELS:
        raise ConfigError(
            f"{len(levels) + further} levels are more than the letters of `<a_12><b_7>`",
            where="quantizer.levels",
            fix=f"use at most {MAX_LEVELS - further} levels",
        )
    if max(levels) > num_train:
        raise ConfigError(
            f"a level has {max(levels)} codes, but only {num_train} items are there to fit them",
            where="quantizer.levels",
            fix="use smaller levels, or `auto`",
        )
    return levels


class FitMemory:
    """Finished steps of a fit on disk, so that a killed one goes on with the next step, bit for bit the same.

    A step is `<step>.safetensors`, then `<step>.json` with its hash and the key of the artifact it belongs
    to; both appear by rename. Rank 0 reads and writes, the others are told.

    Args:
        directory: Where the steps lie.
        key: Key of the artifact under construction; steps of another key do not count.
        comm: Process group.
        device: Where tensors go.
    """

    def __init__(self, directory: Path, *, key: str, comm: Collective, device: torch.device) -> None:
        self.directory, self.key, self.comm, self.device = directory, key, comm, device

    def save(self, step: str, tensors: Sequence[Tensor]) -> None:
        """Keep the result of a step; call on every rank."""
        if self.comm.rank != 0:
            return
        from safetensors.torch import save

        self.directory.mkdir(parents=True, exist_ok=True)
        data = save({str(i): t.cpu().contiguous() for i, t in enumerate(tensors)})
        write_atomic(self.directory / f"{step}.safetensors", data)
        note = {"key": self.key, "sha256": hashlib.sha256(data).hexdigest()}
        write_atomic(self.directory / f"{step}.json", json.dumps(note).encode())

    def load(self, step: str, shapes: Sequence[tuple[int, int]]) -> tuple[Tensor, ...] | None:
        """Result of a finished step on every rank, or None; call on every rank.

        Raises:
            CheckpointError: The step's file is damaged.
        """
        found = self._read(step) if self.comm.rank == 0 else None
        flag = torch.tensor([found is not None], dtype=torch.uint8, device=self.device)
        self.comm.broadcast(flag)
        if not int(flag):
            return None
        out = found or tuple(torch.empty(shape, dtype=torch.float32) for shape in shapes)
        placed = tuple(t.to(self.device).contiguous() for t in out)
        for tensor in placed:
            self.comm.broadcast(tensor)
        return placed

    def _read(self, step: str) -> tuple[Tensor, ...] | None:
        from safetensors.torch import load

        note, path = self.directory / f"{step}.json", self.directory / f"{step}.safetensors"
        if not note.is_file():
            return None
        kept = json.loads(note.read_text(encoding="utf-8"))
        if kept["key"] != self.key:
            return None  # left by another configuration of this run; the step is about to be replaced
        data = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(data).hexdigest() != kept["sha256"]:
            raise CheckpointError(
                "a checkpoint of the quantizer is damaged",
                where=str(path),
                fix=f"delete the folder {self.directory}: the codebooks are fitted again",
            )
        tensors = load(data)
        return tuple(tensors[str(i)] for i in range(len(tensors)))


def held_out_error(shard: Shard, books: Codebooks, *, comm: Collective, beam: int) -> float:
    """Mean squared error of the items that the fit did not see (of all items where none were held out)."""
    x = shard.x if shard.train is None else shard.x[~shard.train]
    left = (x - decode(encode(x, books, beam=beam), books)).double()
    farthest = (max_abs(shard, comm) + books.magnitude) ** 2 * x.shape[1]
    fixed = FixedPoint.of(shard.total, farthest)
    error = torch.stack([fixed.encode((left * left).sum(1)).sum(), torch.tensor(len(x), device=x.device)])
    comm.all_reduce(error)
    return float(fixed.decode(error[0])) / max(int(error[1]), 1)


def fit_saved_levels(
    shard: Shard,
    sizes: Sequence[int],
    names: Sequence[str],
    *,
    config: QuantizerConfig,
    comm: Collective,
    seed: int,
    memory: FitMemory | None,
    report: Report,
) -> Codebooks:
    """Residual k-means whose levels are kept as they are finished; those that are there are not fitted again.

    Args:
        shard: This rank's standardised rows.
        sizes: Codes per level.
        names: Step that each level is kept and reported as.
        config: Lengths of k-means.
        comm: Process group.
        seed: See `fit_levels`.
        memory: Where finished levels are kept; None: nowhere.
        report: Called on every rank after each level with its name and figures.
    """
    finished: list[Tensor] = []
    for name, size in zip(names, sizes, strict=True):
        kept = memory.load(name, [(size, shard.x.shape[1])]) if memory else None
        if kept is None:
            break
        finished.append(kept[0])
        report(name, {})

    def on_level(level: int, result: KMeans) -> None:
        if memory:
            memory.save(names[level], [result.centroids])
        figures: dict[str, float] = {"iterations": result.iterations, "reseeded": result.reseeded}
        if math.isfinite(result.inertia):  # nothing was measured where no pass went over all rows
            figures["inertia"] = result.inertia
        report(names[level], figures)

    return fit_levels(
        shard,
        sizes,
        comm=comm,
        seed=seed,
        finished=finished,
        on_level=on_level,
        seeding=config.seeding,
        warmup=config.warmup,
        iterations=config.iterations,
        full_passes=config.full_passes,
        max_sample=config.sample,
    )


def fit_codebooks(
    shard: Shard,
    sizes: Sequence[int],
    *,
    config: QuantizerConfig,
    comm: Collective,
    seed: int,
    memory: FitMemory | None = None,
    report: Report = lambda step, figures: None,
) -> Codebooks:
    """Fit all levels.

    `rq_kmeans`: k-means level by level on residuals. `rvq` goes on: epochs of joint moving averages, then
    least squares of all codebooks, each kept only if it lowers the held-out error. At last unused codes are
    moved.

    Args:
        shard: This rank's standardised rows; `shard.train` says which ones the fit sees.
        sizes: Codes per level.
        config: Method and lengths.
        comm: Process group.
        seed: Seeds sampling, k-means++ and the order of batches.
        memory: Where finished steps are kept; None: nowhere.
        report: Called on every rank after each step with its name and figures.

    Returns:
        The same codebooks, bit for bit, on every rank and for any number of ranks and threads.
    """
    shapes = [(size, shard.x.shape[1]) for size in sizes]
    names = [f"level-{level}" for level in range(len(sizes))]
    books = fit_saved_levels(
        shard, sizes, names, config=config, comm=comm, seed=seed, memory=memory, report=report
    )
    before: float | None = None
    for step, change in _steps(shard, config, comm, seed):
        kept = memory.load(step, shapes) if memory else None
        figures: dict[str, float] = {}
        if kept is not None:
            books, before = Codebooks(kept), None
        else:
            if before is None:
                before = held_out_error(shard, books, comm=comm, beam=config.beam)
            changed = change(books)
            after = held_out_error(shard, changed, comm=comm, beam=config.beam)
            if after < before or step == "revive":
                books = changed
            if memory:
                memory.save(step, books.levels)
            figures = {"held_out_before": before, "held_out_after": after, "kept": float(books is changed)}
            before = after if books is changed else before
        report(step, figures)
    return books


def step_names(config: QuantizerConfig, num_levels: int) -> list[str]:
    """Every step that `fit_codebooks` reports, in order."""
    names = [f"level-{level}" for level in range(num_levels)]
    if config.method == "rvq":
        names += ["averages"] if config.refine_epochs else []
        names += [f"solve-{i}" for i in range(config.refine_solves)]
    return [*names, "revive"]


def _steps(
    shard: Shard, config: QuantizerConfig, comm: Collective, seed: int
) -> list[tuple[str, Callable[[Codebooks], Codebooks]]]:
    def averages(books: Codebooks) -> Codebooks:
        moving = MovingAverages(shard, books, comm=comm, seed=seed + 1000)
        for epoch in range(config.refine_epochs):
            moving.epoch(epoch)
        return moving.books

    def solve(books: Codebooks) -> Codebooks:
        return least_squares(shard, books, comm=comm, beam=config.beam)

    by_name = {"averages": averages, "revive": lambda books: revive(shard, books, comm=comm)}
    return [(name, by_name.get(name, solve)) for name in step_names(config, 0)]
