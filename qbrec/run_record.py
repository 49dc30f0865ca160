"""`<storage>/runs/<name>/`: who owns a run, what it is made of, how far it came."""

from __future__ import annotations

import fcntl
import hashlib
import json
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from qbrec.config import RootConfig, dump_config, load_config
from qbrec.errors import ConfigError, LaunchError
from qbrec.storage.artifact import write_atomic
from qbrec.tracking.flatten import flatten_params

_SHOWN = 4  # keys that differ, in an error


def run_directory(config: RootConfig) -> Path:
    """Directory of a run; its identity is (storage, name)."""
    return Path(config.run.storage).resolve() / "runs" / config.run.name


class RunRecord:
    """A run on disk, held by one process at a time.

    Attributes:
        path: The run's directory.
        stages: Stage → {"key", "path", "seconds"} of every stage brought up to date.
        attempts: Stage → {"key", "seconds"} of stages that were begun and are not up to date yet.
        owner: Mark of this process, also in the run's directory: an earlier one's workers see they are late.
        extra: Further facts, such as the registered version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stages: dict[str, dict[str, Any]] = {}
        self.attempts: dict[str, dict[str, Any]] = {}
        self.extra: dict[str, Any] = {}
        self.digest = ""
        self.owner = ""
        self._lock: IO[str] | None = None

    @classmethod
    def load(cls, path: Path) -> RunRecord:
        """Read a run without owning it; an empty record where there is none."""
        record = cls(path)
        file = path / "run.json"
        if file.is_file():
            document = json.loads(file.read_text(encoding="utf-8"))
            record.stages, record.extra = document["stages"], document["extra"]
            record.attempts, record.digest = document.get("attempts", {}), document["digest"]
        return record

    @classmethod
    def own(cls, config: RootConfig, *, resume: str) -> RunRecord:
        """Open or begin the run of a configuration and keep other processes out until `close`.

        Args:
            config: The configuration.
            resume: `auto` goes on where there is something to go on from, `must` insists on it, `never`
                refuses.

        Raises:
            ConfigError: The name is in use with another configuration, or `resume` does not fit.
            LaunchError: Another process is running it.
        """
        from qbrec.engine.context import OWNER  # brings torch along

        path = run_directory(config)
        existed = (path / "run.json").is_file()
        if resume == "must" and not existed:
            raise ConfigError("there is no run to resume", where=str(path), fix="drop --resume must")
        if resume == "never" and existed:
            raise ConfigError("the run exists already", where=str(path), fix="choose another run.name")
        path.mkdir(parents=True, exist_ok=True)
        lock = open(path / ".lock", "w")  # noqa: SIM115 - held until the run ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise LaunchError(
                "another process is running this run",
                where=str(path),
                fix="wait for it, or choose another run.name",
            ) from None
        record = cls.load(path)
        record._lock = lock
        digest = config_digest(config)
        if record.digest and record.digest != digest:
            lock.close()
            differing = _differing(config, path)
            raise ConfigError(
                f"the run name {config.run.name!r} is in use with another configuration{differing}",
                where=str(path / "config.yaml"),
                fix="choose another run.name (runs share finished stages), or delete that folder",
            )
        record.digest = digest
        record.owner = uuid.uuid4().hex
        write_atomic(path / OWNER, record.owner.encode())
        write_atomic(path / "config.yaml", dump_config(config).encode())
        record.save()
        return record

    @contextmanager
    def timed(self, stage: str, key: str) -> Iterator[None]:
        """Note the seconds of an attempt, however the block ends; those cut off before it count too."""
        earlier = self.attempts.get(stage, {})
        spent = earlier["seconds"] if earlier.get("key") == key else 0.0
        start = time.monotonic()
        try:
            yield
        finally:
            self.attempts[stage] = {"key": key, "seconds": round(spent + time.monotonic() - start, 1)}
            self.save()

    def complete(self, stage: str, *, key: str, path: Path) -> None:
        """A stage is up to date: made by the attempts noted, or found as it was.

        Args:
            stage: Which one.
            key: Of its artifact.
            path: Where that lies.
        """
        attempt, before = self.attempts.pop(stage, {}), self.stages.get(stage, {})
        made = next((one for one in (attempt, before) if one.get("key") == key), {})
        self.stages[stage] = {"key": key, "path": str(path), "seconds": made.get("seconds", 0.0)}
        self.save()

    def save(self) -> None:
        """Write run.json."""
        document = {
            "digest": self.digest,
            "stages": self.stages,
            "attempts": self.attempts,
            "extra": self.extra,
        }
        write_atomic(self.path / "run.json", json.dumps(document, indent=1, sort_keys=True).encode())

    def close(self) -> None:
        """Let other processes have the run."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def config_digest(config: RootConfig) -> str:
    """Hash of what makes two runs the same: all but where and how wide they execute, and who may serve."""
    return hashlib.sha256(json.dumps(_identity(config), sort_keys=True).encode()).hexdigest()


def _identity(config: RootConfig) -> dict[str, Any]:
    tree = config.model_dump(mode="json", exclude={"compute", "registry", "serving", "tracking"})
    for place in ("storage", "remote"):
        del tree["run"][place]
    return tree


def _differing(config: RootConfig, path: Path) -> str:
    """`: key is A there, B here; …`; nothing where the run's configuration cannot be read any more."""
    try:
        there = flatten_params(_identity(load_config(path / "config.yaml")))
    except (ConfigError, OSError):  # removed, or of a release with other keys
        return ""
    here = flatten_params(_identity(config))
    found = [
        f"{key} is {there.get(key, 'not set')} there, {here.get(key, 'not set')} here"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key)
    ]
    more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return ": " + "; ".join(found[:_SHOWN]) + more if found else ""
