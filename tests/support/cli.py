"""Run the real `qbrec` in a process of its own, on a catalogue small enough for a test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
STAGES = (
    "catalog",
    "fusion",
    "quantizer",
    "neighbours",
    "pretrain",
    "finetune",
    "sasrec",
    "evaluation",
)


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a user who has just opened a terminal: no cluster, no launcher."""
    lost = ("RAY_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "MLFLOW_TRACKING_URI")
    env = {name: value for name, value in os.environ.items() if not name.startswith(lost)}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    env |= {"PYTHONUNBUFFERED": "1", "RAY_USAGE_STATS_ENABLED": "0", "MLFLOW_DISABLE_TELEMETRY": "true"}
    return env | dict(extra or {})


def qbrec(*args: str | Path, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """`python -m qbrec ARGS` from the root of the repository; its exit code is not checked."""
    command = [sys.executable, "-m", "qbrec", *map(str, args)]
    return subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout
    )


def must(done: subprocess.CompletedProcess[str]) -> str:
    """Standard output of a command that has to succeed."""
    assert done.returncode == 0, f"{done.args} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def small_config(data: Path, storage: Path, *, name: str = "tiny") -> dict[str, Any]:
    """A configuration whose every stage takes seconds, with several checkpoints in each training stage.

    BERT4Rec is left out: the same stage trains it as SASRec.
    """
    return {
        "run": {"name": name, "storage": str(storage)},
        "data": {
            "domains": {
                "shop": {
                    "items": str(data / "items.parquet"),
                    "interactions": str(data / "interactions.parquet"),
                }
            }
        },
        # One thread each: sums are then cut the same way wherever the workers are.
        "compute": {"launcher": "ray", "num_workers": 2, "threads_per_worker": 1, "device": "cpu"},
        "fusion": {
            "width": 32,
            "depth": 2,
            "heads": 2,
            "group": 64,
            "train": {"epochs": 4, "batch_size": 128, "micro_batch": 64, "checkpoint_every": 2},
        },
        "quantizer": {"levels": [16, 16, 16]},
        "sequence": {
            "width": 32,
            "layers": 1,
            "heads": 2,
            "max_items": 10,
            "pretrain": {"epochs": 4, "batch_size": 128, "micro_batch": 64, "checkpoint_every": 3},
            "finetune": {"epochs": 4, "batch_size": 128, "micro_batch": 64, "checkpoint_every": 3},
        },
        "baselines": {
            name: {
                "width": 16,
                "layers": 1,
                "max_items": 10,
                "train": {"epochs": 4, "batch_size": 128, "micro_batch": 64, "checkpoint_every": 3},
            }
            for name in ("sasrec", "bert4rec")
        },
        "evaluation": {"bootstrap": 200, "baselines": ["popularity", "itemknn", "sasrec"]},
    }


@dataclass
class Road:
    """A run on disk and the files it was made from."""

    config: Path
    tree: dict[str, Any]
    outputs: list[subprocess.CompletedProcess[str]] = field(default_factory=list)

    @classmethod
    def write(cls, folder: Path, tree: dict[str, Any]) -> Road:
        """Write a configuration file."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{tree['run']['name']}.yaml"
        path.write_text(yaml.safe_dump(tree, sort_keys=False))
        return cls(path, tree)

    @property
    def storage(self) -> Path:
        """Root of artifacts, runs and MLflow's database."""
        return Path(self.tree["run"]["storage"])

    @property
    def run_dir(self) -> Path:
        """The run's own folder."""
        return self.storage / "runs" / self.tree["run"]["name"]

    def run(self, *args: str) -> subprocess.CompletedProcess[str]:
        """`qbrec run` with this configuration."""
        self.outputs.append(qbrec("run", "--config", self.config, *args))
        return self.outputs[-1]

    def stages(self) -> dict[str, Any]:
        """Stage → key, path, seconds, as run.json has them."""
        return dict(json.loads((self.run_dir / "run.json").read_text())["stages"])

    def artifact(self, stage: str) -> Path:
        """Folder of a finished stage."""
        return Path(self.stages()[stage]["path"])

    def metrics(self) -> dict[str, Any]:
        """The evaluation, as written."""
        return dict(json.loads((self.artifact("evaluation") / "metrics.json").read_text()))
