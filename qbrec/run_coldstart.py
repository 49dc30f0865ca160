"""The cold start of a run: a run of its own, `<run.name>-coldstart`, and how its figures are found again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qbrec.config import RootConfig, parse_config
from qbrec.errors import ConfigError
from qbrec.registry.bundle import COLDSTART
from qbrec.run_generations import what_is_there
from qbrec.run_record import RunRecord, config_digest, run_directory
from qbrec.storage.artifact import Artifact, ArtifactStore

SUFFIX = "-coldstart"


def coldstart_config(config: RootConfig) -> RootConfig:
    """The run without the items: the same configuration over what is left of the target domain's input.

    Raises:
        ConfigError: The run's name leaves no room for the suffix, or several seeds are asked for.
    """
    from qbrec.evaluation.held_out import INTERACTIONS, ITEMS  # brings torch along

    if config.evaluation.seeds > 1:
        raise ConfigError(
            "cold start is measured with one seed",
            where="evaluation.seeds",
            fix="repeat the command with --set run.seed=… and another run.name",
        )
    tree = config.model_dump(mode="json")
    tree["run"]["name"] = config.run.name + SUFFIX
    tree["run"]["storage"] = str(Path(config.run.storage).resolve())
    cold = parse_config(tree, where=f"run.name{SUFFIX}")
    folder, target = coldstart_input(cold), config.data.target_domain
    tree["data"]["target"] = target
    tree["data"]["domains"][target] = {
        "items": str(folder / ITEMS),
        "interactions": str(folder / INTERACTIONS),
    }
    return parse_config(tree, where=f"run.name{SUFFIX}")


def coldstart_input(cold: RootConfig) -> Path:
    """Where the input without the items, and the items themselves, lie."""
    return run_directory(cold) / "input"


def with_coldstart(config: RootConfig, artifacts: Mapping[str, Artifact]) -> dict[str, Artifact]:
    """A run's artifacts, with `coldstart` where `qbrec coldstart` measured this very configuration.

    Args:
        config: Of the run with all items.
        artifacts: Its artifacts by stage, `catalog` among them.
    """
    from qbrec.evaluation.coldstart import WHOLE  # brings torch along

    found = dict(artifacts)
    try:
        cold = coldstart_config(config)
    except ConfigError:  # there cannot be one: several seeds, or a name too long for the suffix
        return found
    record = RunRecord.load(run_directory(cold))
    if record.digest == config_digest(cold):
        store = ArtifactStore(Path(config.run.storage).resolve())
        measured = what_is_there(store, record.extra.get(COLDSTART))
        if measured is not None and measured.inputs[WHOLE] == artifacts["catalog"].fingerprint:
            found[COLDSTART] = measured
    return found
