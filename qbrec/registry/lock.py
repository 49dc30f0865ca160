"""One promotion at a time: MLflow's aliases know no compare-and-swap."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qbrec.errors import RegistryError


@contextmanager
def registry_lock(storage: Path, *, timeout_s: float = 60.0) -> Iterator[None]:
    """Hold `<storage>/registry.lock`; the kernel frees it if this process dies.

    Raises:
        RegistryError: Another process holds it longer than the timeout.
    """
    storage.mkdir(parents=True, exist_ok=True)
    path = storage / "registry.lock"
    deadline = time.monotonic() + timeout_s
    with open(path, "a+", encoding="utf-8") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() >= deadline:
                    file.seek(0)
                    holder = file.read().strip() or "unknown"
                    raise RegistryError(
                        f"another process (pid {holder}) is changing the registry",
                        where=str(path),
                        fix="wait until it has finished, then repeat",
                    ) from None
                time.sleep(0.1)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
