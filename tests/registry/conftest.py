"""Three registered versions, made once; every test changes a database of its own."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from qbrec.config import RootConfig
from qbrec.registry.line import read_served
from qbrec.registry.versions import register
from qbrec.tracking.client import connect
from tests.support.mlflow_store import copy_store
from tests.support.registry_run import registry_run
from tests.support.tiny_run import TinyRun, retrained

SEEDS = (5, 2, 4)  # of versions 1, 2 and 3: the second ranks best, the first worst


@dataclass
class Registry:
    """A registry of the versions 1, 2 and 3 (@challenger); nothing is promoted.

    Attributes:
        config: Its own storage; what was logged lies in the storage of `run`.
        run: What version 1 was made of.
        runs: What each version was made of.
    """

    config: RootConfig
    run: TinyRun
    runs: dict[str, TinyRun] = field(default_factory=dict)

    @property
    def aliases(self) -> dict[str, str]:
        """Aliases of versions that exist, but for @challenger."""
        client, _ = connect(self.config)
        found = dict(read_served(client, "qbrec").aliases)
        found.pop("challenger", None)
        return found

    def tags(self, version: str) -> dict[str, str]:
        client, _ = connect(self.config)
        return dict(client.get_model_version("qbrec", version).tags)

    def bundle(self, version: str) -> Path:
        """Where the bundle of a version really lies: all registries of the session share it."""
        client, _ = connect(self.config)
        source = str(client.get_model_version("qbrec", version).source)
        model = client.get_logged_model(source.removeprefix("models:/"))
        return Path(str(model.artifact_location).removeprefix("file://")) / "artifacts" / "bundle"

    def ndcg(self, version: str) -> float:
        return float(self.runs[version].artifacts["evaluation"].meta["ndcg@10"])


@pytest.fixture(scope="session")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    folder = tmp_path_factory.mktemp("registered")
    run = registry_run(folder, seed=SEEDS[0])
    copy_store(tmp_path_factory.getbasetemp(), Path(run.config.run.storage))
    runs = {str(number): retrained(run, seed=seed) for number, seed in enumerate(SEEDS[1:], 2)}
    made = Registry(run.config, run, {"1": run, **runs})
    for version, one in made.runs.items():
        assert register(one.config, one.run_dir, one.artifacts) == version
    assert made.ndcg("1") < made.ndcg("3") < made.ndcg("2")
    return made


@pytest.fixture
def registry(registered: Registry, tmp_path: Path) -> Registry:
    storage = tmp_path / "storage"
    storage.mkdir()
    shutil.copy(Path(registered.config.run.storage) / "mlflow.db", storage)
    run = registered.config.run.model_copy(update={"storage": str(storage)})
    return Registry(registered.config.model_copy(update={"run": run}), registered.run, registered.runs)
