"""Finished runs for the registry, made in a second and without Ray: nothing is trained, all else is real."""

from __future__ import annotations

from pathlib import Path

from qbrec.config import parse_config
from tests.support.grown_shop import draw, write_catalog
from tests.support.tiny_run import TinyRun, retrained


def registry_run(folder: Path, *, seed: int = 1, shop: str = "", features: int = 0) -> TinyRun:
    """A run up to its evaluation, with a storage of its own below `folder`.

    Args:
        folder: Where to.
        seed: Of its codes and its encoder.
        shop: Begins the names of its items: another one is another hold-out.
        features: Another number is another catalogue of the same items and users.
    """
    config = parse_config(
        {
            "run": {"name": "tiny", "storage": str(folder / "storage")},
            "data": {"domains": {"shop": {"items": "-", "interactions": "-"}}},
            "sequence": {"width": 32, "layers": 1, "heads": 2, "max_items": 10},
            "evaluation": {"bootstrap": 100, "baselines": ["popularity"]},
        }
    )
    items = draw(120, f"{shop}i", seed=features)
    catalog = write_catalog(folder / "storage", items, num_users=200, tested=True)
    run = TinyRun(config, folder / "storage" / "runs" / config.run.name, {"catalog": catalog})
    return retrained(run, seed=seed)
