"""One synthetic catalogue and one finished run for the whole suite."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.cli import Road, must, qbrec, small_config


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with items.parquet and interactions.parquet of a synthetic shop with pictures."""
    folder = tmp_path_factory.mktemp("shop")
    must(qbrec("synth", folder, "--items", "400", "--users", "600"))
    return folder


@pytest.fixture(scope="session")
def road(shop: Path, tmp_path_factory: pytest.TempPathFactory) -> Road:
    """A run that nothing disturbed: two Ray workers on this machine."""
    folder = tmp_path_factory.mktemp("road")
    run = Road.write(folder, small_config(shop, folder / "storage"))
    must(run.run())
    return run
