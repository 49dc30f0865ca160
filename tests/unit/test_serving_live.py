"""What keeps a version in service: how often the registry is asked, failures, what Ray Serve is told."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import pytest

import qbrec.serving.live as live_module
from qbrec.config import parse_config
from qbrec.engine.actor_pool import ActorPool
from qbrec.errors import ConfigError, DataError, RegistryError
from qbrec.run_record import config_digest
from qbrec.serving.live import LiveModel
from qbrec.serving.service import application
from qbrec.serving.versions import Version, find_version, model_uri


def watched(poll_s: float) -> LiveModel:
    return LiveModel(parse_config({"serving": {"poll_s": poll_s}}), "models:/qbrec@champion")


def until(holds: Any) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_registry_is_asked_as_often_as_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[float, int] = {0.02: 0, 600.0: 0}

    def gone(config: Any, uri: str) -> Version:
        asked[config.serving.poll_s] += 1
        raise RegistryError("the registry is away", where=uri)

    monkeypatch.setattr(live_module, "find_version", gone)
    both = [watched(poll_s) for poll_s in asked]
    for live in both:
        live.start()
    until(lambda: asked[0.02] > 5 and asked[600.0] == 1)
    assert asked[600.0] == 1
    told = both[0].describe()
    assert told["serving"] is None
    assert told["registry_error"].startswith("the registry is away")
    for live in both:
        assert live.is_alive
        live.stop()
        live._thread.join(30)
        assert not live._thread.is_alive()


def test_a_version_that_fails_is_tried_again_with_growing_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[float] = []

    def broken(config: Any, version: Version) -> Any:
        tried.append(time.monotonic())
        raise DataError("its file is damaged", where="encoder.safetensors")

    monkeypatch.setattr(live_module, "find_version", lambda *_: Version("qbrec", "7", "run", {}))
    monkeypatch.setattr(live_module, "fetch_bundle", broken)
    live = watched(0.02)
    live.start()
    until(lambda: len(tried) == 4)
    live.stop()
    assert live.current is None
    failed = live.describe()["failed"]
    assert failed["version"] == "7"
    assert "encoder.safetensors" in failed["error"]
    pauses = [after - before for before, after in pairwise(tried)]
    for attempt, pause in enumerate(pauses, 1):
        assert pause >= 0.02 * 2**attempt * 0.99


def test_what_ray_serve_is_told() -> None:
    config = parse_config({"serving": {"max_waiting": 10, "drain_s": 7.0}})
    made = application(config, "models:/qbrec/3", replicas=2, pool=ActorPool(1, 2, 0.0, 3, "cpu"))
    deployment = made._bound_deployment
    assert deployment.num_replicas == 2
    assert deployment.max_ongoing_requests > deployment.max_queued_requests == 10
    assert deployment._deployment_config.graceful_shutdown_timeout_s == 7.0
    assert deployment.ray_actor_options["num_cpus"] == 3


def test_how_it_is_served_is_no_part_of_a_run() -> None:
    assert config_digest(parse_config({"serving": {"max_batch": 3}})) == config_digest(parse_config({}))


def test_uris() -> None:
    assert model_uri("qbrec", alias="champion") == "models:/qbrec@champion"
    assert model_uri("qbrec", alias="champion", number="3") == "models:/qbrec/3"
    for wrong in ("qbrec", "models:/qbrec", "models:/qbrec@", "models:/a/b", "runs:/x"):
        with pytest.raises(ConfigError, match="names no registered model"):
            find_version(parse_config({}), wrong)
