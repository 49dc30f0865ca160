"""Who serves and who served before: aliases of the registered model, and the line of its champions.

@champion is the truth about what serves. The line is a tag of the registered model: versions in the order
in which they became champion. It outlives deleted versions, and champions that come back, so that going
back step by step ends where it began.

A command that moves aliases writes @previous before @champion when it promotes, after it when it rolls
back. If it dies in between, both are equal, which no finished command leaves: whoever comes next sees that.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHALLENGER, CHAMPION, PREVIOUS = "challenger", "champion", "previous"
LINE_TAG = "qbrec.champions"
MOST = 50  # champions remembered


@dataclass(frozen=True)
class Served:
    """Aliases as far as their versions exist, and the line.

    Attributes:
        aliases: Version by alias.
        line: Champions that exist, oldest first; the last one is @champion where there is one.
    """

    aliases: dict[str, str]
    line: tuple[str, ...]

    @property
    def champion(self) -> str | None:
        """What serves."""
        return self.aliases.get(CHAMPION)

    @property
    def previous(self) -> str | None:
        """The alias, whoever set it."""
        return self.aliases.get(PREVIOUS)

    @property
    def cut_off(self) -> bool:
        """Whether the last command died between the two aliases."""
        return self.champion is not None and self.champion == self.previous

    @property
    def before(self) -> str | None:
        """What served before @champion; the last one that served where there is no @champion."""
        earlier = self.line if self.champion is None else self.line[:-1]
        return earlier[-1] if earlier else None

    def followed_by(self, version: str) -> tuple[str, ...]:
        """The line once a version is promoted."""
        return _without_repeats([*self.line, version])

    def back_at(self, version: str) -> tuple[str, ...]:
        """The line once a version serves again: it ends there."""
        undone = self.champion not in (None, version)
        return _ending_at(self.line[:-1] if undone else self.line, version)


def read_served(client: MlflowClient, name: str) -> Served:
    """Aliases and line of a registered model; empty where there is no such model."""
    from mlflow.exceptions import MlflowException

    try:
        model = client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return Served({}, ())
        raise
    there = {str(version.version) for version in all_versions(client, name)}
    # Some stores leave the alias of a deleted version behind.
    aliases = {alias: str(version) for alias, version in model.aliases.items() if str(version) in there}
    line = tuple(version for version in _noted(model.tags.get(LINE_TAG)) if version in there)
    if not line and PREVIOUS in aliases:  # aliases that were set by hand
        line = (aliases[PREVIOUS],)
    champion = aliases.get(CHAMPION)
    return Served(aliases, _ending_at(line, champion) if champion else _without_repeats(line))


def write_line(client: MlflowClient, name: str, line: tuple[str, ...]) -> None:
    """Note the line."""
    client.set_registered_model_tag(name, LINE_TAG, json.dumps(line[-MOST:]))


def write_previous(client: MlflowClient, name: str, version: str | None) -> None:
    """Point @previous at a version, or take it away."""
    if version is None:
        client.delete_registered_model_alias(name, PREVIOUS)
    else:
        client.set_registered_model_alias(name, PREVIOUS, version)


def all_versions(client: MlflowClient, name: str) -> list[ModelVersion]:
    """All versions that exist, however many pages they fill, oldest first."""
    found: list[ModelVersion] = []
    token = None
    while True:
        page = client.search_model_versions(f"name = '{name}'", page_token=token)
        found += page
        token = page.token
        if not token:
            return sorted(found, key=lambda version: int(version.version))


def _noted(text: str | None) -> list[str]:
    try:
        found = json.loads(text or "[]")
    except ValueError:  # people can write tags too
        return []
    return [str(version) for version in found] if isinstance(found, list) else []


def _ending_at(line: Sequence[str], version: str) -> tuple[str, ...]:
    known = [place for place, one in enumerate(line) if one == version]
    return _without_repeats([*line[: known[-1] if known else len(line)], version])


def _without_repeats(line: Sequence[str]) -> tuple[str, ...]:
    """Deleting the version between two reigns of one makes one reign of them."""
    return tuple(version for version, _ in groupby(line))
