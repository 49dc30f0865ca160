"""Kubernetes objects of cluster/kuberay, and the published schemas in tests/schemas."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

from tests.support.cli import ROOT

SCHEMAS = ROOT / "tests" / "schemas"
KUBERAY = ROOT / "cluster" / "kuberay"
_WHERE = {
    ("v1", "PersistentVolumeClaim"): "kubernetes.json#/$defs/io.k8s.api.core.v1.PersistentVolumeClaim",
    (
        "networking.k8s.io/v1",
        "NetworkPolicy",
    ): "kubernetes.json#/$defs/io.k8s.api.networking.v1.NetworkPolicy",
    ("policy/v1", "PodDisruptionBudget"): "kubernetes.json#/$defs/io.k8s.api.policy.v1.PodDisruptionBudget",
    ("ray.io/v1", "RayCluster"): "kuberay.yaml#/$defs/RayCluster",
    ("ray.io/v1", "RayJob"): "kuberay.yaml#/$defs/RayJob",
    ("monitoring.coreos.com/v1", "PodMonitor"): "prometheus_operator.yaml#/$defs/PodMonitor",
}


def objects(file: Path) -> list[dict[str, Any]]:
    """Every object of a manifest; what YAML aliases share there is a copy each here."""
    return list(json.loads(_as_json(file)))


@cache
def _as_json(file: Path) -> str:
    return json.dumps(list(yaml.safe_load_all(file.read_text(encoding="utf-8"))))


def problems(tree: dict[str, Any]) -> list[str]:
    """What a strict API server would say to an object: `path: message`."""
    reference = {"$ref": _WHERE[tree["apiVersion"], tree["kind"]]}
    errors = Draft202012Validator(reference, registry=_registry()).iter_errors(tree)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in errors]


@cache
def _registry() -> Registry:
    def read(path: Path) -> Any:
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)

    files = [path for path in SCHEMAS.iterdir() if path.suffix in (".json", ".yaml")]
    return Registry().with_resources((path.name, Resource.from_contents(read(path))) for path in files)


def pod_templates(tree: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Pod templates of a RayCluster or RayJob: `head`, each worker group by name, `submitter`."""
    cluster = tree["spec"].get("rayClusterSpec", tree["spec"])
    found = {"head": cluster["headGroupSpec"]["template"]}
    found |= {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    if "submitterPodTemplate" in tree["spec"]:
        found["submitter"] = tree["spec"]["submitterPodTemplate"]
    return found


def differences(left: Any, right: Any, path: str = "") -> set[str]:
    """Paths at which two documents differ."""
    if isinstance(left, dict) and isinstance(right, dict):
        return {
            where
            for key in left.keys() | right.keys()
            for where in differences(left.get(key), right.get(key), f"{path}.{key}".strip("."))
        }
    if isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        pairs = enumerate(zip(left, right, strict=True))
        return {where for i, (a, b) in pairs for where in differences(a, b, f"{path}.{i}")}
    return set() if left == right else {path}
