"""Runs that nothing disturbed, which tests compare with what came through a fault; nobody writes to them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fault.checks import checkpoint_dir, whole_checkpoints
from tests.fault.processes import must
from tests.fault.stage import write_order


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, ID rows."""
    folder = tmp_path_factory.mktemp("alone")
    write_order(folder, rows=True)
    must(folder)
    assert whole_checkpoints(folder) == [5, 18, 20]
    assert len(list(checkpoint_dir(folder).glob("step-20/rows-*.safetensors"))) == 14
    return folder


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same on two ranks: who starts them changes no bit."""
    folder = tmp_path_factory.mktemp("pair")
    write_order(folder, rows=True, launcher="torchrun")
    must(folder, world=2)
    return folder
