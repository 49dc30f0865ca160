"""A file is hashed once per machine, and again whenever anything about it has changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qbrec.errors import DataError
from qbrec.storage import verified
from qbrec.storage.artifact import Artifact, ArtifactStore
from qbrec.storage.machine import host_name

KEY = "d" * 64
SIZE = 2 << 20


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were read to be hashed."""
    names: list[str] = []
    real = verified.sha256_of

    def counting(path: Path) -> str:
        names.append(path.name)
        return real(path)

    monkeypatch.setattr(verified, "sha256_of", counting)
    return names


def commit(root: Path, *, old: bool = True) -> Artifact:
    writer = ArtifactStore(root).writer("demo", KEY)
    writer.prepare()
    for name in ("one.bin", "two.bin"):
        path = writer.write_bytes(name, os.urandom(SIZE))
        if old:
            os.utime(path, (1e9, 1e9))
    writer.write_bytes("small.bin", b"small")
    return writer.commit(meta={}, inputs={}, config={}, seed=0)


def reopened(root: Path) -> Artifact:
    found = ArtifactStore(root).find("demo", KEY)
    assert found is not None
    return found


def test_a_later_process_trusts_the_first(tmp_path: Path, hashed: list[str]) -> None:
    commit(tmp_path)
    assert sorted(hashed) == ["one.bin", "small.bin", "two.bin"]
    hashed.clear()
    reopened(tmp_path).verify()
    assert hashed == ["small.bin"]  # cheaper than a note
    code = (
        "import sys; from qbrec.storage import verified; from qbrec.storage.artifact import ArtifactStore\n"
        "def refuse(path): assert path.name == 'small.bin', path\n"
        "real = verified.sha256_of\n"
        "verified.sha256_of = lambda path: refuse(path) or real(path)\n"
        f"ArtifactStore(sys.argv[1]).find('demo', {KEY!r}).verify()"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def flip(path: Path) -> None:
    """Change one bit in place."""
    with open(path, "r+b") as file:
        file.seek(SIZE // 2)
        byte = file.read(1)
        file.seek(SIZE // 2)
        file.write(bytes([byte[0] ^ 1]))


def flip_and_hide(path: Path) -> None:
    """Change one bit and put the modification time back, as `rsync --times` would."""
    before = path.stat()
    flip(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def flip_in_a_copy(path: Path) -> None:
    """Replace the file by a damaged one of the same size and time."""
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    before = path.stat()
    flip(copy)
    os.utime(copy, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(copy, path)


@pytest.mark.parametrize("damage", [flip, flip_and_hide, flip_in_a_copy])
def test_damage_is_seen(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    artifact = commit(tmp_path)
    reopened(tmp_path).verify()
    damage(artifact.path / "two.bin")
    with pytest.raises(DataError, match="damaged") as caught:
        reopened(tmp_path).verify()
    assert "two.bin" in str(caught.value)


def test_what_was_written_just_now_is_not_noted(tmp_path: Path, hashed: list[str]) -> None:
    # A change within the same tick of the clock would leave no trace.
    commit(tmp_path, old=False)
    hashed.clear()
    reopened(tmp_path).verify()
    assert sorted(hashed) == ["one.bin", "small.bin", "two.bin"]


def test_a_note_holds_for_one_start_of_one_machine(tmp_path: Path, hashed: list[str]) -> None:
    commit(tmp_path)
    (note,) = (tmp_path / "verified").rglob("*.json")
    assert note.parent.name == host_name()
    document = json.loads(note.read_text())
    for text in (json.dumps(document | {"boot": "another"}), "[]", "{", json.dumps(document)[:-3]):
        note.write_text(text)
        hashed.clear()
        reopened(tmp_path).verify()
        assert sorted(hashed) == ["one.bin", "small.bin", "two.bin"]
    hashed.clear()
    reopened(tmp_path).verify()  # written anew
    assert hashed == ["small.bin"]


def test_a_note_is_for_the_hash_of_the_manifest(tmp_path: Path) -> None:
    artifact = commit(tmp_path)
    manifest = artifact.path / "manifest.json"
    document = json.loads(manifest.read_text())
    document["files"]["one.bin"]["sha256"] = document["files"]["two.bin"]["sha256"]
    manifest.write_text(json.dumps(document))
    with pytest.raises(DataError, match="damaged"):
        reopened(tmp_path).verify()


def test_where_no_note_can_be_written_every_process_hashes(tmp_path: Path, hashed: list[str]) -> None:
    (tmp_path / "verified").write_bytes(b"a file in the way")
    commit(tmp_path)
    hashed.clear()
    reopened(tmp_path).verify()
    assert sorted(hashed) == ["one.bin", "small.bin", "two.bin"]


def test_a_folder_outside_the_store_carries_no_notes(tmp_path: Path) -> None:
    artifact = commit(tmp_path)
    copy = tmp_path / "bundle" / "demo"
    copy.parent.mkdir()
    os.rename(artifact.path, copy)
    before = sorted(p for p in tmp_path.rglob("*"))
    ArtifactStore(copy.parent).open(copy).verify()
    assert sorted(p for p in tmp_path.rglob("*")) == before
