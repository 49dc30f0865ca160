"""What every fault test asks of a run directory, without the code that wrote it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from tests.fault.stage import CHECKPOINT_EVERY, STEPS
from tests.support.toy_driver import assert_same_training
from tests.support.toy_stage import losses


def checkpoint_dir(folder: Path) -> Path:
    return folder / "run" / "checkpoints" / "toy"


def whole_checkpoints(folder: Path) -> list[int]:
    """Steps whose manifest and all files it names are there and have the sizes and hashes it says."""
    found = []
    for manifest in checkpoint_dir(folder).glob("step-*/manifest.json"):
        files = json.loads(manifest.read_text())["files"]
        assert files
        for name, expected in files.items():
            data = (manifest.parent / name).read_bytes()
            if (len(data), hashlib.sha256(data).hexdigest()) != (expected["size"], expected["sha256"]):
                break
        else:
            found.append(int(manifest.parent.name.removeprefix("step-")))
    return sorted(found)


def tensors(folder: Path) -> dict[str, str]:
    """Hash of every tensor file of checkpoints and artifact: weights, moments, ID rows and accumulators."""
    places = (checkpoint_dir(folder), folder / "artifacts" / "toy")
    files = sorted(file for place in places for file in place.rglob("*.safetensors"))
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def assert_clean(folder: Path) -> None:
    """No half-written file, no directory without a manifest is left."""
    assert not [path for path in folder.rglob("*") if path.name.endswith((".tmp", ".old", ".part"))]
    left = [path for path in checkpoint_dir(folder).iterdir() if not (path / "manifest.json").is_file()]
    assert not left, left


def assert_equal_end(folder: Path, reference: Path) -> None:
    """The same loss at every step, the same checkpoints and the same result, bit for bit."""
    assert_same_training(folder, reference, exact=True)
    assert tensors(folder) == tensors(reference)
    assert_clean(folder)


def repeated_steps(folder: Path, *, at_most: int = CHECKPOINT_EVERY) -> int:
    """Steps that were taken more than once; normally no more than lie between two checkpoints."""
    taken = [line["step"] for line in losses(folder)]
    assert set(taken) == set(range(1, STEPS + 1))
    repeated = len(taken) - STEPS
    assert 0 <= repeated <= at_most
    return repeated
