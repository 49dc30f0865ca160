"""The bytes of a catalogue do not depend on how many Ray workers made it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from qbrec.catalog.synth import generate

SCRIPT = """
import logging, sys, tempfile, shutil
import ray
from pathlib import Path
from qbrec.catalog import build_histories, build_items
from qbrec.catalog.stage import run
from qbrec.config import parse_config
from qbrec.engine.context import StageContext
from qbrec.storage.artifact import ArtifactStore

cpus, shop, out = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
build_items.ITEM_UNIT_ROWS = 100
build_histories.INTERACTION_UNIT_ROWS = 700
build_histories.MAX_INTERACTIONS_PER_PARTITION = 500
sessions = tempfile.mkdtemp(prefix="qw", dir="/tmp")
ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False,
         logging_level=logging.ERROR, _temp_dir=sessions)
domains = {"shop": {role: str(shop / f"{role}.parquet") for role in ("items", "interactions")}}
catalog = {"text": {"dim": 16}, "shard_bytes": 50_000, "block_bytes": 8_000}
config = parse_config({"data": {"domains": domains}, "catalog": catalog})
run(StageContext.local(ArtifactStore(out), out / "run", stage="catalog"), config, {})
ray.shutdown()
shutil.rmtree(sessions, ignore_errors=True)
"""


@pytest.mark.slow
def test_one_worker_and_four_write_the_same_bytes(tmp_path: Path) -> None:
    shop = generate(tmp_path / "shop", num_items=300, num_users=200, seed=5, chunk=100)
    found = []
    for cpus in (1, 4):
        out = tmp_path / str(cpus)
        command = [sys.executable, "-c", SCRIPT, str(cpus), str(shop.items.parent), str(out)]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        (folder,) = (out / "artifacts" / "catalog").iterdir()
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*")}
        files.pop("manifest.json")  # tells when it was written
        found.append(files)
    one, four = found
    assert sum(name.endswith(".tar") for name in one) > 4
    assert sorted(one) == sorted(four)
    assert [name for name in one if one[name] != four[name]] == []
