"""Promote a version through the gate, and take it back."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from qbrec.config import RootConfig
from qbrec.config.sections import GateConfig
from qbrec.errors import GateError, RegistryError
from qbrec.registry.gate import Check, Verdict, check_champion, check_floors
from qbrec.registry.lock import registry_lock
from qbrec.registry.versions import (
    CHALLENGER,
    CHAMPION,
    PREVIOUS,
    by_alias,
    evaluation_of,
    lock_folder,
    registry_errors,
)
from qbrec.tracking.client import connect

if TYPE_CHECKING:
    from mlflow import MlflowClient

REPLACED, VERDICT, REPORT, JUDGED = "qbrec.replaced", "qbrec.gate", "qbrec.gate.report", "qbrec.gate.time"


def promote(config: RootConfig, *, version: str | None = None, gate: GateConfig | None = None) -> Verdict:
    """Ask the gate; if it says yes, the old champion becomes @previous and this version @champion.

    Args:
        config: Names the registry, the model and the gate.
        version: Version number; None: the one @challenger points to.
        gate: Another gate than the configuration's.

    Returns:
        The verdict, also written on the version as tags (`qbrec.gate`, `qbrec.gate.report`).

    Raises:
        GateError: The gate said no; nothing was moved.
        RegistryError: No such version, or MLflow is not reachable.
    """
    gate = config.registry.gate if gate is None else gate
    name = config.registry.model_name
    with registry_errors(config), registry_lock(lock_folder(config)):
        client, _ = connect(config)
        version = _wanted(client, name, version)
        champion = by_alias(client, name, CHAMPION)
        serving = str(champion.version) if champion is not None else None
        verdict = _judge(config, version, serving, gate=gate)
        client.set_model_version_tag(name, version, VERDICT, "passed" if verdict.passed else "refused")
        client.set_model_version_tag(name, version, REPORT, verdict.to_json())
        client.set_model_version_tag(name, version, JUDGED, _now())
        if not verdict.passed:
            raise GateError(
                f"the gate refuses version {version} of {name!r}:\n{verdict}",
                where=f"@champion is {'version ' + serving if serving else 'not set'}",
                fix="train a better version, or change registry.gate if its demands are not what you mean",
            )
        if serving == version:
            return verdict
        # previous first: if this process dies between the two, @champion still serves, a repeat completes it.
        if serving is not None:
            client.set_registered_model_alias(name, PREVIOUS, serving)
        client.set_model_version_tag(name, version, REPLACED, serving or "")
        client.set_registered_model_alias(name, CHAMPION, version)
    return verdict


def rollback(config: RootConfig) -> str:
    """Give @champion back to @previous; repeated, it goes back one promotion further each time.

    Returns:
        The version that serves now.

    Raises:
        RegistryError: There is nothing to go back to.
    """
    name = config.registry.model_name
    with registry_errors(config), registry_lock(lock_folder(config)):
        client, _ = connect(config)
        champion, previous = by_alias(client, name, CHAMPION), by_alias(client, name, PREVIOUS)
        if champion is None or previous is None:
            raise RegistryError(
                f"{name!r} has no @{'champion' if champion is None else 'previous'} to go back to",
                where=name,
                fix="promote a version with `qbrec promote --version N`",
            )
        back, undone = str(previous.version), str(champion.version)
        client.set_registered_model_alias(name, CHAMPION, back)
        client.set_model_version_tag(name, undone, "qbrec.rolled_back", _now())
        # What the version we return to had itself replaced is now the one before it.
        earlier = previous.tags.get(REPLACED, "")
        if earlier and earlier != undone and _exists(client, name, earlier):
            client.set_registered_model_alias(name, PREVIOUS, earlier)
        else:
            client.delete_registered_model_alias(name, PREVIOUS)
    return back


def _judge(config: RootConfig, version: str, serving: str | None, *, gate: GateConfig) -> Verdict:
    with tempfile.TemporaryDirectory(prefix="qbrec-gate-") as folder:
        challenger = evaluation_of(config, version, folder=Path(folder))
        checks = list(check_floors(challenger.load_json("metrics.json"), gate=gate))
        if serving is None:
            checks.append(Check("comparison", True, "there is no @champion yet"))
        elif serving == version:
            checks.append(Check("comparison", True, "it is @champion already: nothing to move"))
        else:
            champion = evaluation_of(config, serving, folder=Path(folder))
            checks.append(check_champion(challenger, champion, gate=gate, seed=config.run.seed))
    return Verdict(version, serving, tuple(checks))


def _wanted(client: MlflowClient, name: str, version: str | None) -> str:
    if version is None:
        found = by_alias(client, name, CHALLENGER)
        if found is None:
            raise RegistryError(
                f"{name!r} has no @challenger",
                where=name,
                fix="register a finished run with `qbrec register`",
            )
        return str(found.version)
    if not _exists(client, name, version):
        raise RegistryError(f"{name!r} has no version {version}", where=name, fix="see `qbrec versions`")
    return version


def _exists(client: MlflowClient, name: str, version: str) -> bool:
    return any(str(v.version) == version for v in client.search_model_versions(f"name = '{name}'"))


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
