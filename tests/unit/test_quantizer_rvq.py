"""RVQ: encoding against brute force, least squares against a dense solve, dead codes, resuming."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from qbrec.config.stages import QuantizerConfig
from qbrec.errors import CheckpointError, ConfigError
from qbrec.quantizer.fit import FitMemory, fit_codebooks, held_out_error, resolve_levels, step_names
from qbrec.quantizer.kmeans.chunks import Alone, Shard, batches, stratified
from qbrec.quantizer.refine import RIDGE, MovingAverages, least_squares, revive
from qbrec.quantizer.rvq import Codebooks, decode, encode, fit_levels, prefix_errors
from tests.support.clusters import clustered


def _shard(rows: int = 3000, width: int = 10) -> Shard:
    x = clustered(rows, width)
    train = torch.ones(rows, dtype=torch.bool)
    train[torch.from_numpy(stratified(rows, rows // 10, seed=4))] = False
    return Shard(x, 0, rows, train)


def _random_books(*sizes: int, width: int = 6) -> Codebooks:
    generator = torch.Generator().manual_seed(0)
    return Codebooks(tuple(torch.randn(s, width, generator=generator) / 2**i for i, s in enumerate(sizes)))


def _used(x: Tensor, books: Codebooks) -> list[int]:
    codes = encode(x, books)
    return [len(codes[:, level].unique()) for level in range(codes.shape[1])]


def test_greedy_encoding_is_nearest_level_by_level() -> None:
    books, x = _random_books(9, 5, 12), clustered(1500, 6)
    codes, residual = encode(x, books), x.double()
    for level, book in enumerate(books.levels):
        nearest = torch.cdist(residual, book.double()).argmin(1)
        assert (codes[:, level] == nearest).float().mean() > 0.999
        residual = residual - book[codes[:, level]].double()
    assert torch.allclose(decode(codes, books), x - residual.float(), atol=1e-5)
    assert torch.equal(decode(codes[:, :1], books), books.levels[0][codes[:, 0]])


def test_wide_beam_finds_the_best_of_all_codes() -> None:
    books, x = _random_books(6, 4, 5), clustered(300, 6)
    every = torch.tensor(list(itertools.product(range(6), range(4), range(5))))
    best = every[torch.cdist(x.double(), decode(every, books).double()).argmin(1)]
    assert torch.equal(encode(x, books, beam=24), best)
    error = [
        float((x - decode(encode(x, books, beam=b), books)).square().sum(1).mean()) for b in (1, 2, 4, 24)
    ]
    assert error == sorted(error, reverse=True)
    assert error[0] > error[-1]


def test_levels_shrink_the_error_and_use_all_codes() -> None:
    shard = _shard()
    books = fit_levels(shard, (32, 16, 24), comm=Alone(), seed=0, iterations=8)
    assert books.sizes == (32, 16, 24)
    errors, count = prefix_errors(shard, encode(shard.x, books), books, comm=Alone(), held_out=False)
    assert count == 3000
    assert (errors.diff() < 0).all()
    direct = (shard.x - decode(encode(shard.x, books), books)).double().square().sum()
    assert float(errors[-1]) == pytest.approx(float(direct), rel=1e-5)
    assert _used(shard.x, books) == [32, 16, 24]


def test_least_squares_equals_a_dense_solve() -> None:
    shard = _shard(800, 6)
    books = _random_books(7, 5, 4)
    codes = encode(shard.x, books)
    got = torch.cat(least_squares(shard, books, comm=Alone()).levels).double().numpy()
    kept = shard.train.numpy()
    x, code = shard.x.double().numpy()[kept], (codes + torch.tensor([0, 7, 12])).numpy()[kept]
    design = np.zeros((len(x), 16))
    np.put_along_axis(design, code, 1.0, axis=1)
    old = torch.cat(books.levels).double().numpy()
    want = np.linalg.solve(design.T @ design + RIDGE * np.eye(16), design.T @ x + RIDGE * old)
    # Codebooks may shift against each other at next to no cost; what they decode to is determined.
    np.testing.assert_allclose(design @ got, design @ want, atol=5e-3)
    before, after, best = (((x - design @ c) ** 2).sum() for c in (old, got, want))
    assert after < 0.9 * before
    assert after == pytest.approx(best, rel=1e-5)


def test_refinement_lowers_the_held_out_error() -> None:
    shard = _shard(6000, 12)
    errors = {}
    for name, config in {
        "rq_kmeans": QuantizerConfig(method="rq_kmeans", iterations=8),
        "rvq": QuantizerConfig(method="rvq", iterations=8),
        "solve only": QuantizerConfig(method="rvq", iterations=8, refine_epochs=0, refine_solves=2),
    }.items():
        books = fit_codebooks(shard, (16, 16, 16), config=config, comm=Alone(), seed=0)
        errors[name] = held_out_error(shard, books, comm=Alone(), beam=1)
        assert _used(shard.x, books) == [16, 16, 16]
    assert errors["rvq"] < errors["rq_kmeans"]
    assert errors["solve only"] < errors["rq_kmeans"]


def test_moving_averages_restart_dead_codes() -> None:
    shard = _shard(6000, 8)
    good = fit_levels(shard, (16, 8), comm=Alone(), seed=0, iterations=4)
    broken = Codebooks((good.levels[0].clone(), good.levels[1].clone()))
    broken.levels[0][3:] = 40.0  # 13 codes that nothing is near to
    assert _used(shard.x, broken)[0] == 3
    moving = MovingAverages(shard, broken, comm=Alone(), seed=1)
    for epoch in range(3):
        moving.epoch(epoch)
    assert _used(shard.x, moving.books)[0] == 16
    left = held_out_error(shard, moving.books, comm=Alone(), beam=1)
    assert left < 0.7 * held_out_error(shard, broken, comm=Alone(), beam=1)


def test_revive_moves_only_unused_codes() -> None:
    shard = _shard(2000, 8)
    good = fit_levels(shard, (16, 8), comm=Alone(), seed=0, iterations=4)
    broken = Codebooks((good.levels[0], good.levels[1].clone()))
    broken.levels[1][[2, 5]] = 99.0
    mended = revive(shard, broken, comm=Alone())
    assert _used(shard.x, mended) == [16, 8]
    same = (mended.levels[1] == broken.levels[1]).all(1)
    assert same.tolist() == [i not in (2, 5) for i in range(8)]
    assert torch.equal(mended.levels[0], good.levels[0])


@pytest.mark.parametrize("grains", [1, 2, 7, 40, 700])
def test_batches_hold_every_grain_once_and_spread_over_the_rows(grains: int) -> None:
    epoch = batches(grains, seed=3)
    assert sorted(np.concatenate(epoch).tolist()) == list(range(grains))
    if grains >= 40:
        halves = [int((b < grains / 2).sum()) for b in epoch[:-1]]
        assert all(abs(2 * h - len(b)) <= 1 for h, b in zip(halves, epoch[:-1], strict=True))
        assert [b.tolist() for b in epoch] != [b.tolist() for b in batches(grains, seed=4)]


def test_a_cut_off_fit_goes_on_bit_for_bit(tmp_path: Path) -> None:
    shard, config = _shard(2500, 8), QuantizerConfig(iterations=4)
    want = fit_codebooks(shard, (16, 8, 8), config=config, comm=Alone(), seed=1)
    names = step_names(config, 3)
    assert names == ["level-0", "level-1", "level-2", "averages", "solve-0", "revive"]
    for cut in ("level-1", "averages", "solve-0"):
        memory = FitMemory(tmp_path / cut, key="k1", comm=Alone(), device=torch.device("cpu"))

        def stop(step: str, figures: dict[str, float], cut: str = cut) -> None:
            if step == cut:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fit_codebooks(shard, (16, 8, 8), config=config, comm=Alone(), seed=1, memory=memory, report=stop)
        seen: dict[str, dict[str, float]] = {}
        got = fit_codebooks(
            shard, (16, 8, 8), config=config, comm=Alone(), seed=1, memory=memory, report=seen.__setitem__
        )
        assert all(torch.equal(a, b) for a, b in zip(got.levels, want.levels, strict=True))
        assert [name for name in names if not seen[name]] == names[: names.index(cut) + 1], (
            "done steps are read"
        )


def test_checkpoints_of_another_key_do_not_count_and_damage_is_named(tmp_path: Path) -> None:
    memory = FitMemory(tmp_path, key="k1", comm=Alone(), device=torch.device("cpu"))
    book = torch.arange(6.0).reshape(2, 3)
    memory.save("level-0", [book])
    loaded = memory.load("level-0", [(2, 3)])
    assert loaded is not None
    assert torch.equal(loaded[0], book)
    other = FitMemory(tmp_path, key="k2", comm=Alone(), device=torch.device("cpu"))
    assert other.load("level-0", [(2, 3)]) is None
    path = tmp_path / "level-0.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=r"level-0\.safetensors"):
        memory.load("level-0", [(2, 3)])


@pytest.mark.parametrize(
    ("items", "want"),
    [
        (10, 2),
        (40, 4),
        (500, 32),
        (2047, 128),
        (2048, 256),
        (3000, 256),
        (9_999_999, 256),
        (10_000_000, 2048),
    ],
)
def test_auto_levels(items: int, want: int) -> None:
    assert resolve_levels("auto", num_items=items, num_train=items) == (want,) * 4


@pytest.mark.parametrize(
    ("levels", "message"),
    [((8192,) * 5, "63"), ((64, 512), "512 codes"), ((2,) * 27, "27 levels")],
)
def test_impossible_levels_are_refused(levels: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_levels(levels, num_items=400, num_train=400)


def test_a_digit_needs_a_letter_as_well() -> None:
    assert len(resolve_levels((2,) * 26, num_items=400, num_train=400)) == 26
    with pytest.raises(ConfigError, match="27 levels"):
        resolve_levels((2,) * 26, num_items=400, num_train=400, further=1)
