"""One small local Ray cluster for all tests of this folder."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator

import pytest

from qbrec.engine.ray_session import LOCAL_SYSTEM_CONFIG


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """Ray with two CPUs. Its sockets live below a short path: a Unix socket's name holds 107 characters."""
    import ray

    folder = tempfile.mkdtemp(prefix="qr", dir="/tmp")
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _temp_dir=folder,
        _system_config=LOCAL_SYSTEM_CONFIG,
    )
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
