"""Catalogue, semantic IDs, histories and trained encoder for `ranking.py`, kept in its scratch folder.

Vectors lie in 500 categories of 20 sub-categories each, of Zipf-like sizes. Semantic IDs are ours (residual
k-means, greedy, then `next_nearest` collisions); histories stay within few sub-categories and prefer their
popular items; the encoder is ours, trained on them for a given time.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from quantizer_scale import without_collisions

from qbrec.config.stages import MaskConfig, SequenceConfig
from qbrec.engine.candidates import Candidates
from qbrec.quantizer.kmeans.chunks import Alone, Shard
from qbrec.quantizer.packing import code_dtype
from qbrec.quantizer.rvq import encode, fit_levels
from qbrec.sequence.encoder import SequenceEncoder
from qbrec.sequence.packing import pack
from qbrec.sequence.tasks import MaskedTask
from qbrec.sequence.vocabulary import Vocabulary
from qbrec.storage.ragged import Ragged

WIDTH, CATEGORIES, SUBCATEGORIES = 32, 500, 20
CHUNK = 250_000
TRAIN_USERS, MAX_ITEMS, BATCH = 20_000, 20, 64


@dataclass(frozen=True)
class Catalogue:
    """Items of the benchmark.

    Attributes:
        codes: Semantic IDs [N, L].
        sizes: Codes per level.
        group: Sub-category of each item, int32 [N].
        popularity: Interactions of each item, int64 [N].
    """

    codes: np.ndarray
    sizes: tuple[int, ...]
    group: np.ndarray
    popularity: np.ndarray


def catalogue(items: int, sizes: tuple[int, ...], *, scratch: Path) -> Catalogue:
    """The catalogue with semantic IDs of a layout; fitted once for each scratch folder."""
    rng = np.random.default_rng(3)
    share = 1 / np.arange(1, CATEGORIES * SUBCATEGORIES + 1) ** 0.6
    group = rng.choice(len(share), items, p=rng.permutation(share / share.sum())).astype(np.int32)
    popularity = rng.zipf(1.5, items).clip(max=1_000_000).astype(np.int64)
    path = scratch / f"ids-{items}-{'x'.join(map(str, sizes))}.npy"
    if not path.exists():
        np.save(path, _semantic_ids(_vectors(group), sizes, popularity))
    return Catalogue(np.load(path), sizes, group, popularity)


def _vectors(group: np.ndarray) -> torch.Tensor:
    """float32 [N, WIDTH]: category + sub-category + the item's own part, made in chunks."""
    rng = np.random.default_rng(4)
    spectrum = (1 / np.sqrt(1 + np.arange(WIDTH) / (WIDTH / 16))).astype(np.float32)
    coarse = rng.standard_normal((CATEGORIES, WIDTH), dtype=np.float32)
    fine = rng.standard_normal((CATEGORIES * SUBCATEGORIES, WIDTH), dtype=np.float32)
    centres = (np.repeat(coarse, SUBCATEGORIES, 0) + 0.6 * fine) * spectrum
    out = torch.empty(len(group), WIDTH)
    for begin in range(0, len(group), CHUNK):
        part = group[begin : begin + CHUNK]
        own = rng.standard_normal((len(part), WIDTH), dtype=np.float32)
        out[begin : begin + len(part)] = torch.from_numpy(centres[part] + 0.5 * own * spectrum)
    return out


def _semantic_ids(x: torch.Tensor, sizes: tuple[int, ...], popularity: np.ndarray) -> np.ndarray:
    began = time.perf_counter()
    sample = x[: min(16 * max(sizes), len(x) // 4 + max(sizes))]  # the codes need be good, not the best
    books = fit_levels(
        Shard(sample, 0, len(sample)),
        sizes,
        comm=Alone(),
        seed=0,
        seeding="random",
        iterations=4,
        full_passes=0,
    )
    print(f"fitted {sizes} in {time.perf_counter() - began:.0f} s", flush=True)
    codes = np.empty((len(x), len(sizes)), code_dtype(sizes))
    for begin in range(0, len(x), CHUNK):
        codes[begin : begin + CHUNK] = encode(x[begin : begin + CHUNK], books).numpy()
    print(f"encoded after {time.perf_counter() - began:.0f} s", flush=True)
    resolution = without_collisions(x, codes, sizes, books=books, popularity=popularity)
    print(f"{resolution.moved:,} moved after {time.perf_counter() - began:.0f} s", flush=True)
    return resolution.codes


def histories(items: Catalogue, users: int, *, seed: int) -> Ragged:
    """Item rows of users: three sub-categories each, one at a time, and popular items more often."""
    rng = np.random.default_rng(seed)
    # Items of a sub-category by popularity: a draw u³ along it prefers the popular ones.
    order = np.lexsort((-items.popularity, items.group))
    counts = np.bincount(items.group, minlength=CATEGORIES * SUBCATEGORIES)
    starts = np.concatenate([[0], np.cumsum(counts)])
    lengths = np.clip(np.exp(rng.normal(2.2, 0.5, users)).round().astype(np.int64), 5, MAX_ITEMS + 1)
    busy = np.flatnonzero(counts)
    first = items.group[rng.integers(0, len(items.group), users)]
    near = first // SUBCATEGORIES * SUBCATEGORIES + rng.integers(0, SUBCATEGORIES, users)
    far = rng.choice(busy, users)
    liked = np.stack([first, np.where(counts[near] > 0, near, first), far], 1)
    user = np.repeat(np.arange(users), lengths)
    fresh = rng.random(len(user)) < 0.25
    fresh[np.concatenate([[0], np.cumsum(lengths)[:-1]])] = True
    # A visit keeps to the sub-category that its first item drew.
    visit = np.cumsum(fresh) - 1
    group = liked[user, rng.choice(3, int(visit[-1]) + 1, p=[0.6, 0.25, 0.15])[visit]]
    place = (rng.random(len(user)) ** 3 * counts[group]).astype(np.int64)
    return Ragged.from_lengths(order[starts[group] + place], lengths)


def encoder(items: Catalogue, *, seconds: float, scratch: Path) -> SequenceEncoder:
    """A masked encoder trained for `seconds` on histories; trained once for each scratch folder."""
    torch.manual_seed(0)
    config = SequenceConfig(max_items=MAX_ITEMS)
    module = SequenceEncoder(config, Vocabulary(items.sizes, ("shop",)))
    path = scratch / f"encoder-{len(items.codes)}-{'x'.join(map(str, items.sizes))}.pt"
    if path.exists():
        module.load_state_dict(torch.load(path, weights_only=True))
        return module.eval()
    candidates = Candidates(torch.arange(len(items.codes)), count=2048, seed=0)
    task = MaskedTask(
        module,
        semantic_ids=items.codes,
        masks=MaskConfig(span=0.1, tail=0.8, multi_region=0.1, partial=0.3),
        seed=0,
        candidates=candidates,
    )
    optimizer = torch.optim.AdamW(module.parameters(), 2e-3, fused=True)
    rows = histories(items, TRAIN_USERS, seed=5)
    began, step, epoch, total = time.perf_counter(), 0, 0, 0.0
    while time.perf_counter() - began < seconds:
        order = np.random.default_rng(epoch).permutation(len(rows))
        for begin in range(0, len(order) - BATCH + 1, BATCH):
            chosen = order[begin : begin + BATCH]
            batch, _ = pack(
                rows.take(chosen),
                domains=np.zeros(BATCH, np.int64),
                samples=chosen.astype(np.int64),
                epoch=epoch,
            )
            prepared, count = task.prepare(batch, torch.device("cpu"))
            loss = task.loss(module, prepared) / count
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step, total = step + 1, total + float(loss.detach())
            if step % 200 == 0:
                print(f"  {len(items.sizes)} levels, step {step}: loss {total / 200:.3f}", flush=True)
                total = 0.0
            if time.perf_counter() - began > seconds:
                break
        epoch += 1
    torch.save(module.state_dict(), path)
    return module.eval()
