"""Checkpoints on their way to the run's remote home and back: a machine and its disk may vanish together.

    <remote>/checkpoints/<run>/<stage>/<key16>/step-N/{<fingerprint16>/files…, manifest.json}

A thread of rank 0 uploads while training goes on. Only the newest and the best stay there, until the stage is
finished: they are for going on elsewhere. A run is known there by its name alone, so that a new machine finds
it: two runs of one name must not share a home.
"""

from __future__ import annotations

import re
import sys
import threading
from pathlib import Path

from qbrec.storage.artifact import MANIFEST, ArtifactStore
from qbrec.storage.atomic import write_atomic
from qbrec.storage.remote import RemoteFolder, manifest_bytes
from qbrec.storage.transfer import delete_below, sizes_below

_STEP = re.compile(r"^(step-(\d+))/manifest\.json$")


class RemoteCheckpoints:
    """The remote copies of one stage's checkpoints; used by rank 0 alone.

    A remote home that cannot be reached costs no step: the error is shown once, and the next checkpoint tries
    again.

    Args:
        uri: The remote home, `run.remote`.
        run: Name of the run.
        stage: Name of the stage.
        key: Key of its artifact: checkpoints of another configuration are never taken.
    """

    def __init__(self, uri: str, *, run: str, stage: str, key: str) -> None:
        self.uri, self._key = f"{uri.rstrip('/')}/checkpoints/{run}/{stage}/{key[:16]}", key
        self._wanted: tuple[Path, ...] = ()
        self.uploading: tuple[Path, ...] = ()  # must not be deleted now
        self._closing, self._changed = False, threading.Condition()
        self._thread: threading.Thread | None = None
        self._error = ""

    def steps(self) -> list[int]:
        """Steps of the copies that are whole, ascending.

        Raises:
            DataError: The remote home cannot be read.
        """
        found = (_STEP.match(name) for name in sizes_below(self.uri))
        return sorted(int(match[2]) for match in found if match)

    def fetch(self, step: int, target: Path) -> None:
        """Bring one copy here, its manifest last.

        Args:
            step: One of `steps()`.
            target: Its folder, which must not exist.

        Raises:
            DataError: It is damaged or cannot be read.
        """
        folder = RemoteFolder(f"{self.uri}/step-{step}")
        manifest = folder.manifest()
        assert manifest is not None, "a step that is listed has a manifest"
        files = folder.files(manifest)
        for name, expected in manifest["files"].items():
            files.fetch(name, target / name, expected, mtime=0)
        write_atomic(target / MANIFEST, manifest_bytes(manifest))

    def submit(self, newest: Path, best: Path) -> None:
        """Upload two finished checkpoints soon (they may be one); what still waits gives way to them."""
        with self._changed:
            self._wanted = (best, newest) if best != newest else (newest,)
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="checkpoint-upload", daemon=True)
                self._thread.start()

    def close(self, *, wait: bool = True) -> None:
        """End the thread, after the last upload if `wait`, else with what it has begun."""
        with self._changed:
            self._closing = True
            if not wait:
                self._wanted = ()
            self._changed.notify_all()
        if wait and self._thread is not None:
            self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._wanted) or self._closing)
                self.uploading, self._wanted = self._wanted, ()
            if not self.uploading:
                return
            try:
                self._upload(self.uploading)
                self._error = ""
            except Exception as error:  # whatever it is, training goes on and the next checkpoint tries again
                if str(error) != self._error:
                    print(f"warning: no copy of a checkpoint in the remote home\n{error}", file=sys.stderr)
                self._error = str(error)
            self.uploading = ()

    def _upload(self, paths: tuple[Path, ...]) -> None:
        there = self.steps()
        for path in paths:
            if int(path.name.removeprefix("step-")) not in there:
                artifact = ArtifactStore(path.parent).open(path)
                RemoteFolder(f"{self.uri}/{path.name}").publish(artifact.manifest, artifact.file)
        kept = {path.name for path in paths}
        for name in {name.partition("/")[0] for name in sizes_below(self.uri)} - kept:
            delete_below(f"{self.uri}/{name}")


def has_copies(uri: str, *, run: str) -> bool:
    """Whether a remote home has checkpoints of a run of this name.

    Raises:
        DataError: It cannot be read.
    """
    return bool(sizes_below(f"{uri.rstrip('/')}/checkpoints/{run}"))


def forget_copies(uri: str, *, run: str, stage: str) -> None:
    """Remove the copies of a stage that is finished: its artifact has taken their place.

    Raises:
        DataError: They cannot be removed.
    """
    delete_below(f"{uri.rstrip('/')}/checkpoints/{run}/{stage}")
