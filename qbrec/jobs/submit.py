"""Send a run to a cluster: the code, the configuration and the identity under which it resumes."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

import qbrec
from qbrec.config import RootConfig, dump_config
from qbrec.errors import ConfigError, LaunchError
from qbrec.jobs.attempts import (
    RUN,
    STOP_WAIT,
    STORAGE,
    Attempt,
    attempt_of,
    attempts,
    next_number,
    same_run,
    submission_id,
)

if TYPE_CHECKING:
    from qbrec.jobs.ray_client import JobClient

CONFIG_VARIABLE = "QBREC_CONFIG"
_STOP_VARIABLE = "RAY_JOB_STOP_WAIT_TIME_S"
_STOP_MARGIN_S = 30  # that Ray waits longer than the driver, which waits for its workers' checkpoint
_RUNTIME_ENV = "runtime_env.yaml"


def submit(
    client: JobClient, config: RootConfig, *, resume: str = "auto", runtime_env: Path | None = None
) -> Attempt:
    """Submit the next attempt of a run; it goes on where the last one stopped.

    Args:
        client: The cluster.
        config: The configuration, checked by `portable.check_portable`.
        resume: `--resume` of the run.
        runtime_env: Another file than `launch/runtime_env.yaml`.

    Raises:
        ConfigError: The file is wrong.
        LaunchError: An attempt of this run has not ended yet, or the cluster refuses.
    """
    environment = job_environment(config, runtime_env)
    name, storage = config.run.name, same_run(config.run.storage)
    entrypoint = ["python", "-m", "qbrec", "run", "--config", f"env:{CONFIG_VARIABLE}"]
    if resume != "auto":
        entrypoint += ["--resume", resume]
    while True:
        check_free(client, name, storage)
        wanted = submission_id(name, next_number(client, name))
        try:
            client.submit_job(
                entrypoint=shlex.join(entrypoint),
                submission_id=wanted,
                runtime_env=environment,
                metadata={RUN: name, STORAGE: storage, STOP_WAIT: environment["env_vars"][_STOP_VARIABLE]},
            )
            break
        except LaunchError:
            if wanted not in {job.submission_id for job in client.submissions()}:
                raise
            # Somebody was faster and took the id: for this run, which the next look shows, or for another
            # storage's, which leaves the next number to us.
        except (ValueError, TypeError, RuntimeError) as error:  # of the environment, or too much to upload
            raise LaunchError(
                f"Ray does not take the job: {(str(error).splitlines() or [''])[0][:500]}",
                where=client.get_address(),
                fix=f"is {environment.get('working_dir', 'the runtime environment')} right? What .rayignore "
                "names there stays here",
            ) from None
    found = attempt_of(client.get_job_info(wanted))
    assert found is not None
    return found


def check_free(client: JobClient, name: str, storage: str) -> None:
    """Refuse a run of which an attempt has not ended yet.

    Raises:
        LaunchError: There is one.
    """
    for attempt in attempts(client):
        if (attempt.run, attempt.storage) == (name, storage) and not attempt.has_ended:
            raise LaunchError(
                f"attempt {attempt.number} of the run {name!r} is {attempt.status}",
                where=f"{attempt.id} on {client.get_address()}, storage {storage}",
                fix=f"follow it (`qbrec logs {name} --follow`), stop it (`qbrec stop {name}`), or choose "
                "another run.name",
            )


def job_environment(config: RootConfig, file: Path | None = None) -> dict[str, Any]:
    """Ray's runtime environment of the job: the file's, with code and configuration in it.

    The configuration travels whole, in a variable: it is then the same with and without uploaded code, code
    that was uploaded once is not uploaded again for another configuration, and Ray's dashboard hides it.

    Args:
        config: The configuration.
        file: Another file than `launch/runtime_env.yaml`.

    Raises:
        ConfigError: The file is not there or is no runtime environment.
    """
    path = file or shipped_runtime_env()
    try:
        environment: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the runtime environment: {error}", where=str(path)) from None
    variables = environment.setdefault("env_vars", {}) if isinstance(environment, dict) else None
    if not isinstance(variables, dict):
        raise ConfigError(
            "a runtime environment is a mapping, and so are its env_vars",
            where=str(path),
            fix="see launch/runtime_env.yaml",
        )
    code = code_folder()
    if code is not None:
        environment.setdefault("working_dir", str(code))
    variables[CONFIG_VARIABLE] = dump_config(config)
    told = str(variables.get(_STOP_VARIABLE, 0))
    if not told.isdecimal():
        raise ConfigError(
            f"{_STOP_VARIABLE} is no whole number of seconds: {told!r}", where=str(path), fix='write "90"'
        )
    needed = math.ceil(config.compute.stop_grace_s) + _STOP_MARGIN_S
    variables[_STOP_VARIABLE] = str(max(int(told), needed))
    return environment


def code_folder() -> Path | None:
    """The checkout this code runs from; None where qbrec is installed, as it then is on the nodes."""
    root = Path(qbrec.__file__).resolve().parents[1]
    # Without .rayignore there is nothing that says what of a folder is code.
    return root if (root / "pyproject.toml").is_file() and (root / ".rayignore").is_file() else None


def shipped_runtime_env() -> Path:
    """`launch/runtime_env.yaml`: of the source checkout, or inside the installed package.

    Raises:
        ConfigError: The installation is incomplete.
    """
    package = Path(qbrec.__file__).resolve().parent
    for path in (package.parent / "launch" / _RUNTIME_ENV, package / "_launch" / _RUNTIME_ENV):
        if path.is_file():
            return path
    raise ConfigError(
        f"{_RUNTIME_ENV} is missing", where=str(package), fix="install qbrec again from its wheel"
    )
