"""Runs that several files of this folder read; what they add to the storage is their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qbrec.storage.artifact import Artifact
from tests.support.grown_run import OLD, grow, view_of
from tests.support.grown_shop import configuration, learn, train, with_bonus, write_catalog


@pytest.fixture(scope="session")
def shop_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The storage of all of them."""
    return tmp_path_factory.mktemp("grown")


@pytest.fixture(scope="session")
def trained_run(shop_root: Path) -> dict[str, Artifact]:
    """Trained on the catalogue `OLD`."""
    torch.set_num_threads(1)
    return train(shop_root, write_catalog(shop_root, OLD, collapsed=["i100"]), configuration(shop_root))


@pytest.fixture(scope="session")
def grown_run(shop_root: Path, trained_run: dict[str, Artifact]) -> dict[str, Artifact]:
    """The same with three generations."""
    return grow(shop_root, trained_run)


@pytest.fixture(scope="session")
def joined_run(
    shop_root: Path, trained_run: dict[str, Artifact], grown_run: dict[str, Artifact]
) -> dict[str, Artifact]:
    """The same generations of a run with item graphs."""
    config = configuration(shop_root)
    return learn(shop_root, view_of(grown_run), with_bonus(shop_root, trained_run, config), config)
