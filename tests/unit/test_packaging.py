"""Files that must agree with each other: pins, package metadata, configurations, ignore files."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import qbrec
from qbrec.config import load_config
from tests.support.pins import pins

ROOT = Path(__file__).resolve().parents[2]
# Import name -> distribution, where they differ.
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml"}


@cache
def project() -> dict[str, object]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def requirements(extra: str | None = None) -> list[Requirement]:
    table = project()["project"]
    lines = table["optional-dependencies"][extra] if extra else table["dependencies"]
    return [Requirement(line) for line in lines]


def name_of(requirement: Requirement) -> str:
    return requirement.name.lower().replace("_", "-")


@pytest.mark.parametrize("extra", [None, "dev", "encode"])
def test_every_requirement_is_pinned_within_its_bounds(extra: str | None) -> None:
    for requirement in requirements(extra):
        assert requirement.specifier.contains(pins()[name_of(requirement)]), requirement


def test_constraints_are_exact_versions_that_every_index_knows() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line)] == []
    assert lines == sorted(lines, key=str.lower)
    known = {
        "torch": "2.13.0",
        "deepspeed": "0.19.8",
        "ray": "2.60.0",
        "webdataset": "1.0.2",
        "mlflow": "3.17.2",
    }
    assert {name: pins()[name] for name in known} == known


def test_what_the_requirements_require_is_pinned_too() -> None:
    seen: set[tuple[str, str]] = set()
    todo = [*requirements(), *requirements("dev")]
    while todo:
        requirement = todo.pop()
        for extra in ("", *requirement.extras):
            if (name_of(requirement), extra) in seen:
                continue
            seen.add((name_of(requirement), extra))
            needs = map(Requirement, metadata.requires(requirement.name) or ())
            todo += [need for need in needs if need.marker is None or need.marker.evaluate({"extra": extra})]
    # A CUDA build of torch pins NVIDIA's packages itself.
    ours = {name for name, _ in seen if not name.startswith(("cuda-", "nvidia-", "triton"))}
    assert ours - set(pins()) == set()


def imported_by(folder: Path) -> set[str]:
    names: set[str] = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                names.add(node.module.partition(".")[0])
    return {
        DISTRIBUTIONS.get(name, name.replace("_", "-")) for name in names - set(sys.stdlib_module_names)
    } - {"qbrec"}


def test_what_is_imported_is_declared_and_what_is_declared_is_imported() -> None:
    declared = {name_of(r) for r in requirements()}
    imported = imported_by(ROOT / "qbrec") | imported_by(ROOT / "mlflow")
    with_torch = {"triton"}  # a part of its CUDA builds
    assert imported - declared - with_torch - {name_of(r) for r in requirements("encode")} == set()
    assert declared - imported == set()


def test_the_console_script_exists() -> None:
    module, _, attribute = project()["project"]["scripts"]["qbrec"].partition(":")
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    assert attribute in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_wheel_holds_every_source_file_and_the_serving_script(tmp_path: Path) -> None:
    builder = pytest.importorskip(
        "hatchling.builders.wheel", reason="hatchling is only there while pip builds"
    )
    wheel = next(iter(builder.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])))
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"qbrec/_mlflow/serving_model.py", "qbrec/_launch/runtime_env.yaml"} <= names
    gates = {f"qbrec/_mlflow/gates/{path.name}" for path in (ROOT / "mlflow" / "gates").iterdir()}
    assert gates <= names
    assert "qbrec/_mlflow/gates/default.yaml" in gates
    sources = [
        path for path in (ROOT / "qbrec").rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    assert {str(path.relative_to(ROOT)) for path in sources} <= names
    assert {name.split("/")[0] for name in names} == {"qbrec", f"qbrec-{qbrec.__version__}.dist-info"}


def test_our_mlflow_folder_does_not_shadow_mlflow() -> None:
    assert not list((ROOT / "mlflow").rglob("__init__.py"))
    # `python -c` puts the working directory first on the path, as `python -m qbrec` does.
    code = "import importlib.util; print(importlib.util.find_spec('mlflow').origin)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    origin = Path(found.stdout.strip())
    assert origin.name == "__init__.py"
    assert origin.parent != ROOT / "mlflow"


def test_the_version_is_in_the_changelog() -> None:
    assert f"\n## {qbrec.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_pre_commit_runs_the_pinned_ruff() -> None:
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (rev,) = [repo["rev"] for repo in repos if repo["repo"].endswith("ruff-pre-commit")]
    assert rev == f"v{pins()['ruff']}"


@pytest.mark.parametrize(
    "path", ["launch/quickstart.yaml", "launch/jobs/local.yaml", "launch/jobs/cluster.yaml"]
)
def test_the_shipped_configurations_are_valid(path: str) -> None:
    config = load_config(ROOT / path)
    assert config.data.domains
    # A job runs in a copy of the code: a relative path would point into it.
    if path.startswith("launch/jobs/"):
        places = [
            config.run.storage,
            *(p for d in config.data.domains.values() for p in (d.items, d.interactions)),
        ]
        assert all(Path(place).is_absolute() for place in places)


def test_the_uploaded_working_directory_is_code_only(tmp_path: Path) -> None:
    from ray._private.runtime_env.packaging import create_package

    tree, package = tmp_path / "tree", tmp_path / "package.zip"
    code = [
        "qbrec/cli/main.py",
        "qbrec/config/presets/small.yaml",
        "mlflow/serving_model.py",
        "launch/jobs/cluster.yaml",
    ]
    weight = [
        ".venv/bin/python",
        ".git/config",
        ".mypy_cache/x",
        "qbrec-storage/runs/a/run.json",
        "quickstart/data/x.txt",
        "tests/unit/test_x.py",
        "items.parquet",
        "deep/down/fused-000000.tar",
        "qbrec/__pycache__/a.pyc",
    ]
    for name in code + weight:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("x")
    for name in (".gitignore", ".rayignore"):
        (tree / name).write_text((ROOT / name).read_text())
    create_package(str(tree), package, include_gitignore=True)
    names = {name for name in zipfile.ZipFile(package).namelist() if not name.endswith("/")}
    assert {name for name in names if not Path(name).name.startswith(".")} == set(code)


def test_the_runtime_env_sets_strings_only() -> None:
    env = yaml.safe_load((ROOT / "launch" / "runtime_env.yaml").read_text())
    assert set(env) == {"env_vars"}
    assert all(isinstance(value, str) for value in env["env_vars"].values())


@pytest.mark.parametrize(
    "script", sorted([*ROOT.glob("launch/*.sh"), *ROOT.glob("cluster/*.sh"), ROOT / ".ci/run"])
)
def test_shell_scripts_parse(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


def install(venv: Path, **env: str) -> subprocess.CompletedProcess[str]:
    script = f"source {ROOT}/launch/install.sh; install_qbrec"
    env = {**os.environ, "QBREC_VENV": str(venv), **env}
    return subprocess.run(["bash", "-euo", "pipefail", "-c", script], env=env, capture_output=True, text=True)


def test_an_old_python_is_refused_with_a_way_out(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = install(tmp_path / "venv", PYTHON=str(old))
    assert done.returncode != 0
    assert "no Python 3.11 or newer found" in done.stderr
    assert "fix: " in done.stderr
    assert not (tmp_path / "venv").exists()


def test_a_folder_that_is_no_environment_of_ours_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    done = install(tmp_path)
    assert done.returncode != 0
    assert "is no working virtual environment" in done.stderr
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_supported_python_is_what_the_scripts_ask_for() -> None:
    assert "3.11.0" in SpecifierSet(project()["project"]["requires-python"])
    assert "3.10.9" not in SpecifierSet(project()["project"]["requires-python"])
    assert "(3, 11)" in (ROOT / "launch" / "install.sh").read_text()


def test_the_readme_names_functions_and_folders_that_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    steps = text.partition("## Paper step")[2]
    path = None
    for file, name in re.findall(r"`([a-z_/]+\.py)?::(\w+)`", steps):
        path = ROOT / file if file else path
        assert path is not None
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert name in {getattr(node, "name", None) for node in tree.body}, f"{path}::{name}"
    folders = re.findall(r"^\| `([a-z/]+)/` \|", text, flags=re.MULTILINE)
    assert [folder for folder in folders if not (ROOT / folder).is_dir()] == []
    assert {f"qbrec/{p.name}" for p in (ROOT / "qbrec").iterdir() if (p / "__init__.py").exists()} <= set(
        folders
    )
    for name in re.findall(r"`?(?:launch|cluster|mlflow)/[\w./]+", text):
        assert (ROOT / name.strip("`").rstrip(".")).exists(), name


def test_the_cluster_guide_lists_the_files_that_are_there() -> None:
    folder = ROOT / "cluster"
    text = (folder / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`[^|]+) \|", text.partition("Everywhere")[0], flags=re.MULTILINE)
    # The second name of a row stands in the folder of the first.
    listed = {name.rpartition("/")[2] for row in rows for name in re.findall(r"`(.+?)`", row)}
    there = {path.name for path in folder.rglob("*") if path.is_file()}
    assert listed | {"README.md", "Dockerfile.dockerignore"} == there
    for name in re.findall(r"(?:launch|cluster)/[\w./-]+", text):
        assert (ROOT / name.rstrip(".")).exists(), name
