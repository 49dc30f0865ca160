"""Checkpoints on their way to the run's remote home and back: a machine and its disk may vanish together.

    <remote>/checkpoints/<run>/<stage>/<key16>/step-N/{<fingerprint16>/files…, manifest.json}

A thread of rank 0 uploads while training goes on. Only the newest stays there: the remote copy is for
starting again elsewhere; retention with a choice is local.
"""

from __future__ import annotations

import re
import sys
import threading
from pathlib import Path

from qbrec.errors import QbrecError
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
        self._wanted: Path | None = None
        self.uploading: Path | None = None  # must not be deleted now
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

    def submit(self, path: Path) -> None:
        """Upload a finished checkpoint soon; one that still waits gives way to it."""
        with self._changed:
            self._wanted = path
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="checkpoint-upload", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Wait for the last upload."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._wanted is not None or self._closing)
                self.uploading = path = self._wanted
                self._wanted = None
            if path is None:
                return
            try:
                self._upload(path)
                self._error = ""
            except (QbrecError, OSError) as error:
                if str(error) != self._error:
                    print(
                        f"warning: a checkpoint was not copied to the remote home\n{error}", file=sys.stderr
                    )
                self._error = str(error)

    def _upload(self, path: Path) -> None:
        artifact = ArtifactStore(path.parent).open(path)
        RemoteFolder(f"{self.uri}/{path.name}").publish(artifact.manifest, artifact.file)
        newest = int(path.name.removeprefix("step-"))
        for step in self.steps():
            if step < newest:
                delete_below(f"{self.uri}/step-{step}")
