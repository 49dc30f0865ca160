"""Where the picture of an `image_path` comes from: allowed folders, object storage, allowed web hosts."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import pyarrow.fs as pafs

from qbrec.catalog.encoders.image import BadImageError
from qbrec.catalog.encoders.web import WebFetcher
from qbrec.config.sections import ImageConfig
from qbrec.storage.filesystem import filesystem

STORES = ("s3", "gs")
T = TypeVar("T")
OpenRoot = Callable[[str], tuple[pafs.FileSystem, str]]


@dataclass(frozen=True)
class _Store:
    """A root on object storage: its scheme, and the file system and path inside it."""

    scheme: str
    fs: pafs.FileSystem
    base: str


class PictureReader:
    """Reads pictures by path or URL, several at once.

    Args:
        config: Allowed places, limits and time-outs.
        web: For http(s); None: the one that fetches from public addresses only.
        open_root: File system and inner path of a root on object storage.

    Raises:
        ConfigError: A root has a scheme that cannot be read.
    """

    def __init__(
        self, config: ImageConfig, *, web: WebFetcher | None = None, open_root: OpenRoot = filesystem
    ) -> None:
        self._limit, self._threads = config.max_bytes, config.fetch_concurrency
        self._web = web or WebFetcher(config)
        self._folders = tuple(os.path.realpath(root) for root in config.roots if "://" not in root)
        self._stores = []
        for root in config.roots:
            if "://" in root:
                # Of the root alone: a picture's own URI might name another endpoint.
                fs, base = open_root(root)
                if isinstance(fs, pafs.LocalFileSystem):
                    self._folders += (os.path.realpath(base),)
                else:
                    self._stores.append(_Store(root.partition("://")[0], fs, base.rstrip("/")))

    def map(self, paths: Sequence[str], work: Callable[[bytes], T]) -> list[T | BadImageError]:
        """Read every picture and do `work` on its bytes, in threads; in the order of the paths."""

        def one(path: str) -> T | BadImageError:
            try:
                return work(self.read(path))
            except BadImageError as error:
                return error

        with ThreadPoolExecutor(min(self._threads, len(paths)) or 1) as pool:
            return list(pool.map(one, paths))

    def read(self, path: str) -> bytes:
        """The bytes of one picture.

        Raises:
            BadImageError: It lies in no allowed place, cannot be read, or is too large.
        """
        if "\0" in path:
            raise BadImageError("cannot be read")
        scheme, separator, rest = path.partition("://")
        scheme = scheme.lower()
        if not separator:
            return self._relative(path)
        if scheme in ("http", "https"):
            return self._web.fetch(path)
        if scheme in STORES:
            return self._stored(scheme, rest)
        raise BadImageError("has a scheme that is not allowed")

    def _relative(self, path: str) -> bytes:
        """A path of this machine, or one below any root."""
        fault = BadImageError("lies outside catalog.image.roots")
        for root in self._folders:
            # Resolved before it is compared, so that neither `..` nor a link leads outside.
            real = os.path.realpath(os.path.join(root, path))
            if os.path.commonpath([root, real]) != root:
                continue
            try:
                if not stat.S_ISREG(os.stat(real).st_mode):
                    raise OSError  # a pipe would be waited for for ever
                with open(real, "rb") as file:
                    return self._whole(file.read(self._limit + 1))
            except OSError:
                fault = BadImageError("cannot be read")  # a relative path may lie below a later root
        for store in self._stores:
            if path.startswith("/") or not _plain(path):
                continue
            try:
                return self._open(store, f"{store.base}/{path}")
            except OSError:
                fault = BadImageError("cannot be read")
        raise fault

    def _stored(self, scheme: str, path: str) -> bytes:
        for store in self._stores:
            if store.scheme == scheme and path.startswith(f"{store.base}/") and _plain(path):
                try:
                    return self._open(store, path)
                except OSError:
                    raise BadImageError("cannot be read") from None
        raise BadImageError("lies outside catalog.image.roots")

    def _open(self, store: _Store, path: str) -> bytes:
        with store.fs.open_input_stream(path) as stream:
            return self._whole(stream.read(self._limit + 1))

    def _whole(self, data: bytes) -> bytes:
        if len(data) > self._limit:
            raise BadImageError("has more bytes than catalog.image.max_bytes")
        return data


def _plain(path: str) -> bool:
    """Whether a path inside a store goes straight down: some stores resolve `..`."""
    return not {"", ".", ".."} & set(path.split("/"))
