"""Files that are either old or whole."""

from __future__ import annotations

import os
from pathlib import Path

from qbrec.storage.diskfull import writing


def write_atomic(path: Path, data: bytes) -> None:
    """Write so that a reader sees the old file or the whole new one, also after a power cut.

    Raises:
        DataError: There is no room for it.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)  # a new name may need room, too
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
