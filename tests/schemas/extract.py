"""Make kubernetes.json: the definitions that our manifests need, and those that they refer to.

python tests/schemas/extract.py kubernetes_validate-1.37.0-py3-none-any.whl
"""

from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VERSION = "v1.31.0"  # what it accepts, newer ones accept too
ROOTS = (
    "io.k8s.api.core.v1.PersistentVolumeClaim",
    "io.k8s.api.core.v1.PodTemplateSpec",
    "io.k8s.api.core.v1.Service",
    "io.k8s.api.networking.v1.NetworkPolicy",
    "io.k8s.api.policy.v1.PodDisruptionBudget",
)


def references(tree: Any) -> Iterator[str]:
    """Names of the definitions that a schema refers to."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            if key == "$ref":
                yield value.rpartition("/")[2]
            else:
                yield from references(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from references(value)


def bare(tree: Any, *, names: bool = False) -> Any:
    """A schema without descriptions and extensions; `names`: the keys are names of properties."""
    if isinstance(tree, dict):
        kept = (k for k in tree if names or not (k == "description" or k.startswith("x-kubernetes-")))
        return {key: bare(tree[key], names=key == "properties" and not names) for key in kept}
    return [bare(value) for value in tree] if isinstance(tree, list) else tree


def main(wheel: str) -> None:
    place = f"kubernetes_validate/kubernetes-json-schema/{VERSION}-local-strict/_definitions.json"
    everything = json.loads(zipfile.ZipFile(wheel).read(place))["$defs"]
    todo, needed = list(ROOTS), set[str]()
    while todo:
        name = todo.pop()
        if name not in needed:
            needed.add(name)
            todo += references(everything[name])
    lines = [f"{json.dumps(name)}: {json.dumps(bare(everything[name]))}" for name in sorted(needed)]
    text = (
        '{"$schema": "https://json-schema.org/draft/2020-12/schema", "$defs": {\n'
        + ",\n".join(lines)
        + "\n}}\n"
    )
    Path(__file__).with_name("kubernetes.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
