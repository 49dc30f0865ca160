"""Reading block tars by offset: every field of every block is a view into its mapped tar."""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from qbrec.errors import DataError
from qbrec.storage.artifact import REBUILD, Artifact
from qbrec.storage.block_format import (
    TAR_BLOCK,
    index_dtype,
    member_name,
    num_bytes,
    parse_npy_header,
    shard_name,
)
from qbrec.storage.ragged import Ragged

HEADER_BYTES = 192  # room for the header of any array of up to five dimensions; longer ones are read whole


@dataclass(frozen=True)
class RaggedField:
    """A field of variable length per sample; gathered, it is a `Ragged` under the name `values`.

    Attributes:
        values: The field with all values of a block one after the other, [Σ] or [Σ, D].
        counts: The field with each sample's number of values, [b]; or
        offsets: the field with block-local offsets, [b + 1]. Exactly one of the two is given.
    """

    values: str
    counts: str | None = None
    offsets: str | None = None

    def __post_init__(self) -> None:
        assert (self.counts is None) != (self.offsets is None), "a ragged field has either counts or offsets"


FieldSpec = str | RaggedField
Fields = dict[str, NDArray[Any] | Ragged]


class BlockSet:
    """All blocks of one prefix, in the order of their samples.

    Args:
        index: Records of `block_format.index_dtype`.
        prefix: Prefix of the tars and members.
        resolve: Gives the verified path of a tar by its name.
        fingerprint: Identity of the content, for the state of a loader.

    Attributes:
        fields: Names of all stored fields.
        block_sizes: Samples of each block, int64 [num_blocks].
        starts: Sample at which each block begins and, last, the number of samples, int64 [num_blocks + 1].
    """

    def __init__(
        self, index: NDArray[Any], *, prefix: str, resolve: Callable[[str], Path], fingerprint: str
    ) -> None:
        self.prefix, self.fingerprint = prefix, fingerprint
        self._resolve = resolve
        self.fields: tuple[str, ...] = tuple(index.dtype["members"].names or ())
        self._shard: list[int] = index["shard"].tolist()
        self._block: list[int] = index["block"].tolist()
        self._places = {field: np.ascontiguousarray(index["members"][field]) for field in self.fields}
        self.block_sizes: NDArray[np.int64] = np.ascontiguousarray(index["num_samples"], dtype=np.int64)
        self.starts: NDArray[np.int64] = np.zeros(len(index) + 1, np.int64)
        np.cumsum(self.block_sizes, out=self.starts[1:])
        self._maps: dict[int, mmap.mmap] = {}

    @classmethod
    def open(cls, source: Artifact | str | Path, prefix: str) -> Self:
        """Open the blocks of an artifact, or of a directory that is none yet (then no hash is checked).

        Raises:
            DataError: The index is missing, damaged, or no block index.
        """
        name = f"blocks.{prefix}.npy"
        path = source.file(name) if isinstance(source, Artifact) else Path(source) / name
        try:
            data = path.read_bytes()
            index = np.load(path, allow_pickle=False)
        except FileNotFoundError:
            raise DataError("the block index is missing", where=str(path), fix=REBUILD) from None
        except (ValueError, EOFError, SyntaxError):
            raise DataError("the block index is damaged", where=str(path), fix=REBUILD) from None
        if not _is_index(index):
            raise DataError("this is not a block index", where=str(path), fix=REBUILD)
        if isinstance(source, Artifact):
            return cls(index, prefix=prefix, resolve=source.file, fingerprint=source.fingerprint)
        fingerprint = hashlib.sha256(data).hexdigest()
        return cls(index, prefix=prefix, resolve=lambda tar: path.parent / tar, fingerprint=fingerprint)

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        return len(self.block_sizes)

    @property
    def num_samples(self) -> int:
        """Number of samples in all blocks."""
        return int(self.starts[-1])

    def view(self, block: int, field: str) -> NDArray[Any]:
        """One field of one block, a read-only view into the mapped tar.

        Raises:
            DataError: The tar is missing or cut off, or the member is not the plain array of the index.
        """
        offset, size = self._places[field][block].tolist()
        tar = self._maps.get(self._shard[block]) or self._map(self._shard[block])
        name = member_name(self.prefix, self._block[block], field)
        if offset + size > len(tar):
            raise self._damaged(block, name, "the tar is cut off")
        if tar[offset - TAR_BLOCK : offset - TAR_BLOCK + 100].rstrip(b"\0") != name.encode():
            raise self._damaged(block, name, "the member is not where the index says")
        parsed = parse_npy_header(tar[offset : offset + min(size, HEADER_BYTES)])
        if parsed is None:
            parsed = parse_npy_header(tar[offset : offset + min(size, 1 << 16)])
        if parsed is None:
            raise self._damaged(block, name, "the member is no plain array of numbers")
        dtype, shape, header = parsed
        if header + num_bytes(dtype, shape) != size:
            raise self._damaged(block, name, f"{size} bytes do not hold {dtype} {shape}")
        return np.ndarray(shape, dtype, buffer=tar, offset=offset + header)

    def read(self, block: int, fields: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
        """Fields of one block as read-only views (all of them by default)."""
        return {field: self.view(block, field) for field in (self.fields if fields is None else fields)}

    def column(self, field: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Samples `start` to `stop` (default all) of a dense field, copied to one array [stop - start, …]."""
        stop = self.num_samples if stop is None else stop
        assert 0 <= start <= stop <= self.num_samples
        first = min(int(np.searchsorted(self.starts, start, side="right")), self.num_blocks) - 1
        last = max(int(np.searchsorted(self.starts, stop)), first + 1)  # an empty range still has a type
        out: NDArray[Any] | None = None
        for block in range(first, last):
            begin, end = int(self.starts[block]), int(self.starts[block + 1])
            view = self._dense(block, field)
            if out is None:
                out = np.empty((stop - start, *view.shape[1:]), view.dtype)
            low, high = max(begin, start), min(end, stop)
            out[low - start : high - start] = view[low - begin : high - begin]
        assert out is not None
        return out

    def ragged(self, field: RaggedField) -> Ragged:
        """All samples of a ragged field in memory."""
        parts = [self._ragged(block, field) for block in range(self.num_blocks)]
        values = np.concatenate([view for view, _ in parts])
        return Ragged.from_lengths(values, np.concatenate([np.diff(offsets) for _, offsets in parts]))

    def take(self, samples: NDArray[np.int64], fields: Sequence[FieldSpec]) -> Fields:
        """Gather samples by their number, in any order: work per block, never per sample.

        Args:
            samples: Sample numbers, int64 [B], each in [0, num_samples).
            fields: Dense fields by name, ragged ones as `RaggedField`.

        Returns:
            Arrays [B, …] and `Ragged` of length B, in the order of `samples`.
        """
        blocks = np.searchsorted(self.starts, samples, side="right") - 1
        local = samples - self.starts[blocks]
        order = np.argsort(blocks, kind="stable")
        distinct, begins = np.unique(blocks[order], return_index=True)
        if len(samples):
            groups = list(zip(distinct.tolist(), np.split(order, begins[1:]), strict=True))
        else:  # the shape and type of an empty answer come from the first block
            groups = [(0, order)]
        result: Fields = {}
        for field in fields:
            if isinstance(field, RaggedField):
                result[field.values] = self._take_ragged(field, local, groups)
            else:
                result[field] = self._take_dense(field, local, groups)
        return result

    def _take_dense(
        self, field: str, local: NDArray[np.int64], groups: list[tuple[int, NDArray[np.int64]]]
    ) -> NDArray[Any]:
        out: NDArray[Any] | None = None
        for block, index in groups:
            view = self._dense(block, field)
            if out is None:
                out = np.empty((len(local), *view.shape[1:]), view.dtype)
            out[index] = view[local[index]]
        assert out is not None
        return out

    def _take_ragged(
        self, field: RaggedField, local: NDArray[np.int64], groups: list[tuple[int, NDArray[np.int64]]]
    ) -> Ragged:
        parts = [self._ragged(block, field) for block, _ in groups]
        begins = np.empty(len(local), np.int64)
        offsets = np.zeros(len(local) + 1, np.int64)
        for (_, index), (_, stored) in zip(groups, parts, strict=True):
            rows = local[index]
            begins[index] = stored[rows]
            offsets[index + 1] = stored[rows + 1] - stored[rows]
        lengths = offsets[1:].copy()
        np.cumsum(offsets, out=offsets)
        values = np.empty((int(offsets[-1]), *parts[0][0].shape[1:]), parts[0][0].dtype)
        for (_, index), (view, _) in zip(groups, parts, strict=True):
            values[_spans(offsets[index], lengths[index])] = view[_spans(begins[index], lengths[index])]
        return Ragged(values, offsets)

    def _dense(self, block: int, field: str) -> NDArray[Any]:
        view = self.view(block, field)
        assert view.shape[:1] == (self.block_sizes[block],), f"{field} is not dense: use a RaggedField"
        return view

    def _ragged(self, block: int, field: RaggedField) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Values and checked int64 offsets of one block."""
        view = self.view(block, field.values)
        size = int(self.block_sizes[block])
        if field.offsets is not None:
            stored = self.view(block, field.offsets)
            offsets = stored.astype(np.int64, copy=False)
            valid = (
                stored.shape == (size + 1,) and offsets[0] == 0 and bool((offsets[1:] >= offsets[:-1]).all())
            )
        else:
            assert field.counts is not None
            counts = self.view(block, field.counts)
            valid = counts.shape == (size,) and (counts.dtype.kind == "u" or bool((counts >= 0).all()))
            offsets = np.zeros(size + 1, np.int64)
            if valid:
                np.cumsum(counts, out=offsets[1:])
        if not valid or offsets[-1] != len(view):
            name = member_name(self.prefix, self._block[block], field.values)
            raise self._damaged(block, name, f"{field.counts or field.offsets} does not fit {field.values}")
        return view, offsets

    def _map(self, shard: int) -> mmap.mmap:
        path = self._resolve(shard_name(self.prefix, shard))
        try:
            with open(path, "rb") as file:
                if os.fstat(file.fileno()).st_size == 0:
                    raise DataError("the block tar is empty", where=str(path), fix=REBUILD)
                self._maps[shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise DataError("a block tar is missing", where=str(path), fix=REBUILD) from None
        return self._maps[shard]

    def _damaged(self, block: int, member: str, what: str) -> DataError:
        path = self._resolve(shard_name(self.prefix, self._shard[block]))
        return DataError(f"a block tar is damaged: {what}", where=f"{path}, member {member}", fix=REBUILD)


def sequential_blocks(block_set: BlockSet, rank: int, world: int) -> range:
    """This rank's own contiguous blocks, for passes that read everything once (embedding, k-means).

    A block goes to the rank in whose equal part of all samples its middle lies, so that the ranks' ranges
    follow one another, cover every block once, and hold about as many samples each.
    """
    assert 0 <= rank < world
    middles = block_set.starts[:-1] + block_set.starts[1:]  # twice the middle, to stay in integers
    owners = middles * world // (2 * block_set.num_samples)
    return range(int(np.searchsorted(owners, rank)), int(np.searchsorted(owners, rank, side="right")))


def _spans(begins: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """`begins[i] … begins[i] + lengths[i] - 1` of all i, one after the other, int64 [Σ lengths]."""
    before = np.cumsum(lengths) - lengths
    spans: NDArray[np.int64] = np.arange(int(lengths.sum()), dtype=np.int64) + np.repeat(
        begins - before, lengths
    )
    return spans


def _is_index(index: NDArray[Any]) -> bool:
    names = index.dtype.names
    if names != ("shard", "block", "num_samples", "members") or index.ndim != 1 or not len(index):
        return False
    fields = index.dtype["members"].names
    if not fields or index.dtype != index_dtype(list(fields)):
        return False
    places = np.stack([index["members"][field] for field in fields])
    sane = (places[..., 0] >= TAR_BLOCK) & (places[..., 1] > 0)
    return bool(sane.all() and (index["num_samples"] > 0).all() and (index["shard"] >= 0).all())
