"""Where the raw Parquet lies: a file, a folder or a glob; local, `s3://` or `gs://`."""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from qbrec.config.sections import DataConfig
from qbrec.errors import ConfigError, DataError
from qbrec.storage.filesystem import filesystem, is_remote, retried
from qbrec.storage.remote_input import RemoteInput


@dataclass(frozen=True)
class SourceFile:
    """One Parquet file: what to open it by, and what identifies its content."""

    path: str
    size: int
    mtime_ns: int


def list_files(place: str, *, where: str) -> list[SourceFile]:
    """Parquet files of a file, folder (recursively) or glob (`*`, `?`, `[…]` within a path segment), sorted.

    Args:
        place: What the configuration says.
        where: The configuration key, for the error message.

    Raises:
        DataError: There is no such file, or no Parquet file below it.
    """
    fs, path = filesystem(place)
    scheme = place.partition("://")[0] + "://" if "://" in place else ""
    parts = path.split("/")
    wild = next((i for i, part in enumerate(parts) if any(c in part for c in "*?[")), None)
    base = path if wild is None else "/".join(parts[:wild]) or "/"

    def listed() -> tuple[pafs.FileInfo, list[pafs.FileInfo]]:
        top = fs.get_file_info(base)
        if wild is None and top.type == pafs.FileType.File:
            return top, [top]
        if top.type == pafs.FileType.Directory:
            return top, fs.get_file_info(pafs.FileSelector(base, recursive=True))
        return top, []

    top, infos = retried(listed, doing="list the input", place=f"{where}: {place}")

    def wanted(info: pafs.FileInfo) -> bool:
        segments = info.path.split("/")
        if info.type != pafs.FileType.File:
            return False
        if wild is not None:
            pairs = zip(segments, parts, strict=False)
            return len(segments) == len(parts) and all(fnmatch.fnmatchcase(a, b) for a, b in pairs)
        # Spark and Hive leave `_SUCCESS`, `.crc` and the like in folders.
        hidden = any(s.startswith(("_", ".")) for s in segments[len(parts) :])
        return info is top or (segments[-1].endswith((".parquet", ".pq")) and not hidden)

    files = [SourceFile(scheme + i.path, i.size, i.mtime_ns or 0) for i in infos if wanted(i)]
    if not files:
        raise DataError(
            "no Parquet file here",
            where=f"{where}: {place}",
            fix="name a .parquet file, a folder of them, or a glob",
        )
    return sorted(files, key=lambda file: file.path)


def open_parquet(path: str) -> pq.ParquetFile:
    """A Parquet file by path or URI.

    Raises:
        DataError: It cannot be read, or is no Parquet.
    """
    try:
        if is_remote(path):
            # Ranges that lie close together become one request.
            return pq.ParquetFile(pa.PythonFile(RemoteInput(path), mode="r"), pre_buffer=True)
        fs, inner = filesystem(path)
        return pq.ParquetFile(fs.open_input_file(inner))
    except OSError as error:
        raise DataError(
            f"cannot read the file: {error}", where=path, fix="check that it is there and whole"
        ) from error
    except ValueError as error:
        raise DataError(
            f"not a readable Parquet file: {str(error).splitlines()[0]}",
            where=path,
            fix="write it again as Parquet",
        ) from error


def source_fingerprint(data: DataConfig, *, models: Mapping[str, str]) -> str:
    """Identity of the raw input: SHA-256 over domain, role, path, size and modification time of every file.

    Args:
        data: The domains.
        models: Hashes of the encoders that are local folders (`models.local_models`).

    Raises:
        DataError: A place names no file.
        ConfigError: No domain is configured.
    """
    if not data.domains:
        raise ConfigError(
            "no domain is configured",
            where="data.domains",
            fix="name items and interactions of one domain at least",
        )
    lines: list[list[str | int]] = [["encoder", section, found] for section, found in sorted(models.items())]
    for name, domain in sorted(data.domains.items()):
        for role, place in (("items", domain.items), ("interactions", domain.interactions)):
            for file in list_files(place, where=f"data.domains.{name}.{role}"):
                lines.append([name, role, file.path, file.size, file.mtime_ns])
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()
