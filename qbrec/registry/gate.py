"""May this version serve? Floors on its metrics, and a paired comparison with the one that serves now."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qbrec.config.sections import GateConfig
from qbrec.errors import ConfigError, DataError
from qbrec.evaluation.results import MODEL
from qbrec.ranking import METRICS, metrics_of_ranks
from qbrec.registry.metrics import SEEN, metric_value
from qbrec.storage.artifact import Artifact

COMPARED = "ndcg@10"
RESAMPLES = 10_000
USER_KEY = ("domain", "user", "target_row")


@dataclass(frozen=True)
class Check:
    """One question of the gate and its answer."""

    name: str
    passed: bool
    reason: str


@dataclass(frozen=True)
class Verdict:
    """All answers; passed if every one is yes."""

    version: str
    champion: str | None
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether the version may serve."""
        return all(check.passed for check in self.checks)

    def to_json(self) -> str:
        """As it is written on the version."""
        return json.dumps({**asdict(self), "passed": self.passed})

    def __str__(self) -> str:
        lines = [f"{'ok ' if c.passed else 'NO '} {c.name}: {c.reason}" for c in self.checks]
        return "\n".join(lines)


def load_gate(path: Path) -> GateConfig:
    """Read a gate file such as `mlflow/gates/default.yaml`.

    Raises:
        ConfigError: It is missing, no YAML, or has wrong keys.
    """
    import yaml

    from qbrec.config import parse_config

    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the gate: {error}", where=str(path)) from None
    return parse_config({"registry": {"gate": tree}}, where=str(path)).registry.gate


def check_floors(metrics: Mapping[str, Any], *, gate: GateConfig) -> tuple[Check, ...]:
    """Floors on the means of the version's own evaluation; an unknown metric does not pass."""
    checks = []
    for name, floor in sorted(gate.min_metrics.items()):
        value = metric_value(metrics, name)
        if value is None:
            checks.append(Check(f"floor {name}", False, "the evaluation has no such metric"))
        else:
            sign = "≥" if value >= floor else "<"
            checks.append(Check(f"floor {name}", value >= floor, f"{value:.4f} {sign} {floor:.4f}"))
    return tuple(checks)


def check_champion(challenger: Artifact, champion: Artifact, *, gate: GateConfig, seed: int) -> Check:
    """Non-inferiority on the same users: the lower end of the 95 % interval of the mean paired difference.

    Args:
        challenger: Evaluation artifact of the version that wants to serve.
        champion: Evaluation artifact of the version that serves.
        gate: How much may be lost, and what holds when the hold-outs differ.
        seed: Of the bootstrap.
    """
    name = f"not worse than @champion in {COMPARED}"
    if challenger.inputs["catalog"] != champion.inputs["catalog"]:
        return Check(
            name,
            gate.other_catalog == "floors",
            "the champion was evaluated on another catalogue, so users cannot be paired"
            + ("; floors decide (other_catalog: floors)" if gate.other_catalog == "floors" else "")
            + (
                ""
                if gate.other_catalog == "floors"
                else " (gate.other_catalog: floors lets the floors decide)"
            ),
        )
    ours, theirs = _gains(challenger), _gains(champion)
    if ours[0].shape != theirs[0].shape or not np.array_equal(ours[0], theirs[0]):
        return Check(
            name, False, "the two evaluations did not rank the same users; evaluate both with equal settings"
        )
    mean, low, high = paired_interval(ours[1] - theirs[1], seed=seed)
    passed = low >= -gate.max_ndcg_loss
    reason = f"difference {mean:+.4f} ({low:+.4f} … {high:+.4f}) on {len(ours[1]):,} users, "
    return Check(name, passed, reason + f"lower end must be ≥ {-gate.max_ndcg_loss:+.4f}")


def paired_interval(differences: NDArray[np.float64], *, seed: int) -> tuple[float, float, float]:
    """Mean and 95 % percentile interval of a paired bootstrap over users.

    A difference of two NDCG@10 takes at most 121 values, so whole resamples are drawn as multinomial counts
    of the values: the very distribution of drawing users with replacement, at a cost free of their number.

    Args:
        differences: Per user, float64 [users].
        seed: Of the resamples.
    """
    values, counts = np.unique(differences, return_counts=True)
    total = int(counts.sum())
    draws = np.random.default_rng(seed).multinomial(total, counts / total, size=RESAMPLES)
    means = draws @ values / total
    low, high = np.quantile(means, [0.025, 0.975])
    return float(differences.mean()), float(low), float(high)


def _gains(evaluation: Artifact) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """User keys int64 [users, 3], sorted, and each one's NDCG@10."""
    import pyarrow.parquet as pq

    column = f"{MODEL}_{SEEN}"
    path = evaluation.file("ranks.parquet")
    table = pq.read_table(path)
    missing = [name for name in (*USER_KEY, column) if name not in table.column_names]
    if missing:
        raise DataError(
            f"the ranks lack the columns {missing}", where=str(path), fix="evaluate the run again"
        )
    keys = np.stack([table[name].to_numpy().astype(np.int64) for name in USER_KEY], axis=1)
    ranks = table[column].to_numpy().astype(np.int64)
    order = np.lexsort(keys.T[::-1])
    return keys[order], metrics_of_ranks(ranks[order])[:, METRICS.index(COMPARED)]
