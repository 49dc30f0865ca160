"""Artifacts: they exist once committed, and what is damaged is refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from qbrec.errors import DataError
from qbrec.storage.artifact import Artifact, ArtifactStore, artifact_key

KEY = artifact_key("demo", config={"a": 1}, seed=0, inputs={"x": "y"})


def _commit(root: Path) -> Artifact:
    writer = ArtifactStore(root).writer("demo", KEY)
    writer.prepare()
    writer.save_npy("array.npy", np.arange(10))
    writer.save_json("facts.json", {"n": 10})
    writer.save_safetensors("weights.safetensors", {"w": torch.ones(3)})
    return writer.commit(meta={"n": 10}, inputs={"x": "y"}, config={"a": 1}, seed=0)


def test_round_trip(tmp_path: Path) -> None:
    _commit(tmp_path)
    artifact = ArtifactStore(tmp_path).find("demo", KEY)
    assert artifact is not None
    assert artifact.load_npy("array.npy").tolist() == list(range(10))
    assert artifact.load_json("facts.json") == {"n": 10}
    assert artifact.load_safetensors("weights.safetensors")["w"].tolist() == [1, 1, 1]
    assert (artifact.meta, artifact.inputs, artifact.kind, artifact.key) == (
        {"n": 10},
        {"x": "y"},
        "demo",
        KEY,
    )


def test_same_content_same_fingerprint(tmp_path: Path) -> None:
    assert _commit(tmp_path / "a").fingerprint == _commit(tmp_path / "b").fingerprint


def test_the_key_depends_on_everything() -> None:
    base = {"config": {"a": 1}, "seed": 0, "inputs": {"x": "y"}}
    keys = {
        artifact_key("demo", **base),
        artifact_key("other", **base),
        artifact_key("demo", **{**base, "config": {"a": 2}}),
        artifact_key("demo", **{**base, "seed": 1}),
        artifact_key("demo", **{**base, "inputs": {"x": "z"}}),
    }
    assert len(keys) == 5


def test_without_a_manifest_nothing_is_there(tmp_path: Path) -> None:
    writer = ArtifactStore(tmp_path).writer("demo", KEY)
    writer.prepare()
    writer.save_npy("array.npy", np.arange(10))
    assert ArtifactStore(tmp_path).find("demo", KEY) is None
    with pytest.raises(DataError, match="no finished artifact"):
        ArtifactStore(tmp_path).open(writer.path)
    writer.prepare()  # the next attempt begins with an empty directory
    assert list(writer.path.iterdir()) == []


@pytest.mark.parametrize("name", ["array.npy", "facts.json", "weights.safetensors"])
def test_a_flipped_byte_is_found_and_named(tmp_path: Path, name: str) -> None:
    path = _commit(tmp_path).path / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="damaged") as caught:
        ArtifactStore(tmp_path).open(path.parent).verify()
    assert str(path) in str(caught.value)
    assert caught.value.exit_code == 3


def test_missing_and_shortened_files_are_named(tmp_path: Path) -> None:
    artifact = _commit(tmp_path)
    (artifact.path / "array.npy").write_bytes(b"short")
    (artifact.path / "facts.json").unlink()
    fresh = ArtifactStore(tmp_path).open(artifact.path)
    with pytest.raises(DataError, match="5 bytes instead of"):
        fresh.file("array.npy")
    with pytest.raises(DataError, match="missing"):
        fresh.file("facts.json")
    with pytest.raises(DataError, match="no file 'other'"):
        fresh.file("other")


def test_another_format_version_is_refused(tmp_path: Path) -> None:
    artifact = _commit(tmp_path)
    manifest = artifact.path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 99'))
    with pytest.raises(DataError, match="format 99"):
        ArtifactStore(tmp_path).find("demo", KEY)
