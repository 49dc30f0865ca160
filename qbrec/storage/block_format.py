"""The bytes of a block tar: USTAR headers, `.npy` headers, names, and the index of offsets.

Both headers are written and parsed here instead of by `tarfile` and `numpy.lib.format`: the bytes then depend
on the data alone (not on a library's version), and a header names a plain number type or is refused.
"""

from __future__ import annotations

import math
import re
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qbrec.errors import DataError

TAR_BLOCK = 512
TAR_END = bytes(2 * TAR_BLOCK)
MAX_MEMBER_BYTES = 8**11 - 1  # eleven octal digits of a USTAR header
MAX_NAME_BYTES = 100
MAX_DIMENSIONS = 32
MAX_SAMPLES = 1 << 48
NPY_ALIGN = 64
NPY_MAGIC = b"\x93NUMPY\x01\x00"
BLOCKS_PER_SHARD = 4096  # block numbers reserved for each shard number, so that parallel writers never meet

_FIELD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*")
_PREFIX = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")
_NPY_HEADER = re.compile(
    rb"\{'descr': '([<|][biuf][1248])', 'fortran_order': False, "
    rb"'shape': \(((?:\d{1,18}, ?)*(?:\d{1,18},?)?)\), \} *\n"
)
_DTYPES = {
    code.encode(): np.dtype(code)
    for code in ("|b1", "|i1", "|u1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8", "<f2", "<f4", "<f8")
}
_ZERO = b"0000000\x00"
_CHECKSUM = slice(148, 156)
# After the size: time 0, the checksum's place, a plain file, no link, ustar 00, no owner names, no device.
_TAR_REST = (
    b"00000000000\x00" + b" " * 8 + b"0" + bytes(100) + b"ustar\x0000" + bytes(64) + 2 * _ZERO + bytes(167)
)


def check_field_names(fields: list[str]) -> None:
    """Refuse names that would not survive a tar, a file system or webdataset's split at the first dot.

    Raises:
        DataError: A name has other characters than letters, digits, `_`, `-` and single inner dots, is longer
            than 64, or differs from another one in case only (webdataset lower-cases them).
    """
    seen: dict[str, str] = {}
    for field in fields:
        if len(field) > 64 or _FIELD.fullmatch(field) is None:
            raise DataError(
                "a block field has a name that cannot be stored",
                where=repr(field[:80]),
                fix="use letters, digits, '_', '-' and single inner dots, 64 characters at most",
            )
        if field.lower() in seen:
            raise DataError(
                "two block fields differ in upper and lower case only",
                where=f"{seen[field.lower()]!r} and {field!r}",
                fix="rename one of the columns they come from",
            )
        seen[field.lower()] = field


def check_prefix(prefix: str) -> None:
    """A prefix is ours to choose: lower-case letters, digits, `_`, `-`; no dot (webdataset splits there)."""
    assert _PREFIX.fullmatch(prefix), f"bad block prefix {prefix!r}"


def shard_name(prefix: str, shard: int) -> str:
    """File name of one tar, such as `items-000003.tar`."""
    return f"{prefix}-{shard:06d}.tar"


def member_name(prefix: str, block: int, field: str) -> str:
    """Name of one member, such as `items-00000017.feature.text.npy`."""
    return f"{prefix}-{block:08d}.{field}.npy"


def index_dtype(fields: list[str]) -> np.dtype[Any]:
    """Record of one block: where it lies, its number of samples, (offset, bytes) of each field's member."""
    places = np.dtype([(field, "<i8", (2,)) for field in sorted(fields)])
    return np.dtype([("shard", "<i4"), ("block", "<i8"), ("num_samples", "<i8"), ("members", places)])


def is_block_index(index: NDArray[Any]) -> bool:
    """Whether an array is records of `index_dtype` that could be true: sane names, places and sizes."""
    names = index.dtype.names
    if names != ("shard", "block", "num_samples", "members") or index.ndim != 1 or not len(index):
        return False
    fields = index.dtype["members"].names
    if not fields or index.dtype != index_dtype(list(fields)):
        return False
    try:
        check_field_names(list(fields))
    except DataError:
        return False
    places = np.stack([index["members"][field] for field in fields])
    sane = (places[..., 0] >= TAR_BLOCK) & (places[..., 1] > 0)
    sizes = index["num_samples"]
    numbers = (index["shard"] >= 0) & (index["block"] >= 0) & (sizes > 0) & (sizes < MAX_SAMPLES)
    return bool(sane.all() and numbers.all() and sizes.sum(dtype=np.float64) < MAX_SAMPLES)


def tar_start(name: str, size: int) -> bytes:
    """The header of a member up to and including its size: what sets it apart from any other member's."""
    return b"%b0000644\x00%b%b%011o\x00" % (name.encode("ascii").ljust(100, b"\0"), _ZERO, _ZERO, size)


def tar_header(name: str, size: int) -> bytes:
    """USTAR header of a plain file, mode 0644, owner 0, time 0."""
    assert len(name) <= MAX_NAME_BYTES, f"member name too long: {name}"
    if size > MAX_MEMBER_BYTES:
        raise DataError(
            f"a block member of {size} bytes does not fit a tar", where=name, fix="make the blocks smaller"
        )
    header = bytearray(tar_start(name, size) + _TAR_REST)
    header[_CHECKSUM] = b"%06o\x00 " % sum(header)
    return bytes(header)


def npy_header(array: NDArray[Any]) -> bytes:
    """Header of version 1.0 for a C-ordered little-endian array of plain numbers."""
    descr = array.dtype.str
    assert descr.encode() in _DTYPES, f"no plain number type: {descr}"
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {array.shape!r}, }}"
    length = len(NPY_MAGIC) + 2 + len(text) + 1
    padding = -length % NPY_ALIGN
    body = text.encode("ascii") + b" " * padding + b"\n"
    return NPY_MAGIC + struct.pack("<H", len(body)) + body


def plain_array(array: NDArray[Any], field: str) -> NDArray[Any]:
    """The array as it is stored: C order, little-endian, numbers or bools only.

    Raises:
        DataError: The type is an object, a string, a structure or a number that `.npy` readers do not share.
    """
    array = np.asarray(array)
    if array.dtype.kind in "biuf" and array.dtype.itemsize in (1, 2, 4, 8):
        return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).reshape(array.shape)
    raise DataError(
        f"a block field of type {array.dtype} cannot be stored",
        where=field,
        fix="pass bool, integer or float arrays of at most 64 bits; text goes into an Arrow table",
    )


def parse_npy_header(data: bytes) -> tuple[np.dtype[Any], tuple[int, ...], int] | None:
    """Type, shape and length of the header, or None for anything but plain C-ordered numbers.

    Args:
        data: At least the first bytes of the member up to the end of its header.
    """
    if data[: len(NPY_MAGIC)] != NPY_MAGIC or len(data) < 10:
        return None
    end = 10 + int.from_bytes(data[8:10], "little")
    match = _NPY_HEADER.fullmatch(data[10:end]) if end <= len(data) else None
    if match is None or match[1] not in _DTYPES:
        return None
    shape = tuple(int(part) for part in match[2].replace(b" ", b"").split(b",") if part)
    # numpy refuses more, also where a length of 0 makes the array empty.
    if len(shape) > MAX_DIMENSIONS or 8 * math.prod(max(length, 1) for length in shape) >= 1 << 63:
        return None
    return _DTYPES[match[1]], shape, end


def num_bytes(dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
    """Bytes of an array, in integers that cannot overflow."""
    return dtype.itemsize * math.prod(shape)
