"""Reading block tars by offset: every field of every block is a view into its mapped tar.

A member's tar header and `.npy` header are checked against the index before its first use, so a cut, swapped
or hostile tar is a `DataError`. What no check beforehand can see is a tar that is cut while it is mapped: the
system then ends the process (SIGBUS). Finished artifacts are never changed in place; nothing else may do so.
"""

from __future__ import annotations

import hashlib
import io
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from qbrec.errors import DataError
from qbrec.storage.artifact import REBUILD, Artifact
from qbrec.storage.block_format import (
    TAR_BLOCK,
    is_block_index,
    member_name,
    num_bytes,
    parse_npy_header,
    shard_name,
    tar_start,
)
from qbrec.storage.gather import BlockPart, by_block, spans, whole_rows
from qbrec.storage.ragged import Ragged
from qbrec.storage.tar_file import map_tar

HEADER_BYTES = 128  # the `.npy` header of nearly every array; a longer one is read again
MAX_VIEWS = 512  # dense members remembered, for readers whose batches cut a block into several pieces
MAX_MAPPED = 128  # tars held open at once: a catalogue may have more of them than a process may open files


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
        self._begins: list[int] = self.starts[:-1].tolist()
        self._views: dict[tuple[int, str], NDArray[Any]] = {}
        self._map = lru_cache(maxsize=MAX_MAPPED)(lambda shard: map_tar(resolve(shard_name(prefix, shard))))

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
            index = np.load(io.BytesIO(data), allow_pickle=False)
        except FileNotFoundError:
            raise DataError("the block index is missing", where=str(path), fix=REBUILD) from None
        except (ValueError, EOFError, SyntaxError):
            raise DataError("the block index is damaged", where=str(path), fix=REBUILD) from None
        if not is_block_index(index):
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
        tar = self._map(self._shard[block])
        name = member_name(self.prefix, self._block[block], field)
        if offset + size > len(tar):
            raise self._damaged(block, name, "the tar is cut off")
        start = tar[offset - TAR_BLOCK : offset + HEADER_BYTES]
        if not start.startswith(tar_start(name, size)):
            raise self._damaged(block, name, "the member is not where the index says, or of another size")
        parsed = _parse_short(start[TAR_BLOCK:]) or parse_npy_header(tar[offset : offset + (1 << 16)])
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
        # An empty range still has a type: that of the block it lies in.
        block = bisect_right(self._begins, start) - 1
        view = self._dense(block, field)
        low = start - self._begins[block]
        if low + stop - start <= len(view):
            return view[low : low + stop - start].copy()
        out: NDArray[Any] = np.empty((stop - start, *view.shape[1:]), view.dtype)
        filled = len(view) - low
        out[:filled] = view[low:]
        while filled < len(out):
            block += 1
            view = self._dense(block, field, like=out)[: len(out) - filled]
            out[filled : filled + len(view)] = view
            filled += len(view)
        return out

    def ragged(self, field: RaggedField) -> Ragged:
        """All samples of a ragged field in memory."""
        first, _ = self._ragged(0, field)
        parts = [self._ragged(block, field, like=first) for block in range(self.num_blocks)]
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
        parts = by_block(samples, self.starts)
        result: Fields = {}
        for field in fields:
            if isinstance(field, RaggedField):
                result[field.values] = self._take_ragged(field, len(samples), parts)
            else:
                result[field] = self._take_dense(field, len(samples), parts)
        return result

    def _take_dense(self, field: str, count: int, parts: Sequence[BlockPart]) -> NDArray[Any]:
        first = self._dense(parts[0].block, field)
        out: NDArray[Any] = np.empty((count, *first.shape[1:]), first.dtype)
        if out.size:
            rows = whole_rows(out)
            for part in parts:
                rows[part.places] = whole_rows(self._dense(part.block, field, like=out))[part.rows]
        return out

    def _take_ragged(self, field: RaggedField, count: int, parts: Sequence[BlockPart]) -> Ragged:
        first, _ = self._ragged(parts[0].block, field)
        stored = [self._ragged(part.block, field, like=first) for part in parts]
        offsets = np.zeros(count + 1, np.int64)
        for part, (_, ends) in zip(parts, stored, strict=True):
            offsets[part.places + 1] = np.diff(ends)[part.rows]
        lengths = offsets[1:].copy()
        np.cumsum(offsets, out=offsets)
        values: NDArray[Any] = np.empty((int(offsets[-1]), *first.shape[1:]), first.dtype)
        for part, (view, ends) in zip(parts, stored, strict=True):
            wanted = lengths[part.places]
            if not values.size or not wanted.any():
                continue
            source: slice | NDArray[np.int64]
            if isinstance(part.rows, slice):
                source = slice(int(ends[part.rows.start]), int(ends[part.rows.stop]))
            else:
                source = spans(ends[part.rows], wanted)
            whole_rows(values)[spans(offsets[part.places], wanted)] = whole_rows(view)[source]
        return Ragged(values, offsets)

    def _dense(self, block: int, field: str, *, like: NDArray[Any] | None = None) -> NDArray[Any]:
        """A field with one row per sample; of the type and row shape of `like`."""
        view = self._views.get((block, field))
        if view is None:
            view = self.view(block, field)
            if view.shape[:1] != (self.block_sizes[block],):
                what = f"{field} has shape {view.shape} in a block of {self.block_sizes[block]} samples"
                raise self._damaged(block, self._name(block, field), what)
            if len(self._views) >= MAX_VIEWS:
                self._views.clear()
            self._views[block, field] = view
        self._check_like(block, field, view, like)
        return view

    def _ragged(
        self, block: int, field: RaggedField, *, like: NDArray[Any] | None = None
    ) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Values (of the type and row shape of `like`) and checked int64 offsets of one block."""
        view = self.view(block, field.values)
        self._check_like(block, field.values, view, like)
        size = int(self.block_sizes[block])
        if field.offsets is not None:
            stored = self.view(block, field.offsets)
            valid = stored.shape == (size + 1,) and stored.dtype.kind in "iu"
            offsets = stored.astype(np.int64, copy=False)
            valid = valid and offsets[0] == 0 and bool((offsets[1:] >= offsets[:-1]).all())
        else:
            assert field.counts is not None
            counts = self.view(block, field.counts)
            valid = counts.shape == (size,) and counts.dtype.kind in "iu" and bool((counts >= 0).all())
            offsets = np.zeros(size + 1, np.int64)
            if valid:
                np.cumsum(counts, dtype=np.int64, out=offsets[1:])
                valid = bool((offsets[1:] >= offsets[:-1]).all())  # no sum ran over
        if not valid or not view.ndim or offsets[-1] != len(view):
            what = f"{field.counts or field.offsets} does not fit {field.values}"
            raise self._damaged(block, self._name(block, field.values), what)
        return view, offsets

    def _check_like(self, block: int, field: str, view: NDArray[Any], like: NDArray[Any] | None) -> None:
        if like is not None and (view.dtype != like.dtype or view.shape[1:] != like.shape[1:]):
            what = f"rows are {view.dtype} {view.shape[1:]}, in other blocks {like.dtype} {like.shape[1:]}"
            raise self._damaged(block, self._name(block, field), what)

    def _name(self, block: int, field: str) -> str:
        return member_name(self.prefix, self._block[block], field)

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


_parse_short = lru_cache(maxsize=4096)(parse_npy_header)  # blocks of equal size have equal headers
