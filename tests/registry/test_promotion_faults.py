"""Promotions that race, and commands that are killed at every point where they change the registry."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from qbrec.config.sections import GateConfig
from qbrec.registry.promote import promote, rollback
from qbrec.registry.verdicts import history, last
from tests.registry.conftest import Registry
from tests.support.registry_commands import TRYING, WAIT_FOR, Commands, Fault

ANY = GateConfig(max_loss={})


@pytest.fixture(scope="module")
def commands() -> Iterator[Commands]:
    with Commands() as started:
        yield started


@pytest.fixture
def config(registry: Registry, tmp_path: Path) -> Path:
    """A configuration file whose gate lets everything pass."""
    gate = {"max_loss": {"ndcg@10": 1.0}}
    tree = {"run": {"storage": registry.config.run.storage}, "registry": {"gate": gate}}
    (tmp_path / "shop.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "shop.yaml"


def promoted(registry: Registry, *versions: str) -> None:
    for version in versions:
        promote(registry.config, version=version, gate=ANY)


@pytest.mark.parametrize("held", [True, False], ids=["held", "free"])
def test_two_promotions_at_once(
    registry: Registry, commands: Commands, config: Path, tmp_path: Path, held: bool
) -> None:
    """Held: the first one has the lock, and has written half, until the second has judged and asks for it."""
    promoted(registry, "1")
    waits = [Fault(4, action=WAIT_FOR, target=str(tmp_path / "b" / TRYING))] if held else []
    first = commands.start(tmp_path / "a", "promote", "--config", config, "--version", "2", faults=waits)
    if held:
        first.has_tried()
    second = commands.start(tmp_path / "b", "promote", "--config", config, "--version", "3")
    ends = [first.end(), second.end()]
    assert [end.code for end in ends] == [0, 0], [end.text for end in ends]
    reports = [last(registry.tags(version)) for version in ("2", "3")]
    assert all(report is not None and report["passed"] for report in reports)
    champions = {report["champion"] for report in reports if report is not None}
    winner, loser = registry.aliases["champion"], registry.aliases["previous"]
    # One replaced version 1, the other was judged against that one, and replaced it.
    assert {winner, loser} == {"2", "3"}
    assert champions == {"1", loser}
    assert [len(history(registry.tags(version))) for version in ("2", "3")] == [1, 1]
    if held:
        assert (ends[0].struck, winner) == ([4], "3")
    assert [rollback(registry.config), rollback(registry.config)] == [loser, "1"]


# Tags of the verdict, the line of champions, @previous, @champion.
PROMOTION = [
    "set_model_version_tag",
    "set_model_version_tag",
    "set_model_version_tag",
    "set_registered_model_tag",
    "set_registered_model_alias",
    "set_registered_model_alias",
]


@pytest.mark.parametrize("write", range(1, len(PROMOTION) + 2))
def test_a_killed_promotion_is_repeated(
    registry: Registry, commands: Commands, config: Path, tmp_path: Path, write: int
) -> None:
    promoted(registry, "1", "2")
    fault = Fault(write) if write <= len(PROMOTION) else Fault(len(PROMOTION), after=True)
    end = commands.run(tmp_path / "a", "promote", "--config", config, "--version", "3", faults=[fault])
    assert (end.code, end.struck) == (-signal.SIGKILL, [fault.write]), end.text
    assert [name for name, *_ in end.writes] == PROMOTION[: fault.write]
    found = registry.aliases
    if fault.after:
        assert found == {"champion": "3", "previous": "2"}
    else:
        assert found == {"champion": "2", "previous": "2" if write == len(PROMOTION) else "1"}
    promoted(registry, "3")
    assert registry.aliases == {"champion": "3", "previous": "2"}
    assert [rollback(registry.config), rollback(registry.config)] == ["2", "1"]


def test_a_killed_promotion_is_given_up(
    registry: Registry, commands: Commands, config: Path, tmp_path: Path
) -> None:
    """By a rollback, or by promoting what serves: both leave what was there before."""
    promoted(registry, "1", "2")
    for name in ("rollback", "promote"):
        fault = Fault(len(PROMOTION))
        end = commands.run(tmp_path / name, "promote", "--config", config, "--version", "3", faults=[fault])
        assert end.struck == [fault.write], end.text
        assert registry.aliases == {"champion": "2", "previous": "2"}
        if name == "rollback":
            assert rollback(registry.config) == "2"
        else:
            promoted(registry, "2")
        assert registry.aliases == {"champion": "2", "previous": "1"}


# @previous, @champion, a tag on the version that was taken back, the line, @previous.
ROLLBACK = [
    "set_registered_model_alias",
    "set_registered_model_alias",
    "set_model_version_tag",
    "set_registered_model_tag",
    "set_registered_model_alias",
]


@pytest.mark.parametrize("write", range(1, len(ROLLBACK) + 1))
def test_a_killed_rollback_is_repeated(
    registry: Registry, commands: Commands, config: Path, tmp_path: Path, write: int
) -> None:
    """The repeat ends what was begun, and goes back no further."""
    promoted(registry, "1", "2", "3")
    end = commands.run(tmp_path / "a", "rollback", "--config", config, faults=[Fault(write)])
    assert (end.code, end.struck) == (-signal.SIGKILL, [write]), end.text
    assert [name for name, *_ in end.writes] == ROLLBACK[:write]
    assert registry.aliases["champion"] == ("3" if write <= 2 else "2")
    assert rollback(registry.config) == "2"
    assert registry.aliases == {"champion": "2", "previous": "1"}
