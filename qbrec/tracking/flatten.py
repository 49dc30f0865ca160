"""Nested documents as the flat names and texts that MLflow accepts."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

_FORBIDDEN = re.compile(r"[^\w\-./ ]", re.ASCII)
MAX_KEY = 250


def flatten_params(tree: Mapping[str, Any], *, prefix: str = "") -> dict[str, str]:
    """`{"train": {"epochs": 3}}` as `{"train.epochs": "3"}`; empty sections vanish, None becomes `null`."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, Mapping):
            flat.update(flatten_params(value, prefix=name))
        else:
            flat[safe_name(name)] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


def flatten_numbers(tree: Any, *, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every finite number of a document with its path joined by `/`; all else is passed over."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from flatten_numbers(value, prefix=f"{prefix}/{key}" if prefix else str(key))
    elif isinstance(tree, int | float) and not isinstance(tree, bool) and math.isfinite(tree) and prefix:
        yield safe_name(prefix), float(tree)


def safe_name(name: str) -> str:
    """A name MLflow takes on any platform: `ndcg@10` becomes `ndcg_at_10`."""
    return _FORBIDDEN.sub("_", name.replace("@", "_at_"))[:MAX_KEY]
