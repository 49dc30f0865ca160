"""The loader: one order for any number of ranks, exact resume, a thread that ends."""

from __future__ import annotations

import itertools
import threading
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qbrec.errors import DataError
from qbrec.storage.blocks import BlockSet, BlockTarWriter, RaggedField, write_block_index
from qbrec.storage.loader import BatchLoader
from qbrec.storage.order import SampleOrder

SIZES = [5, 9, 1, 14, 3, 8, 8, 2, 11, 7, 6, 10]  # 84 samples
ROWS = RaggedField("row", offsets="offset")
TEXT = RaggedField("feature.text", counts="tokens.text")


@pytest.fixture(scope="module")
def block_set(tmp_path_factory):
    directory = tmp_path_factory.mktemp("loader")
    rng = np.random.default_rng(0)
    writer = BlockTarWriter(directory, prefix="x", shard_bytes=20_000)
    first = 0
    for size in SIZES:
        lengths = rng.integers(0, 5, size)
        tokens = rng.integers(0, 3, size).astype(np.uint8)
        fields = {
            "number": np.arange(first, first + size),
            "cut": rng.integers(0, 9, (size, 2)).astype(np.int32),
            "offset": np.concatenate([[0], np.cumsum(lengths)]),
            "row": rng.integers(0, 1000, lengths.sum()),
            "tokens.text": tokens,
            "feature.text": rng.standard_normal((tokens.sum(), 3)).astype(np.float16),
        }
        writer.add(fields, size)
        first += size
    write_block_index(directory / "blocks.x.npy", [writer.close()])
    return BlockSet.open(directory, "x")


def loader_of(block_set, *, rank=0, world=1, **options):
    options = {
        "batch_size": 20,
        "micro_batch": 4,
        "seed": 3,
        "fields": ["number"],
        "window_blocks": 4,
        "collate": lambda fields, samples, epoch: (fields, samples, epoch),
    } | options
    return BatchLoader(block_set, rank=rank, world=world, **options)


def micro_batches(block_set, world, epoch, *, start=0, stop=None, **options):
    """Micro-batches of all ranks, put back into the global order: {(step, j): sample numbers}."""
    found = {}
    lengths = set()
    for rank in range(world):
        loader = loader_of(block_set, rank=rank, world=world, **options)
        stop = loader.steps_per_epoch if stop is None else stop
        steps = start
        for step, batches in enumerate(
            itertools.islice(loader.iterate(epoch, start=start), stop - start), start
        ):
            lengths.add(len(batches))
            for slot, batch in enumerate(batches):
                if batch is not None:
                    fields, samples, seen_epoch = batch
                    np.testing.assert_array_equal(fields["number"], samples)
                    assert seen_epoch == epoch
                    found[step, slot * world + rank] = samples.tolist()
            steps += 1
        assert steps == stop
        assert lengths <= {loader.micro_steps}
    return dict(sorted(found.items()))


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=40),
    window=st.integers(1, 8),
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 2**40),
)
@settings(deadline=None)
def test_order_is_a_permutation_with_random_access(sizes, window, seed, epoch):
    order = SampleOrder(np.array(sizes), seed=seed, window_blocks=window).epoch(epoch)
    pairs = [pair for blocks, local in order for pair in zip(blocks.tolist(), local.tolist(), strict=True)]
    assert sorted(pairs) == [(block, i) for block, size in enumerate(sizes) for i in range(size)]
    for position, pair in enumerate(pairs):
        number = order.window_of(position)
        blocks, local = order.window(number)
        place = position - order.window_starts[number]
        assert (blocks[place], local[place]) == pair
        assert len(set(blocks.tolist())) <= window


def test_order_depends_on_seed_and_epoch_and_is_well_mixed():
    sizes = np.full(64, 50)

    def numbers(seed, epoch):
        parts = [50 * blocks + local for blocks, local in SampleOrder(sizes, seed=seed).epoch(epoch)]
        return np.concatenate(parts)

    base = numbers(0, 0)
    np.testing.assert_array_equal(base, numbers(0, 0))
    for other in (numbers(0, 1), numbers(1, 0)):
        assert (base == other).mean() < 0.01
        assert abs(np.corrcoef(base, other)[0, 1]) < 0.1
    batch = base[:64]
    assert len(set((batch // 50).tolist())) >= 12  # a batch draws on most blocks of its window


def test_order_is_pinned():
    """The one golden value: an order that changes between versions breaks the resumption of every run."""
    order = SampleOrder(np.array([3, 2, 4]), seed=7, window_blocks=2)
    parts = [list(zip(*map(np.ndarray.tolist, window), strict=True)) for window in order.epoch(1)]
    assert parts == [[(1, 0), (0, 0), (0, 2), (0, 1), (1, 1)], [(2, 1), (2, 2), (2, 0), (2, 3)]]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_every_world_sees_the_same_micro_batches(block_set, world, prefetch):
    for batch_size, micro_batch in ((20, 4), (13, 5), (7, 7), (200, 6), (3, 8)):
        options = {"batch_size": batch_size, "micro_batch": micro_batch, "prefetch": prefetch}
        alone = micro_batches(block_set, 1, 2, **options | {"prefetch": 0})
        assert micro_batches(block_set, world, 2, **options) == alone
        samples = [sample for batch in alone.values() for sample in batch]
        parts = SampleOrder(np.array(SIZES), seed=3, window_blocks=4).epoch(2)
        expected = np.concatenate([block_set.starts[blocks] + local for blocks, local in parts])
        assert samples == expected.tolist()


def test_grid_of_worlds_prefetch_selection_and_resumption(block_set):
    """One list in one order: for any number of ranks, made ahead or not, of all samples or some."""
    select = np.random.default_rng(5).random(block_set.num_samples) < 0.6
    for chosen in (None, select):
        options = {"select": chosen, "window_blocks": 3}
        whole = micro_batches(block_set, 1, 1, prefetch=0, **options)
        sizes = (
            SIZES if chosen is None else [int(part.sum()) for part in np.split(chosen, np.cumsum(SIZES)[:-1])]
        )
        places = np.arange(sum(SIZES)) if chosen is None else np.flatnonzero(chosen)
        starts = np.cumsum([0, *sizes])
        order = SampleOrder(np.array(sizes), seed=3, window_blocks=3).epoch(1)
        expected = np.concatenate([places[starts[blocks] + local] for blocks, local in order])
        assert [sample for batch in whole.values() for sample in batch] == expected.tolist()
        for world, prefetch in itertools.product((1, 2, 3, 4, 8), (0, 1, 2, 5)):
            assert micro_batches(block_set, world, 1, prefetch=prefetch, **options) == whole
            cut, later = 2, {1: 4, 2: 3, 3: 8, 4: 1, 8: 2}[world]  # goes on with another number of ranks
            before = micro_batches(block_set, world, 1, stop=cut, prefetch=prefetch, **options)
            after = micro_batches(block_set, later, 1, start=cut, prefetch=prefetch, **options)
            assert before
            assert after
            assert list((before | after).items()) == list(whole.items())


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_resume_in_the_middle_continues_with_the_next_sample(block_set, data):
    world, later_world = (data.draw(st.sampled_from([1, 2, 3, 4, 8])) for _ in range(2))
    options = {
        "prefetch": data.draw(st.sampled_from([0, 1, 2, 5])),
        "batch_size": data.draw(st.integers(1, 90)),
        "micro_batch": data.draw(st.integers(1, 30)),
        "window_blocks": data.draw(st.integers(1, 13)),
    }
    if data.draw(st.booleans()):
        chosen = data.draw(st.sets(st.integers(0, sum(SIZES) - 1), min_size=1))
        options["select"] = np.isin(np.arange(sum(SIZES)), list(chosen))
    whole = micro_batches(block_set, 1, 1, **options | {"prefetch": 0})
    cut = data.draw(st.integers(0, loader_of(block_set, **options).steps_per_epoch))
    before = micro_batches(block_set, world, 1, stop=cut, **options)
    after = micro_batches(block_set, later_world, 1, start=cut, **options)
    assert list((before | after).items()) == list(whole.items())
    assert not before.keys() & after.keys()


def test_fingerprint_tells_orders_apart(block_set):
    fingerprint = loader_of(block_set).fingerprint
    select = np.ones(block_set.num_samples, bool)
    select[5] = False
    for options in ({"seed": 4}, {"batch_size": 21}, {"window_blocks": 5}, {"select": select}):
        assert loader_of(block_set, **options).fingerprint != fingerprint
    assert loader_of(block_set, rank=1, world=2, micro_batch=5, prefetch=0).fingerprint == fingerprint


@dataclass(frozen=True)
class Nested:
    rows: torch.Tensor
    features: dict[str, torch.Tensor]
    pair: tuple[torch.Tensor, int]
    epoch: int


def nested(fields, samples, epoch):
    rows = torch.from_numpy(fields["number"])
    return Nested(rows, {"double": rows * 2}, (rows + 1, len(samples)), epoch)


def tensors_of(batch):
    return [batch.rows, batch.features["double"], batch.pair[0]]


@pytest.mark.parametrize("pin", [False, True])
def test_pinning_reaches_every_tensor_in_the_thread_of_the_loader(block_set, pin, monkeypatch):
    pinned_in = []

    def pin_memory(tensor):  # what a machine without CUDA cannot do
        pinned_in.append(threading.current_thread().name)
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    loader = loader_of(block_set, collate=nested, pin=pin)
    plain = loader_of(block_set, collate=nested)
    for batches, expected in zip(loader.iterate(1), plain.iterate(1), strict=True):
        for batch, same in zip(batches, expected, strict=True):
            assert (batch is None) == (same is None)
            if batch is not None:
                assert all(map(torch.equal, tensors_of(batch), tensors_of(same)))
                assert (batch.pair[1], batch.epoch) == (same.pair[1], 1)
    assert len(pinned_in) == (3 * 21 if pin else 0)  # 84 samples in micro-batches of 4
    assert all(name.startswith("qbrec-ahead") for name in pinned_in)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("pin", [False, True])
def test_pinned_batches_on_a_gpu_machine(block_set, pin):
    seen = []
    for batches in loader_of(block_set, collate=nested, pin=pin).iterate(0):
        for batch in (batch for batch in batches if batch is not None):
            assert all(tensor.is_pinned() == pin for tensor in tensors_of(batch))
            seen += batch.rows.to("cuda", non_blocking=True).tolist()
    assert sorted(seen) == list(range(block_set.num_samples))


@pytest.mark.parametrize("world", [1, 3])
def test_all_fields_match_storage(block_set, world):
    fields = ["number", "cut", "tokens.text", ROWS, TEXT]
    rows, text, cut = block_set.ragged(ROWS), block_set.ragged(TEXT), block_set.column("cut")
    seen = 0
    for rank in range(world):
        # Batches of 30 samples cross the borders of windows of two blocks.
        loader = loader_of(
            block_set, rank=rank, world=world, fields=fields, batch_size=60, micro_batch=30, window_blocks=2
        )
        for gathered, samples, _ in (b for batches in loader.iterate(0) for b in batches if b is not None):
            assert list(gathered) == ["number", "cut", "tokens.text", "row", "feature.text"]
            np.testing.assert_array_equal(gathered["cut"], cut[samples])
            for name, whole in (("row", rows), ("feature.text", text)):
                np.testing.assert_array_equal(gathered[name].values, whole.take(samples).values)
                np.testing.assert_array_equal(gathered[name].offsets, whole.take(samples).offsets)
            seen += len(samples)
    assert seen == block_set.num_samples


@pytest.mark.parametrize("world", [1, 2, 4])
def test_selected_samples_only(block_set, world):
    select = np.random.default_rng(1).random(block_set.num_samples) < 0.4
    select[: SIZES[0] + SIZES[1]] = False  # two blocks give nothing
    batches = micro_batches(block_set, world, 1, select=select)
    assert batches == micro_batches(block_set, 1, 1, select=select)
    samples = [sample for batch in batches.values() for sample in batch]
    assert sorted(samples) == np.flatnonzero(select).tolist()
    with pytest.raises(DataError, match="no sample"):
        loader_of(block_set, select=np.zeros(block_set.num_samples, bool))


def loader_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("qbrec-ahead")]


@pytest.mark.parametrize("prefetch", [0, 1, 4])
def test_an_error_in_collate_arrives_in_its_place(block_set, prefetch):
    def collate(fields, samples, epoch):
        if 50 in samples:
            raise DataError("bad sample", where="50")
        return samples.tolist()

    def samples_of(step):
        return [sample for batch in step if batch is not None for sample in batch]

    whole = loader_of(block_set, collate=lambda fields, samples, epoch: samples.tolist())
    expected = [samples_of(step) for step in whole.iterate(0)]
    place = next(i for i, samples in enumerate(expected) if 50 in samples)
    assert place > 0
    received = []

    def consume():
        for step in loader_of(block_set, collate=collate, prefetch=prefetch).iterate(0):
            received.append(samples_of(step))

    with pytest.raises(DataError, match="bad sample"):
        consume()
    assert received == expected[:place]
    assert not loader_threads()


def test_threads_end_when_iteration_is_broken_off(block_set):
    calls = []

    def collate(fields, samples, epoch):
        calls.append(threading.current_thread().name)
        time.sleep(0.005)
        return samples

    loader = loader_of(block_set, collate=collate, prefetch=2, batch_size=4)
    for _ in loader.iterate(0):
        assert loader_threads()
        break
    assert not loader_threads()
    made = len(calls)
    assert made <= 4  # the one taken, two ahead, one in the making
    assert all(name.startswith("qbrec-ahead") for name in calls)
    time.sleep(0.03)
    assert len(calls) == made
