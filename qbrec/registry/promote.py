"""Promote a version through the gate, and take it back."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from qbrec.config import RootConfig
from qbrec.config.sections import GateConfig
from qbrec.errors import GateError, RegistryError
from qbrec.registry.gate import OWN_GATE, Verdict
from qbrec.registry.judge import Judge
from qbrec.registry.line import (
    CHALLENGER,
    CHAMPION,
    Served,
    all_versions,
    read_served,
    write_line,
    write_previous,
)
from qbrec.registry.lock import registry_lock
from qbrec.registry.verdicts import note
from qbrec.registry.versions import lock_folder, registry_errors
from qbrec.tracking.client import connect

if TYPE_CHECKING:
    from mlflow import MlflowClient

ROLLED_BACK = "qbrec.rolled_back"


def promote(
    config: RootConfig,
    *,
    version: str | None = None,
    gate: GateConfig | None = None,
    gate_name: str = OWN_GATE,
) -> Verdict:
    """Ask the gate; if it says yes, the old champion becomes @previous and this version @champion.

    The gate is asked without the lock, since it may measure for a while; if another version becomes @champion
    meanwhile, it is asked again about that one.

    Args:
        config: Names the registry, the model and the gate.
        version: Version number; None: the one @challenger points to.
        gate: Another gate than the configuration's.
        gate_name: Its name, for the verdict.

    Returns:
        The verdict, also written on the version as tags (see `verdicts`).

    Raises:
        GateError: The gate said no; nothing was moved.
        DataError: The version holds no bundle, or a damaged one; nothing was judged or moved.
        RegistryError: No such version, or MLflow is not reachable.
    """
    gate = config.registry.gate if gate is None else gate
    name = config.registry.model_name
    with registry_errors(config), tempfile.TemporaryDirectory(prefix="qbrec-gate-") as folder:
        client, _ = connect(config)
        served = read_served(client, name)
        version = _wanted(client, name, version or served.aliases.get(CHALLENGER))
        judge = Judge(config, version, gate=gate, gate_name=gate_name, folder=Path(folder))
        while True:
            verdict = judge.against(served.champion)
            with registry_lock(lock_folder(config)):
                served = read_served(client, name)
                if served.champion == verdict.champion:
                    note(client, name, verdict, tags=client.get_model_version(name, version).tags)
                    if not verdict.passed:
                        raise _refusal(name, verdict)
                    _move(client, name, served, version)
                    return verdict


def rollback(config: RootConfig) -> str:
    """Give @champion back to @previous; repeated, it goes back one promotion further each time.

    What an unfinished `promote` or `rollback` left behind is undone or completed, no more.

    Returns:
        The version that serves now.

    Raises:
        RegistryError: There is nothing to go back to.
    """
    name = config.registry.model_name
    with registry_errors(config), registry_lock(lock_folder(config)):
        client, _ = connect(config)
        served = read_served(client, name)
        back = served.previous or served.before
        if back is None:
            raise RegistryError(
                f"{name!r} has no @{'champion' if served.champion is None else 'previous'} to go back to",
                where=name,
                fix="promote a version with `qbrec promote --version N`",
            )
        if not served.cut_off:
            # So that a repeat after a death only ends what this command began.
            write_previous(client, name, back)
            client.set_registered_model_alias(name, CHAMPION, back)
            if served.champion is not None:
                client.set_model_version_tag(name, served.champion, ROLLED_BACK, _now())
        line = served.back_at(back)
        write_line(client, name, line)
        write_previous(client, name, line[-2] if len(line) > 1 else None)
    return back


def _move(client: MlflowClient, name: str, served: Served, version: str) -> None:
    """Let a version serve. Dying in between, the old champion serves, and a repeat completes it."""
    if served.champion == version:
        if served.cut_off:
            write_previous(client, name, served.before)
        return
    line = served.followed_by(version)
    write_line(client, name, line)
    write_previous(client, name, line[-2] if len(line) > 1 else None)
    client.set_registered_model_alias(name, CHAMPION, version)


def _refusal(name: str, verdict: Verdict) -> GateError:
    serving = f"version {verdict.champion}" if verdict.champion else "not set"
    return GateError(
        f"the gate {verdict.gate!r} refuses version {verdict.version} of {name!r}:\n{verdict}",
        where=f"@champion is {serving}",
        fix="train a better version, or change the gate if its demands are not what you mean",
    )


def _wanted(client: MlflowClient, name: str, version: str | None) -> str:
    if version is None:
        raise RegistryError(
            f"{name!r} has no @challenger",
            where=name,
            fix="register a finished run with `qbrec register`",
        )
    if all(str(one.version) != version for one in all_versions(client, name)):
        raise RegistryError(f"{name!r} has no version {version}", where=name, fix="see `qbrec registry list`")
    return version


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
