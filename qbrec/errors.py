"""Errors a user can cause, each saying what is wrong, where, and how to mend it.

Programming mistakes are `assert`s; everything here ends the command line with `exit_code` and no traceback.
"""

from __future__ import annotations


class QbrecError(Exception):
    """Base of all errors meant for the user.

    Args:
        what: What is wrong, in one sentence.
        where: File, column, row, config key or address concerned.
        fix: What to do about it.
    """

    exit_code = 1
    retry = False  # whether the same workers, started again, may succeed; a user's mistake stays one

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(what, where, fix)

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.fix:
            lines.append(f"  fix:   {self.fix}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross process borders (Ray, spawn); keyword-only arguments need their own way back.
        return _rebuild, (type(self), self.what, self.where, self.fix)


def _rebuild(kind: type[QbrecError], what: str, where: str | None, fix: str | None) -> QbrecError:
    return kind(what, where=where, fix=fix)


class ConfigError(QbrecError):
    """A configuration file, override or command-line option is wrong."""

    exit_code = 2


class DataError(QbrecError):
    """Input data or a stored artifact is wrong, damaged or missing."""

    exit_code = 3


class CheckpointError(QbrecError):
    """A checkpoint is damaged or belongs to another run."""

    exit_code = 4


class LaunchError(QbrecError):
    """Workers or the cluster could not be started, or were lost for good."""

    exit_code = 5


class UnreachableError(LaunchError):
    """A cluster does not answer; what runs there may go on."""


class Preempted(LaunchError):
    """The run was asked to stop (SIGTERM, a node that is taken away) and did, with nothing lost."""

    exit_code = 143  # 128 + SIGTERM: what schedulers take for "stopped as I asked", not for a failure
    retry = True


class CollectiveError(LaunchError):
    """A collective failed: a rank stalled, or its connection was lost."""

    retry = True


class RegistryError(QbrecError):
    """The model registry is not reachable or has no such model."""

    exit_code = 5


class GateError(QbrecError):
    """A quality or promotion gate said no."""

    exit_code = 6
