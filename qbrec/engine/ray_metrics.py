"""Gauges on the metrics port of this node's Ray, where Prometheus finds them beside Ray's own."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray.util.metrics import Gauge

PREFIX = "ray_"  # Ray puts it before every name
Labels = tuple[tuple[str, str], ...]


class RayGauges:
    """Sets gauges while this process is connected to Ray, and does nothing, at no cost, while it is not.

    Args:
        descriptions: Name of each gauge and what it says.
    """

    def __init__(self, descriptions: Mapping[str, str]) -> None:
        self._descriptions = descriptions
        self._gauges: dict[str, Gauge] = {}

    def __call__(self, samples: Iterable[tuple[str, Labels, float]]) -> None:
        """Set each gauge; samples of one name have the same labels."""
        ray = sys.modules.get("ray")
        if ray is None or not ray.is_initialized():
            return
        from ray.util.metrics import Gauge

        for name, labels, value in samples:
            if name not in self._gauges:
                keys = tuple(key for key, _ in labels)
                self._gauges[name] = Gauge(name, description=self._descriptions[name], tag_keys=keys)
            self._gauges[name].set(value, tags=dict(labels))
