"""Registering: one version for one run, whoever else is at work."""

from __future__ import annotations

from typing import Any

import pytest

from qbrec.config.sections import GateConfig
from qbrec.registry import versions
from qbrec.registry.line import all_versions
from qbrec.registry.promote import promote
from qbrec.registry.versions import register
from qbrec.tracking.client import connect
from tests.registry.conftest import Registry
from tests.support.tiny_run import TinyRun, retrained


@pytest.fixture(scope="module")
def fresh(registered: Registry) -> TinyRun:
    """A run that nobody has registered."""
    return retrained(registered.run, seed=9)


def test_known_artifacts_are_the_same_version(registry: Registry) -> None:
    run = registry.runs["1"]
    assert register(registry.config, run.run_dir, run.artifacts) == "1"
    client, _ = connect(registry.config)
    assert str(client.get_model_version_by_alias("qbrec", "challenger").version) == "1"
    assert len(all_versions(client, "qbrec")) == 3


def test_others_are_not_kept_waiting(
    registry: Registry, fresh: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While this run is uploaded, another process promotes, and a third one registers the same run."""
    inner, (client, experiment) = versions._log, connect(registry.config)
    logged: list[str] = []

    def slow(*args: Any, **kwargs: Any) -> str:
        uri = inner(*args, **kwargs)
        logged.append(uri)
        if len(logged) == 1:
            promote(registry.config, version="1", gate=GateConfig())
            assert register(registry.config, fresh.run_dir, fresh.artifacts) == "4"
        return uri

    monkeypatch.setattr(versions, "_log", slow)
    assert register(registry.config, fresh.run_dir, fresh.artifacts) == "4"
    assert registry.aliases == {"champion": "1"}
    assert [str(version.version) for version in all_versions(client, "qbrec")] == ["1", "2", "3", "4"]
    # What was uploaded in vain is marked as deleted; the version's own model is not.
    left = {model.model_uri for model in client.search_logged_models([experiment])}
    assert left & set(logged) == {logged[1]} == {client.get_model_version("qbrec", "4").source}
