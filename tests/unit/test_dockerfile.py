"""The image: pinned, built from what is in the repository, not run as root."""

from __future__ import annotations

import re
import tomllib
from typing import NamedTuple

import pytest

import qbrec
from tests.support.cli import ROOT
from tests.support.pins import pins

DOCKERFILE = ROOT / "cluster" / "Dockerfile"


class Step(NamedTuple):
    """One instruction of a stage."""

    instruction: str
    arguments: str


def stages(text: str) -> dict[str, list[Step]]:
    """Name of each stage -> its instructions, `FROM` first; those before the first stage under ""."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    found: dict[str, list[Step]] = {"": []}
    name = ""
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        if not line.strip():
            continue
        instruction, _, arguments = line.partition(" ")
        if instruction == "FROM":
            match = re.fullmatch(r"(\S+) AS (\S+)", arguments)
            assert match, line
            name = match[2]
            found[name] = []
        found[name].append(Step(instruction, arguments.strip()))
    return found


def with_bases(name: str, found: dict[str, list[Step]]) -> list[Step]:
    """All steps that an image of this stage goes through."""
    base = found[name][0].arguments.partition(" ")[0]
    return [*(with_bases(base, found) if base in found else []), *found[name]]


@pytest.fixture(scope="module")
def image() -> dict[str, list[Step]]:
    return stages(DOCKERFILE.read_text(encoding="utf-8"))


def test_both_targets_are_there_and_the_plain_build_is_the_one_for_gpus(image: dict[str, list[Step]]) -> None:
    assert list(image)[-2:] == ["cpu", "gpu"]
    built = re.findall(r"-t REGISTRY/qbrec:(\S+) (.*?)\.(?: |$)", DOCKERFILE.read_text(), re.MULTILINE)
    assert built == [(qbrec.__version__, ""), (f"{qbrec.__version__}-cpu", "--target cpu ")]
    gpu = {step.arguments for step in with_bases("gpu", image)}
    cpu = {step.arguments for step in with_bases("cpu", image)}
    assert any(step.startswith("NVIDIA_VISIBLE_DEVICES") for step in gpu)
    assert not any(step.startswith("NVIDIA_VISIBLE_DEVICES") for step in cpu)
    # The index of CPU builds is asked for that target only.
    asked = [name for name, steps in image.items() if any("whl/cpu" in s.arguments for s in steps)]
    assert asked == ["requirements-cpu"]


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_nobody_is_root_and_every_process_wants_the_token(image: dict[str, list[Step]], target: str) -> None:
    steps = with_bases(target, image)
    # A number: Kubernetes cannot see from a name that it is not root.
    assert [s.arguments for s in steps if s.instruction == "USER"] == ["1000:1000"]
    assert steps[-1] == Step("WORKDIR", "/home/ray")
    environment = " ".join(s.arguments for s in steps if s.instruction == "ENV")
    assert "RAY_AUTH_MODE=token" in environment.split()
    # KubeRay and `ray up` start login shells, whose PATH is the distribution's: only /usr/local is on it.
    copied = [s.arguments for s in steps if s.instruction == "COPY"]
    assert copied == [f"--from=requirements-{target} /install /usr/local"]


def test_everything_that_is_installed_is_pinned(image: dict[str, list[Step]]) -> None:
    (python,) = image[""]
    assert re.fullmatch(r"PYTHON=3\.\d+-slim-[a-z]+", python.arguments)
    minimum = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert python.arguments.startswith("PYTHON=" + minimum.removeprefix(">="))
    for name, steps in image.items():
        if name:
            base = steps[0].arguments.partition(" ")[0]
            assert base == "python:${PYTHON}" or base in image, base
        for step in steps:
            assert step.instruction != "ADD"
            for command in re.split(r"&&", step.arguments) if step.instruction == "RUN" else ():
                if "pip install" in command:
                    # Our own wheel comes with nothing.
                    assert "--constraint constraints.txt" in command or "--no-deps" in command, command
                    assert "--no-cache-dir" in command, command
                if "apt-get install" in command:
                    assert "--no-install-recommends" in command
                    assert "rm -rf /var/lib/apt/lists/*" in step.arguments


def test_a_change_of_code_leaves_the_heavy_layers_alone(image: dict[str, list[Step]]) -> None:
    touched = {
        name
        for name, steps in image.items()
        if any(s.instruction == "COPY" and "qbrec" in s.arguments.split() for s in steps)
    }
    assert touched == {"wheel"}
    for target in ("cpu", "gpu"):
        last = [s for s in with_bases(target, image) if s.instruction in ("RUN", "COPY")][-1]
        assert "from=wheel" in last.arguments


def test_what_is_copied_is_all_that_is_sent_to_the_build(image: dict[str, list[Step]]) -> None:
    copied = {
        source
        for steps in image.values()
        for step in steps
        if step.instruction == "COPY" and "--from" not in step.arguments
        for source in step.arguments.split()[:-1]
    }
    lines = (ROOT / "cluster" / "Dockerfile.dockerignore").read_text().splitlines()
    everything, *kept, caches = (line for line in lines if not line.startswith("#"))
    assert (everything, caches) == ("*", "**/__pycache__")
    assert {line.removeprefix("!") for line in kept} == copied
    assert [source for source in copied if not (ROOT / source).exists()] == []


def test_the_tracking_servers_image_has_the_pinned_mlflow() -> None:
    assert f"mlflow=={pins()['mlflow']} " in (ROOT / "mlflow" / "compose.yaml").read_text()
