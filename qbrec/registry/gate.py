"""May this version serve? The questions a gate asks, the answers, and the gates that come with qbrec."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from qbrec.config.sections import GateConfig
from qbrec.errors import ConfigError
from qbrec.registry.shipped import shipped, shipped_names

GATES = "gates"  # folder of those that come with qbrec
OWN_GATE = "registry.gate"  # name of the one in the configuration


@dataclass(frozen=True)
class Check:
    """One question of the gate and its answer."""

    name: str
    passed: bool
    reason: str


@dataclass(frozen=True)
class Verdict:
    """All answers; passed if every one is yes.

    Attributes:
        version: The version that was judged.
        champion: The one that served, or None.
        gate: Name of the gate.
        time: When, UTC.
        checks: The answers.
    """

    version: str
    champion: str | None
    gate: str
    time: str
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


def named_gate(name: str) -> tuple[str, GateConfig]:
    """A gate by the path of its file, or by name one of those that come with qbrec.

    Returns:
        Its name, and the gate.

    Raises:
        ConfigError: There is no such gate, or it is wrong.
    """
    if Path(name).is_file():
        return Path(name).stem, load_gate(Path(name))
    known = shipped_names(GATES, suffix=".yaml")
    if name not in known:
        raise ConfigError(
            f"there is no gate {name!r}",
            where="--gate",
            fix=f"name a file, or one of {', '.join(known)}",
        )
    return name, load_gate(shipped(f"{GATES}/{name}.yaml"))


def load_gate(path: Path) -> GateConfig:
    """Read a gate file such as `mlflow/gates/default.yaml`.

    Raises:
        ConfigError: It is missing, no YAML, or has wrong keys.
    """
    import yaml

    from qbrec.config import parse_config

    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the gate: {error}", where=str(path)) from None
    return parse_config({"registry": {"gate": tree}}, where=str(path)).registry.gate
