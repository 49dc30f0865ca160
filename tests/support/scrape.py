"""What a metrics port of Ray serves, as Prometheus would read it."""

from __future__ import annotations

import urllib.request

from prometheus_client.parser import text_string_to_metric_families

Found = list[tuple[str, dict[str, str], float]]


def scrape(port: int, *, run: str) -> Found:
    """Name, labels and value of every sample of one run of ours; empty while the port does not answer."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
    except OSError:
        return []
    families = text_string_to_metric_families(text)
    samples = [sample for family in families for sample in family.samples]
    return [(s.name, dict(s.labels), s.value) for s in samples if s.labels.get("run") == run]
