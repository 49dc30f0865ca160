"""Block tars: bytes, offsets, webdataset, damage."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qbrec.errors import DataError
from qbrec.storage import block_reader
from qbrec.storage.artifact import ArtifactStore
from qbrec.storage.block_format import index_dtype, npy_header, parse_npy_header
from qbrec.storage.blocks import (
    BlockSet,
    BlockTarWriter,
    RaggedField,
    sequential_blocks,
    write_block_index,
)
from qbrec.storage.diskfull import writing

PLAIN = [np.dtype(code) for code in ("?", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8")]
TEXT = RaggedField("feature.text", counts="tokens.text")
ROWS = RaggedField("row", offsets="offset")


def item_block(rng, first, size, width=6):
    """A block like those of the catalogue: dense, ragged and entirely missing features."""
    tokens = rng.integers(0, 3, size).astype(np.uint8)
    return {
        "number": np.arange(first, first + size),
        "content": rng.integers(-(2**62), 2**62, size),
        "structure": rng.integers(-1, 100, (size, 3)).astype(np.int32),
        "tokens.text": tokens,
        "feature.text": rng.standard_normal((int(tokens.sum()), width)).astype(np.float16),
        "feature.image": np.zeros((0, 4), np.float16),
        "tokens.image": np.zeros(size, np.uint8),
    }


def write_items(directory, sizes, *, shard_bytes=20_000, seed=0):
    rng = np.random.default_rng(seed)
    blocks = []
    first = 0
    with BlockTarWriter(directory, prefix="items", shard_bytes=shard_bytes) as writer:
        for size in sizes:
            blocks.append(item_block(rng, first, size))
            writer.add(blocks[-1], size)
            first += size
    write_block_index(directory / "blocks.items.npy", [writer.close()])
    return blocks


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    array=st.sampled_from(PLAIN).flatmap(
        lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
    ),
    order=st.sampled_from(["C", "F", "swapped", "strided"]),
)
def test_any_plain_array_survives(tmp_path_factory, array, order):
    directory = tmp_path_factory.mktemp("round")
    given_array = {
        "C": array,
        "F": np.asfortranarray(array) if array.ndim else array,
        "swapped": array.astype(array.dtype.newbyteorder(">")),
        "strided": np.repeat(array, 2, axis=-1)[..., ::2] if array.ndim else array,
    }[order]
    writer = BlockTarWriter(directory, prefix="x", shard_bytes=1 << 20)
    writer.add({"a.b": given_array}, 1)
    write_block_index(directory / "blocks.x.npy", [writer.close()])
    view = BlockSet.open(directory, "x").view(0, "a.b")
    assert view.dtype == array.dtype
    assert view.shape == array.shape
    assert view.tobytes() == array.tobytes()
    assert not view.flags.writeable
    with tarfile.open(directory / "x-000000.tar") as tar:
        (member,) = tar.getmembers()
        data = tar.extractfile(member).read()
    reference = np.load(io.BytesIO(data), allow_pickle=False)
    assert reference.tobytes() == array.tobytes()
    assert reference.shape == array.shape


def test_stock_webdataset_reads_the_same(tmp_path, monkeypatch):
    wds = pytest.importorskip("webdataset")
    monkeypatch.setenv("WDS_SECURE", "1")
    sizes = [40, 1, 70, 33, 64]
    blocks = write_items(tmp_path, sizes)
    tars = sorted(str(path) for path in tmp_path.glob("*.tar"))
    assert len(tars) > 1

    def plain_npy(key, data):
        return np.load(io.BytesIO(data), allow_pickle=False) if key.endswith(".npy") else None

    for handler in (plain_npy, None):
        dataset = wds.WebDataset(tars, shardshuffle=False)
        samples = list(dataset.decode(handler) if handler else dataset.decode())
        assert [sample["__key__"] for sample in samples] == [f"items-{i:08d}" for i in range(len(sizes))]
        for sample, block in zip(samples, blocks, strict=True):
            assert {key for key in sample if not key.startswith("__")} == {f"{field}.npy" for field in block}
            for field, array in block.items():
                np.testing.assert_array_equal(sample[f"{field}.npy"], array)


def test_tar_is_plain_ustar_and_reproducible(tmp_path):
    sizes = [40, 70, 33]
    write_items(tmp_path / "a", sizes)
    write_items(tmp_path / "b", sizes)
    names = sorted(os.listdir(tmp_path / "a"))
    assert names == sorted(os.listdir(tmp_path / "b"))
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    for path in (tmp_path / "a").glob("*.tar"):
        with tarfile.open(path, format=tarfile.USTAR_FORMAT) as tar:
            members = tar.getmembers()
        assert [m.name for m in members] == sorted(m.name for m in members)
        facts = {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode, m.type) for m in members}
        assert facts == {(0, 0, 0, "", "", 0o644, tarfile.REGTYPE)}
        assert path.stat().st_size % 512 == 0


def test_overhead_of_megabyte_blocks_is_below_one_percent(tmp_path):
    rng = np.random.default_rng(0)
    blocks = [item_block(rng, 700 * i, 700, width=768) for i in range(4)]
    writer = BlockTarWriter(tmp_path, prefix="items")
    for block in blocks:
        writer.add(block, 700)
    write_block_index(tmp_path / "blocks.items.npy", [writer.close()])
    stored = sum(path.stat().st_size for path in tmp_path.iterdir())
    content = sum(array.nbytes for block in blocks for array in block.values())
    assert content < stored <= 1.01 * content
    block_set = BlockSet.open(tmp_path, "items")
    for field in ("content", "structure"):
        np.testing.assert_array_equal(block_set.column(field), np.concatenate([b[field] for b in blocks]))
    np.testing.assert_array_equal(
        block_set.ragged(TEXT).values, np.concatenate([block["feature.text"] for block in blocks])
    )


def test_read_column_ragged_take(tmp_path):
    sizes = [40, 1, 70, 33, 64]
    blocks = write_items(tmp_path, sizes)
    block_set = BlockSet.open(tmp_path, "items")
    assert block_set.num_blocks == len(sizes)
    assert block_set.num_samples == sum(sizes)
    assert block_set.block_sizes.tolist() == sizes
    for i, block in enumerate(blocks):
        views = block_set.read(i)
        assert sorted(views) == sorted(block)
        for field, view in views.items():
            np.testing.assert_array_equal(view, block[field])
    assert list(block_set.read(0, ["content"])) == ["content"]
    structure = np.concatenate([block["structure"] for block in blocks])
    np.testing.assert_array_equal(block_set.column("structure"), structure)
    edges = [0, 1, 40, 41, 100, 208]
    for start in edges:
        for stop in (stop for stop in edges if stop >= start):
            part = block_set.column("structure", start, stop)
            assert part.dtype == np.int32
            np.testing.assert_array_equal(part, structure[start:stop])
    text = block_set.ragged(TEXT)
    np.testing.assert_array_equal(text.values, np.concatenate([b["feature.text"] for b in blocks]))
    np.testing.assert_array_equal(text.lengths, np.concatenate([b["tokens.text"] for b in blocks]))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_take_equals_in_memory(tmp_path_factory, data):
    directory = tmp_path_factory.mktemp("take")
    sizes = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=6))
    rng = np.random.default_rng(data.draw(st.integers(0, 9)))
    writer = BlockTarWriter(directory, prefix="histories", shard_bytes=data.draw(st.sampled_from([1, 9000])))
    for size in sizes:
        lengths = rng.integers(0, 5, size)
        block = item_block(rng, 0, size)
        block["offset"] = np.concatenate([[0], np.cumsum(lengths)])
        block["row"] = rng.integers(0, 10**9, lengths.sum())
        writer.add(block, size)
    write_block_index(directory / "blocks.histories.npy", [writer.close()])
    block_set = BlockSet.open(directory, "histories")
    samples = np.array(data.draw(st.lists(st.integers(0, sum(sizes) - 1), max_size=40)), np.int64)
    taken = block_set.take(samples, ["structure", TEXT, ROWS])
    np.testing.assert_array_equal(taken["structure"], block_set.column("structure")[samples])
    for field in (TEXT, ROWS):
        expected = block_set.ragged(field).take(samples)
        np.testing.assert_array_equal(taken[field.values].values, expected.values)
        np.testing.assert_array_equal(taken[field.values].offsets, expected.offsets)
        assert taken[field.values].values.dtype == expected.values.dtype


def test_parallel_writers_make_one_set(tmp_path):
    rng = np.random.default_rng(0)
    records = []
    expected = {}
    for shard in (3, 0, 1):  # tasks end in any order
        writer = BlockTarWriter(tmp_path, prefix="items", first_shard=shard)
        numbers = []
        for _ in range(3):
            block = item_block(rng, 1000 * shard, 5)
            writer.add(block, 5)
            numbers.append(block["content"])
        records.append(writer.close())
        expected[shard] = np.concatenate(numbers)
    records.append(
        BlockTarWriter(tmp_path, prefix="items", first_shard=9).close()
    )  # one had nothing to write
    write_block_index(tmp_path / "blocks.items.npy", records)
    column = BlockSet.open(tmp_path, "items").column("content")
    np.testing.assert_array_equal(column, np.concatenate([expected[s] for s in sorted(expected)]))


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8, 40])
def test_sequential_blocks_partition(tmp_path, world):
    write_items(tmp_path, [40, 1, 70, 33, 64, 5, 5, 90])
    block_set = BlockSet.open(tmp_path, "items")
    ranges = [sequential_blocks(block_set, rank, world) for rank in range(world)]
    assert [block for blocks in ranges for block in blocks] == list(range(block_set.num_blocks))
    loads = [block_set.block_sizes[blocks].sum() for blocks in ranges]
    assert max(loads) <= block_set.num_samples / world + block_set.block_sizes.max()


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "a..b",
        ".a",
        "a.",
        "../a",
        "a/b",
        "/etc/passwd",
        "a b",
        "a\n",
        "a\0b",
        "é",
        "__meta__",
        "x" * 65,
        "a,b",
    ],
)
def test_hostile_field_names_are_refused(tmp_path, name):
    writer = BlockTarWriter(tmp_path, prefix="x")
    with pytest.raises(DataError, match="name"):
        writer.add({name: np.zeros(1)}, 1)
    assert not list(tmp_path.iterdir())


def test_names_that_differ_in_case_only_are_refused(tmp_path):
    with pytest.raises(DataError, match="case"):
        BlockTarWriter(tmp_path, prefix="x").add({"Text": np.zeros(1), "text": np.zeros(1)}, 1)


@pytest.mark.parametrize(
    "array",
    [
        np.array([None, {}], object),
        np.array(["a"]),
        np.array([b"a"]),
        np.zeros(1, [("a", "i4")]),
        np.zeros(1, "complex64"),
        np.zeros(1, "M8[s]"),
        np.zeros(1, np.longdouble),
    ],
    ids=str,
)
def test_other_types_are_refused(tmp_path, array):
    with pytest.raises(DataError, match="cannot be stored"):
        BlockTarWriter(tmp_path, prefix="x").add({"a": array}, 1)


def test_nothing_to_store_is_an_error(tmp_path):
    with pytest.raises(DataError, match="not a single sample"):
        write_block_index(tmp_path / "blocks.x.npy", [BlockTarWriter(tmp_path, prefix="x").close()])


def test_a_failed_writer_leaves_no_half_tar(tmp_path):
    def fail_in_the_middle():
        with BlockTarWriter(tmp_path, prefix="x") as writer:
            writer.add({"a": np.zeros(5)}, 5)
            assert [path.suffix for path in tmp_path.iterdir()] == [".tmp"]
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail_in_the_middle()
    assert not list(tmp_path.iterdir())


def header_variants():
    """Headers that an attacker or a bug might leave in a member, each as long as the real one."""
    real = npy_header(np.zeros(5))
    texts = {
        "object": "{'descr': '|O', 'fortran_order': False, 'shape': (5,), }",
        "object in a structure": "{'descr': [('a', '|O')], 'fortran_order': False, 'shape': (5,), }",
        "string": "{'descr': '<U2', 'fortran_order': False, 'shape': (5,), }",
        "big-endian": "{'descr': '>f8', 'fortran_order': False, 'shape': (5,), }",
        "odd size": "{'descr': '<b8', 'fortran_order': False, 'shape': (5,), }",
        "fortran": "{'descr': '<f8', 'fortran_order': True, 'shape': (5,), }",
        "too long": "{'descr': '<f8', 'fortran_order': False, 'shape': (6,), }",
        "too short": "{'descr': '<f8', 'fortran_order': False, 'shape': (4,), }",
        "overflow": "{'descr': '<f8', 'fortran_order': False, 'shape': (4294967296,4294967296,), }",
        # 8 x 19 x 121360158379668103 is 40 modulo 2^64, the size of the real array.
        "wraps": "{'descr': '<f8', 'fortran_order': False, 'shape': (19,121360158379668103), }",
        "empty but huge": "{'descr': '<f8', 'fortran_order': False, 'shape': (0, 99999999999999999,99,), }",
        "negative": "{'descr': '<f8', 'fortran_order': False, 'shape': (-5,), }",
        "code": "__import__('os').system('true')",
    }
    for name, text in texts.items():
        yield pytest.param(real[:10] + text.encode().ljust(len(real) - 11) + b"\n", id=name)
    yield pytest.param(real[:8] + b"\x40\x00" + real[10:], id="header cut")
    yield pytest.param(b"\x93NUMPZ" + real[6:], id="magic")
    yield pytest.param(real[:6] + b"\x02\x00" + real[8:], id="version")
    yield pytest.param(real[:8] + b"\xff\xff" + real[10:], id="length")


@pytest.mark.parametrize("header", header_variants())
def test_hostile_member_header_is_a_data_error(tmp_path, header):
    writer = BlockTarWriter(tmp_path, prefix="x")
    writer.add({"a": np.zeros(5)}, 5)
    write_block_index(tmp_path / "blocks.x.npy", [writer.close()])
    path = tmp_path / "x-000000.tar"
    data = bytearray(path.read_bytes())
    assert len(header) == len(npy_header(np.zeros(5)))
    data[512 : 512 + len(header)] = header
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        BlockSet.open(tmp_path, "x").view(0, "a")
    assert "x-000000.tar" in str(caught.value)
    assert "x-00000000.a.npy" in str(caught.value)


def one_block(directory, array, *, prefix="x", field="a"):
    writer = BlockTarWriter(directory, prefix=prefix)
    writer.add({field: array}, len(array))
    write_block_index(directory / f"blocks.{prefix}.npy", [writer.close()])
    return directory / f"{prefix}-000000.tar", directory / f"blocks.{prefix}.npy"


def refused(directory, *, match, member=True):
    with pytest.raises(DataError, match=match) as caught:
        BlockSet.open(directory, "x").column("a")
    assert "x-000000.tar" in str(caught.value)
    assert ("x-00000000.a.npy" in str(caught.value)) or not member


def test_an_empty_array_of_impossible_shape_is_a_data_error(tmp_path):
    path, index = one_block(tmp_path, np.zeros(5))
    header = "{'descr': '<f8', 'fortran_order': False, 'shape': (0, 99999999999999999,99999999999), }"
    data = bytearray(path.read_bytes())
    data[522:640] = header.encode().ljust(117) + b"\n"
    data[512 - 512 + 124 : 136] = b"%011o\0" % 128  # the header alone: zero elements
    path.write_bytes(data)
    records = np.load(index)
    records["members"]["a"][:, 1] = 128
    np.save(index, records)
    refused(tmp_path, match="no plain array")


def test_a_pickled_member_is_never_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    member = io.BytesIO()
    np.save(member, np.array([Trap()], object), allow_pickle=True)
    with tarfile.open(tmp_path / "x-000000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        info = tarfile.TarInfo("x-00000000.a.npy")
        info.size = len(member.getvalue())
        tar.addfile(info, io.BytesIO(member.getvalue()))
    record = np.array([(0, 0, 1, ((512, info.size),))], dtype=index_dtype(["a"]))
    write_block_index(tmp_path / "blocks.x.npy", [record])
    refused(tmp_path, match="no plain array")
    assert not (tmp_path / "sprung").exists()
    member.seek(0)
    np.load(member, allow_pickle=True)
    assert (tmp_path / "sprung").exists()  # the trap was a real one


@pytest.mark.parametrize(
    ("offset", "size"),
    [
        (512, 10**6),  # beyond the file
        (10**9, 168),
        (2**63 - 1, 2**63 - 1),  # a sum that runs over in 64 bits
        (1024, 168),  # inside the file, but no member
        (512, 160),  # another size than the tar's
        (512, 176),
    ],
)
def test_an_index_that_points_elsewhere_is_a_data_error(tmp_path, offset, size):
    _, path = one_block(tmp_path, np.zeros(5))
    records = np.load(path)
    assert records["members"]["a"].tolist() == [[512, 168]]
    records["members"]["a"] = offset, size
    np.save(path, records)
    refused(tmp_path, match="cut off|not where")


@pytest.mark.parametrize(
    "change",
    [
        {"num_samples": 0},
        {"num_samples": -1},
        {"num_samples": 2**62},
        {"shard": -1},
        {"block": -1},
        {"members": ((-512, 168),)},
        {"members": ((512, -1),)},
    ],
    ids=str,
)
def test_an_impossible_index_is_a_data_error(tmp_path, change):
    _, path = one_block(tmp_path, np.zeros(5))
    records = np.load(path)
    for key, value in change.items():
        records[key] = value
    np.save(path, records)
    with pytest.raises(DataError, match=r"not a block index[\s\S]*blocks\.x\.npy"):
        BlockSet.open(tmp_path, "x")


@pytest.mark.parametrize("name", ["../a", "é", "a\0b", "a" * 65])
def test_hostile_field_names_in_an_index_are_a_data_error(tmp_path, name):
    one_block(tmp_path, np.zeros(5))
    places = np.dtype([(name, "<i8", (2,))])
    dtype = np.dtype([("shard", "<i4"), ("block", "<i8"), ("num_samples", "<i8"), ("members", places)])
    np.save(tmp_path / "blocks.x.npy", np.array([(0, 0, 5, ((512, 168),))], dtype))
    with pytest.raises(DataError, match=r"blocks\.x\.npy"):
        BlockSet.open(tmp_path, "x")


def test_an_index_or_tar_of_another_prefix_is_a_data_error(tmp_path):
    one_block(tmp_path, np.zeros(5))
    other, index = one_block(tmp_path, np.ones(5), prefix="y")
    index.replace(tmp_path / "blocks.x.npy")
    np.testing.assert_array_equal(BlockSet.open(tmp_path, "x").column("a"), np.zeros(5))  # places are equal
    other.replace(tmp_path / "x-000000.tar")
    refused(tmp_path, match="not where")
    one_block(tmp_path, np.zeros(5), prefix="y", field="b")
    (tmp_path / "blocks.y.npy").replace(tmp_path / "blocks.x.npy")
    with pytest.raises(DataError, match="not where"):
        BlockSet.open(tmp_path, "x").read(0)


def test_a_block_of_another_number_of_samples_is_a_data_error(tmp_path):
    _, path = one_block(tmp_path, np.zeros((5, 2)))
    for wrong in (4, 6):
        records = np.load(path)
        records["num_samples"] = wrong
        np.save(path, records)
        refused(tmp_path, match="shape")
        with pytest.raises(DataError, match="shape"):
            BlockSet.open(tmp_path, "x").take(np.array([0]), ["a"])


@pytest.mark.parametrize(
    "other", [np.zeros((5, 1), np.float16), np.zeros((5, 3), np.float64)], ids=["shape", "type"]
)
def test_blocks_that_differ_in_type_or_row_shape_are_never_cast(tmp_path, other):
    writer = BlockTarWriter(tmp_path, prefix="x")
    for array in (np.zeros((5, 3), np.float16), other):
        writer.add({"a": array, "n": np.ones(5, np.uint8)}, 5)
    write_block_index(tmp_path / "blocks.x.npy", [writer.close()])
    block_set = BlockSet.open(tmp_path, "x")
    for read in (
        lambda: block_set.column("a"),
        lambda: block_set.take(np.array([7, 1]), ["a"]),
        lambda: block_set.ragged(RaggedField("a", counts="n")),
        lambda: block_set.take(np.array([7, 1]), [RaggedField("a", counts="n")]),
    ):
        with pytest.raises(DataError, match=r"in other blocks[\s\S]*x-00000001\.a\.npy"):
            read()


def test_more_tars_than_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr(block_reader, "MAX_MAPPED", 3)
    monkeypatch.setattr(block_reader, "MAX_VIEWS", 7)
    blocks = write_items(tmp_path, [9] * 12, shard_bytes=1)
    assert len(list(tmp_path.glob("*.tar"))) == 12
    before = len(os.listdir("/proc/self/fd"))
    block_set = BlockSet.open(tmp_path, "items")
    kept = block_set.view(0, "content")
    for _ in range(2):
        np.testing.assert_array_equal(
            block_set.column("content"), np.concatenate([block["content"] for block in blocks])
        )
    assert len(os.listdir("/proc/self/fd")) - before <= 3 + 7 + 1  # a view keeps its tar mapped
    np.testing.assert_array_equal(kept, blocks[0]["content"])


FULL = """
import errno, os, resource, sys
from pathlib import Path
import numpy as np
from qbrec.errors import DataError
from qbrec.storage.blocks import BlockTarWriter, write_block_index

resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
root = Path(sys.argv[1])
writer = BlockTarWriter(root, prefix="x", shard_bytes=6 << 20)
try:
    for block in range(40):
        writer.add({"a": np.full(1 << 17, block)}, 1 << 17)
    records = writer.close()
except DataError as error:
    assert error.__cause__.errno == errno.EFBIG
    records = writer.close()
    print("full:", error)
write_block_index(root / "blocks.x.npy", [records])
"""


@pytest.mark.parametrize("limit", [5 << 20, (4 << 20) + 1, 100])
def test_a_full_disk_is_said_and_leaves_no_half_tar(tmp_path, limit):
    """A file-size limit of the process stands for the disk: the first tar exceeds it."""
    command = [sys.executable, "-c", FULL, str(tmp_path), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "full: the file would exceed" in done.stdout, done.stderr  # the fault fired
    assert f"where: {tmp_path / 'x-000000.tar'} (" in done.stdout
    assert "GB free)" in done.stdout
    assert "fix:" in done.stdout
    assert "not a single sample" in done.stderr  # and no block of the tar that failed is listed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("number", "said"),
    [(errno.ENOSPC, "disk is full"), (errno.EDQUOT, "quota"), (errno.EFBIG, "largest size")],
)
def test_every_lack_of_room_has_its_words(tmp_path, number, said):
    def fail(number):
        with writing(tmp_path / "missing" / "file"):
            raise OSError(number, os.strerror(number))

    with pytest.raises(DataError, match=said) as caught:
        fail(number)
    assert caught.value.fix is not None
    with pytest.raises(PermissionError):
        fail(errno.EACCES)


KILLED = """
import sys
import numpy as np
from qbrec.storage.blocks import BlockTarWriter

with BlockTarWriter(sys.argv[1], prefix="x", shard_bytes=1 << 20) as writer:
    for block in range(100_000):
        writer.add({"a": np.full(1 << 14, block), "b": np.arange(block % 50)}, 1)
"""


def test_a_killed_writer_leaves_whole_tars_only(tmp_path):
    rng = np.random.default_rng()
    cut = 0
    for attempt in range(6):
        directory = tmp_path / str(attempt)
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(directory)])
        try:
            while not list(directory.glob("*.tar")):
                assert process.poll() is None
                time.sleep(0.002)
            time.sleep(float(rng.uniform(0, 0.05)))
        finally:
            process.kill()  # SIGKILL
            process.wait()
        tars = sorted(directory.glob("*.tar"))
        cut += len(list(directory.glob("*.tmp")))
        assert tars
        for path in tars:
            assert path.read_bytes()[-1024:] == bytes(1024)
            with tarfile.open(path) as tar:
                members = tar.getmembers()
                for member in members:
                    array = np.load(io.BytesIO(tar.extractfile(member).read()), allow_pickle=False)
                    block = int(member.name[2:10])
                    assert array.tolist() == (
                        [block] * (1 << 14) if "a" in member.name else list(range(block % 50))
                    )
            assert len(members) == 2 * 7  # as many blocks as a tar of 1 MB holds
        for left in directory.glob("*.tmp"):
            assert not left.name.endswith(".tar")
    assert cut  # a write was under way when at least one of them was killed


@given(st.binary(max_size=200))
def test_header_parser_never_crashes(data):
    parse_npy_header(data)
    parse_npy_header(npy_header(np.zeros(3))[:10] + data)


def test_truncated_and_missing_tars(tmp_path):
    write_items(tmp_path, [40, 70, 33], shard_bytes=1 << 20)
    path = tmp_path / "items-000000.tar"
    data = path.read_bytes()
    for kept in (0, 1, 511, 512, 700, len(data) // 2):
        path.write_bytes(data[:kept])
        with pytest.raises(DataError, match=r"items-000000\.tar"):
            BlockSet.open(tmp_path, "items").read(2)
    path.write_bytes(data[512:])  # whole members, but in the wrong place
    with pytest.raises(DataError, match="not where the index says"):
        BlockSet.open(tmp_path, "items").read(0)
    path.unlink()
    with pytest.raises(DataError, match=r"items-000000\.tar"):
        BlockSet.open(tmp_path, "items").read(0)


def test_counts_that_do_not_fit_are_an_error(tmp_path):
    writer = BlockTarWriter(tmp_path, prefix="x")
    writer.add({"v": np.arange(5), "c": np.array([2, 2]), "o": np.array([0, 4, 2])}, 2)
    write_block_index(tmp_path / "blocks.x.npy", [writer.close()])
    block_set = BlockSet.open(tmp_path, "x")
    for field in (RaggedField("v", counts="c"), RaggedField("v", offsets="o"), RaggedField("v", offsets="c")):
        with pytest.raises(DataError, match="does not fit"):
            block_set.ragged(field)


@pytest.mark.parametrize("damage", ["missing", "empty", "garbage", "cut", "pickle", "other array"])
def test_damaged_index(tmp_path, damage):
    write_items(tmp_path, [40, 70])
    path = tmp_path / "blocks.items.npy"
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "pickle":
        np.save(path, np.array([{}], object), allow_pickle=True)
    elif damage == "other array":
        np.save(path, np.zeros(4))
    else:
        path.write_bytes({"empty": b"", "garbage": b"\x93NUMPY" + bytes(90), "cut": data[:-8]}[damage])
    with pytest.raises(DataError, match=r"blocks\.items\.npy"):
        BlockSet.open(tmp_path, "items")


def test_flipped_bit_in_an_artifact_is_found_before_use(tmp_path):
    store = ArtifactStore(tmp_path)
    writer = store.writer("catalog", "0" * 64)
    writer.prepare()
    blocks = write_items(writer.path, [40, 70])
    artifact = writer.commit(meta={}, inputs={}, config={}, seed=0)
    block_set = BlockSet.open(artifact, "items")
    assert block_set.fingerprint == artifact.fingerprint
    np.testing.assert_array_equal(block_set.view(1, "content"), blocks[1]["content"])
    path = artifact.path / "items-000000.tar"
    data = bytearray(path.read_bytes())
    data[-2000] ^= 4
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"items-000000\.tar"):
        BlockSet.open(store.open(artifact.path), "items").read(0)
