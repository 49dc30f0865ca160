"""cluster/{aws,gcp,onprem}.yaml, checked by Ray's own launcher."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError

import qbrec
from tests.support.cli import ROOT

NAMES = ("aws", "gcp", "onprem")


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster" / f"{name}.yaml").read_text(encoding="utf-8"))


def validate(config: dict[str, Any]) -> None:
    """What `ray up` does before anything else, ray-schema.json included."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(deepcopy(config)))


def starts(config: dict[str, Any]) -> tuple[str, str]:
    """The commands that start Ray on the head and on a worker."""
    head, worker = (
        [command for command in config[f"{role}_start_ray_commands"] if "ray start" in command]
        for role in ("head", "worker")
    )
    assert len(head) == len(worker) == 1
    return head[0], worker[0]


@pytest.mark.parametrize("name", NAMES)
class TestFiles:
    def test_ray_takes_it(self, name: str) -> None:
        validate(read(name))

    def test_its_image_is_this_version(self, name: str) -> None:
        assert read(name)["docker"]["image"] == f"REGISTRY/qbrec:{qbrec.__version__}"

    def test_every_node_wants_the_token(self, name: str) -> None:
        config = read(name)
        assert all(command.startswith("RAY_AUTH_MODE=token ") for command in starts(config))
        assert "/home/ray/.ray/auth_token" in config["file_mounts"]
        assert "--dashboard-host=127.0.0.1" in starts(config)[0]  # `ray dashboard` tunnels to it

    def test_the_head_takes_no_work(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """By what Ray itself makes of the launcher's override and the command line."""
        from ray._private.ray_constants import RESOURCES_ENVIRONMENT_VARIABLE
        from ray._private.resource_and_label_spec import ResourceAndLabelSpec

        config = read(name)
        types = config.get("available_node_types", {})
        override = types[config["head_node_type"]]["resources"] if types else {}
        monkeypatch.setenv(RESOURCES_ENVIRONMENT_VARIABLE, json.dumps(override))
        given = 0 if "--num-cpus=0" in starts(config)[0].split() else None
        head = ResourceAndLabelSpec(num_cpus=given, num_gpus=0).resolve(
            is_head=True, node_ip_address="127.0.0.1"
        )
        assert head.num_cpus == 0

    def test_containers_have_shared_memory_and_storage(self, name: str) -> None:
        docker = read(name)["docker"]
        options = dict(option.removeprefix("--").partition("=")[::2] for option in docker["run_options"])
        assert options["shm-size"] == "16g"
        assert options["volume"] == "/mnt/qbrec:/mnt/qbrec"
        assert docker["worker_run_options"] == ["--gpus=all"]

    def test_every_node_serves_metrics(self, name: str) -> None:
        assert all("--metrics-export-port=8080" in command.split() for command in starts(read(name)))


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_the_autoscaler_keeps_to_what_the_job_asks_for(name: str) -> None:
    config = read(name)
    workers = config["available_node_types"]["gpu"]
    assert (workers["min_workers"], workers["max_workers"]) == (2, 8)
    assert workers["max_workers"] <= config["max_workers"]
    assert workers["resources"]["GPU"] == 1


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("", "idle_timeout_minuts", 5),
        ("", "max_workers", "8"),
        ("docker", "run_option", []),
        ("docker", "image", 1),
    ],
)
def test_what_is_wrong_is_refused(section: str, key: str, value: object) -> None:
    config = read("onprem")
    (config[section] if section else config)[key] = value
    with pytest.raises((ValidationError, TypeError)):
        validate(config)
