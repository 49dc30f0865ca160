"""Marks by folder, settings that every suite shares."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support.s3_server import ENVIRONMENT, FaultProxy, fault_proxy, free_port, s3_server

TESTS = Path(__file__).parent
MARKS = {
    "dist": pytest.mark.dist,
    "ray": pytest.mark.ray,
    "gpu": pytest.mark.gpu,
    "fault": pytest.mark.slow,
    "e2e": pytest.mark.slow,
}

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
# No test asks a real store; workers that are started at any time find the local one, once a test needs it.
os.environ |= ENVIRONMENT
S3_PORT = free_port()
os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{S3_PORT}"
# The first example of a property pays for imports, and CI machines stall: deadlines only make noise.
settings.register_profile("qbrec", deadline=None)
settings.load_profile("qbrec")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test's folder says what it needs."""
    for item in items:
        mark = MARKS.get(item.path.relative_to(TESTS).parts[0])
        if mark is not None:
            item.add_marker(mark)
        if item.get_closest_marker("gpu") is not None and not _has_gpu():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def s3_proxy() -> Iterator[FaultProxy]:
    """A local S3 behind a proxy that can make requests fail, at the endpoint of the environment."""
    with s3_server() as server, fault_proxy(server, port=S3_PORT) as proxy:
        yield proxy


@pytest.fixture
def s3(s3_proxy: FaultProxy) -> FaultProxy:
    """The same, with no faults planned."""
    s3_proxy.reset()
    return s3_proxy


@pytest.fixture(scope="session")
def bench_data() -> Path:
    """Folder of the real data sets; tests that need it are skipped where QBREC_BENCH_DATA is unset."""
    place = os.environ.get("QBREC_BENCH_DATA")
    if not place:
        pytest.skip("QBREC_BENCH_DATA is unset: no real data to measure on")
    return Path(place)
