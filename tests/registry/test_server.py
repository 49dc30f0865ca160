"""The registry on a real MLflow server over HTTP: the road, read back through its REST API, and its death."""

from __future__ import annotations

import json
import shutil
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from qbrec.config import RootConfig
from qbrec.config.sections import GateConfig
from qbrec.errors import GateError, RegistryError
from qbrec.registry.promote import promote, rollback
from qbrec.registry.versions import register
from tests.registry.conftest import Registry
from tests.support.mlflow_server import Server, served
from tests.support.mlflow_store import copy_store
from tests.support.registry_commands import KILL_PROCESS, Commands, Fault
from tests.support.s3_server import free_port


@dataclass
class Remote:
    """A server with the versions 1 and 2 (@challenger); nothing is promoted.

    Attributes:
        server: Under way.
        folder: Its database and its files.
        config: Aimed at it, with a storage of its own.
    """

    server: Server
    folder: Path
    config: RootConfig


def aimed(registered: Registry, server: Server, storage: Path) -> RootConfig:
    config = registered.config
    tracking = config.tracking.model_copy(update={"uri": server.url})
    run = config.run.model_copy(update={"storage": str(storage)})
    return config.model_copy(update={"tracking": tracking, "run": run})


@pytest.fixture(scope="module")
def stock(registered: Registry, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a server to which two versions were uploaded."""
    folder = copy_store(tmp_path_factory.getbasetemp(), tmp_path_factory.mktemp("stock") / "server")
    with served(folder, free_port()) as server:
        config = aimed(registered, server, folder.parent / "storage")
        for version in ("1", "2"):
            run = registered.runs[version]
            assert register(config, run.run_dir, run.artifacts) == version
            assert aliases(server) == {"challenger": version}
    return folder


@pytest.fixture
def remote(registered: Registry, stock: Path, tmp_path: Path) -> Iterator[Remote]:
    folder = tmp_path / "server"
    shutil.copytree(stock, folder)
    with served(folder, free_port()) as server:
        yield Remote(server, folder, aimed(registered, server, tmp_path / "storage"))


def rest(server: Server, call: str, **query: str) -> dict[str, Any]:
    url = f"{server.url}/api/2.0/mlflow/{call}?{urllib.parse.urlencode(query)}"
    with urllib.request.urlopen(url, timeout=60) as reply:
        return dict(json.loads(reply.read()))


def aliases(server: Server) -> dict[str, str]:
    model = rest(server, "registered-models/get", name="qbrec")["registered_model"]
    return {one["alias"]: one["version"] for one in model["aliases"]}


def tags(server: Server, version: str) -> dict[str, str]:
    found = rest(server, "model-versions/get", name="qbrec", version=version)["model_version"]["tags"]
    return {one["key"]: one["value"] for one in found}


def test_the_road(registered: Registry, remote: Remote) -> None:
    config, server = remote.config, remote.server
    better = registered.runs["2"]
    assert register(config, better.run_dir, better.artifacts) == "2"  # known already: nothing is uploaded
    between = (registered.ndcg("1") + registered.ndcg("2")) / 2
    gate = GateConfig(min_metrics={"ndcg@10": between}, max_loss={"ndcg@10": 1.0})
    with pytest.raises(GateError, match="floor ndcg@10"):
        promote(config, version="1", gate=gate, gate_name="between")
    assert aliases(server) == {"challenger": "2"}
    assert tags(server, "1")["qbrec.gate"] == "refused"
    report = json.loads(tags(server, "1")["qbrec.gate.report"])
    assert (report["gate"], report["passed"], report["champion"]) == ("between", False, None)

    promote(config, version="1", gate=GateConfig())
    assert aliases(server) == {"challenger": "2", "champion": "1"}
    assert promote(config, gate=gate, gate_name="between").passed
    assert aliases(server) == {"challenger": "2", "champion": "2", "previous": "1"}
    found = tags(server, "2")
    assert found["qbrec.gate"] == "passed"
    assert json.loads(found["qbrec.gate.report"])["champion"] == "1"
    assert found["qbrec.finetune"] == better.artifacts["finetune"].fingerprint

    assert rollback(config) == "1"
    assert aliases(server) == {"challenger": "2", "champion": "1"}
    assert "qbrec.rolled_back" in tags(server, "2")
    verdicts = json.loads(tags(server, "1")["qbrec.gate.history"])
    assert [one["passed"] for one in verdicts] == [False, True]


def test_a_server_that_dies_and_is_gone(registered: Registry, remote: Remote, tmp_path: Path) -> None:
    """Nothing is half done that the repeated command would not complete."""
    config, server = remote.config, remote.server
    promote(config, version="1", gate=GateConfig())
    tree = {
        "run": {"storage": config.run.storage},
        "tracking": {"uri": server.url},
        "registry": {"gate": {"max_loss": {"ndcg@10": 1.0}}},
    }
    shop = tmp_path / "shop.yaml"
    shop.write_text(yaml.safe_dump(tree))
    with Commands() as commands:
        # It dies between @previous and @champion, and is not there at all for the next commands.
        fault = Fault(6, action=KILL_PROCESS, target=str(server.process.pid))
        end = commands.run(tmp_path / "dies", "promote", "--config", shop, faults=[fault])
        assert (end.code, end.struck) == (5, [6]), end.text
        assert end.writes[4:] == [
            ["set_registered_model_alias", "qbrec", "previous", "1"],
            ["set_registered_model_alias", "qbrec", "champion", "2"],
        ]
        assert "MLflow's registry refuses or cannot be reached" in end.text
        assert not server.answers()
        before = (remote.folder / "mlflow.db").read_bytes()
        lines = ("promote", "rollback", "registry list", "registry show 1", "registry diff 2 1")
        for number, line in enumerate(lines):
            end = commands.run(tmp_path / str(number), *line.split(), "--config", shop)
            assert (end.code, end.writes) == (5, []), end.text
            assert "fix:" in end.text
        with pytest.raises(RegistryError, match="cannot be reached"):
            register(config, registered.run.run_dir, registered.run.artifacts)
        assert (remote.folder / "mlflow.db").read_bytes() == before
        with served(remote.folder, int(server.url.rpartition(":")[2])) as again:
            assert aliases(again) == {"challenger": "2", "champion": "1", "previous": "1"}
            end = commands.run(tmp_path / "repeat", "promote", "--config", shop)
            assert end.code == 0, end.text
            assert aliases(again) == {"challenger": "2", "champion": "2", "previous": "1"}


def test_files_that_are_gone_from_the_server(registered: Registry, remote: Remote) -> None:
    """It answers 404 for what is missing: that is a lost champion, not a server that cannot be reached."""
    promote(remote.config, version="1", gate=GateConfig())
    evaluation = registered.runs["1"].artifacts["evaluation"]
    lost = [
        path.parent
        for path in (remote.folder / "files").rglob("evaluation/manifest.json")
        if evaluation.fingerprint in path.read_text()
    ]
    assert len(lost) == 1
    shutil.rmtree(lost[0])
    with pytest.raises(GateError, match="the evaluation of @champion, version 1, cannot be read"):
        promote(remote.config, version="2")
    assert promote(remote.config, version="2", gate=GateConfig(damaged_champion="floors")).passed
    assert aliases(remote.server) == {"challenger": "2", "champion": "2", "previous": "1"}
