"""The one place that says what to do when a write does not fit: a full disk, a quota, a file-size limit."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qbrec.errors import DataError

_CAUSES = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would exceed the largest size that is allowed here",
}
_FIXES = {
    errno.ENOSPC: "free space there or move the storage to a larger disk, then run the same command again",
    errno.EDQUOT: "free space or have the quota raised, then run the same command again",
    errno.EFBIG: "raise the limit (`ulimit -f`, or another file system), then run the same command again",
}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around everything that writes to `path`, its flush and rename included.

    Raises:
        DataError: There is no room: the disk is full, the quota used up, or the file too large. Any other
            error passes unchanged.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _CAUSES:
            raise
        raise DataError(
            _CAUSES[error.errno], where=f"{path} ({_free(path.parent)})", fix=_FIXES[error.errno]
        ) from error


def _free(directory: Path) -> str:
    try:
        usage = shutil.disk_usage(directory)
    except OSError:
        return "free space unknown"
    return f"{usage.free / 1e9:.2f} of {usage.total / 1e9:.2f} GB free"
