"""The shop of `grown_shop` with three generations, and runs that note generations in their run.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qbrec.append_run import bring_to_models
from qbrec.run_record import RunRecord, run_directory
from qbrec.storage.artifact import Artifact, ArtifactStore
from qbrec.storage.generations import GenerationsView
from qbrec.storage.id_table import numbered
from tests.support.grown_shop import Item, append, configuration, draw, learn

OLD = draw(400, "i", seed=0) + draw(100, "b", seed=1, domain="books")
GENERATION_PARTS = {f"{kind}-{n}" for kind in ("generation", "ids") for n in (1, 2, 3)}


def grow(root: Path, trained: Mapping[str, Artifact]) -> dict[str, Artifact]:
    """Three generations: all kinds of changes; a new domain; one that only retires."""
    view = GenerationsView(trained["catalog"])
    twins = [replace(OLD[n], name=f"twin{n}") for n in (10, 20)]
    bare = [Item("bare1", None, bucket=9), Item("bare2", None, bucket=9)]
    moved = [replace(draw(1, "x", seed=40)[0], name="i7")]
    view = append(root, view, draw(60, "n", seed=7) + twins + bare + moved, retire=["i1", "i2"])
    again = [replace(draw(1, "x", seed=41)[0], name="n3")]
    later = draw(30, "g", seed=8, domain="garden") + draw(30, "m", seed=9) + again
    view = append(root, view, later, retire=["n5"], restore=["i2"])
    view = append(root, view, retire=["i9"])
    return learn(root, view, trained, configuration(root))


def view_of(artifacts: Mapping[str, Artifact]) -> GenerationsView:
    return GenerationsView(artifacts["catalog"], numbered(artifacts, "generation"))


def digests(path: Path) -> dict[str, str]:
    files = [p for p in path.rglob("*") if p.is_file()]
    return {str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def evaluation(root: Path) -> Artifact:
    store, key = ArtifactStore(root), "e" * 64
    found = store.find("evaluation", key)
    if found is not None:
        return found
    writer = store.writer("evaluation", key)
    writer.prepare()
    cells = {"ndcg@10": {"mean": 0.1, "low": 0.0, "high": 0.2}}
    writer.save_json("metrics.json", {"models": {"qbrec": {"removed": cells}}})
    return writer.commit(meta={}, inputs={}, config={}, seed=0)


class Noted:
    """A run whose run.json names a catalogue, models and generations."""

    def __init__(self, folder: Path, artifacts: Mapping[str, Artifact]) -> None:
        self.config = configuration(folder)
        self.store = ArtifactStore(folder)
        self.said: list[str] = []
        self.warned: list[str] = []
        record = RunRecord.own(self.config, resume="auto")
        stages = {name: a for name, a in artifacts.items() if "-" not in name}
        record.stages = {name: {"key": a.key, "path": str(a.path)} for name, a in stages.items()}
        generations = numbered(artifacts, "generation")
        record.extra["generations"] = [{"key": a.key, "path": str(a.path)} for a in generations]
        record.save()
        record.close()

    def bring(self, max_drift: float = 1.5) -> tuple[list[Artifact], str]:
        record = RunRecord.own(self.config, resume="must")
        try:
            return bring_to_models(
                self.config, record, self.store,
                max_drift=max_drift, say=self.said.append, warn=self.warned.append,
            )  # fmt: skip
        finally:
            record.close()

    def edit(self, change: Any) -> None:
        path = run_directory(self.config) / "run.json"
        document = json.loads(path.read_text())
        change(document)
        path.write_text(json.dumps(document))

    def noted(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = RunRecord.load(run_directory(self.config)).extra["generations"]
        return found
