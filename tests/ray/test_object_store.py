"""The catalogue from an object store, and a pipeline whose artifacts have a remote home."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from qbrec.catalog import stage as catalog_stage
from qbrec.catalog.synth import SyntheticSummary, generate
from qbrec.config import RootConfig, parse_config
from qbrec.config.stages import QualityConfig, QuantizerConfig
from qbrec.engine.context import StageContext
from qbrec.errors import DataError, GateError
from qbrec.pipeline import Pipeline, finished_artifacts
from qbrec.storage.artifact import Artifact, ArtifactStore
from qbrec.storage.filesystem import filesystem
from tests.support.s3_server import FaultProxy

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> SyntheticSummary:
    return generate(tmp_path_factory.mktemp("shop"), num_items=150, num_users=120, seed=3, images=False)


def put(shop: SyntheticSummary, place: str) -> None:
    """Copy the shop's files, the interactions in two."""
    store, base = filesystem(place)
    store.create_dir(f"{base}/interactions")
    interactions = pq.read_table(shop.interactions)
    half = len(interactions) // 2
    for name, table in [
        ("items.parquet", pq.read_table(shop.items)),
        ("interactions/0.parquet", interactions.slice(0, half)),
        ("interactions/1.parquet", interactions.slice(half)),
    ]:
        with store.open_output_stream(f"{base}/{name}") as out:
            pq.write_table(table, out)


def configure(place: str, **run: Any) -> RootConfig:
    return parse_config(
        {
            "run": run,
            "data": {
                "domains": {
                    "shop": {"items": f"{place}/items.parquet", "interactions": f"{place}/interactions"}
                }
            },
            "catalog": {"text": {"dim": 32}},
            "compute": {"launcher": "inprocess", "device": "cpu", "threads_per_worker": 1},
            "tracking": {"enabled": False},
            "fusion": {
                "width": 16,
                "depth": 1,
                "heads": 2,
                "group": 32,
                "train": {"epochs": 1, "batch_size": 64, "micro_batch": 32},
            },
        }
    )


def build(config: RootConfig, storage: Path) -> Artifact:
    context = StageContext.local(ArtifactStore(storage), storage / "run", stage="catalog")
    return catalog_stage.run(context, config, {})


def test_a_catalogue_from_s3_is_the_one_from_files(
    shop: SyntheticSummary, s3: FaultProxy, tmp_path: Path
) -> None:
    place = s3.bucket() + "/in put"
    put(shop, place)
    put(shop, str(tmp_path / "files"))
    cut = s3.fault("drop", "items.parquet$")
    busy = s3.fault("status", r"interactions/1.parquet$", code=503)
    far = build(configure(place), tmp_path / "far")
    assert (cut.fired, busy.fired) == (1, 1)
    assert far.fingerprint == build(configure(str(tmp_path / "files")), tmp_path / "near").fingerprint


def test_another_machine_reuses_what_the_remote_home_has(
    shop: SyntheticSummary, s3: FaultProxy, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bucket = s3.bucket()
    put(shop, f"{bucket}/in")
    remote = f"{bucket}/home"
    first = configure(f"{bucket}/in", storage=str(tmp_path / "first"), remote=remote)
    with Pipeline(first) as pipeline:
        built = pipeline.up_to("fusion")
    second = configure(f"{bucket}/in", storage=str(tmp_path / "second"), remote=remote)
    s3.requests.clear()
    capfd.readouterr()
    with Pipeline(second) as pipeline:
        found = pipeline.up_to("fusion")
    assert capfd.readouterr().err.count("up to date") == 2
    assert found.fingerprint == built.fingerprint
    assert not (tmp_path / "second/artifacts").exists()
    assert {p.split("/")[-1] for p in s3.fetched() if "/home/" in p} == {"qbrec.json", "manifest.json"}
    # The next stage reads both from the cache, and fetches no more than it touches.
    with Pipeline(second) as pipeline:
        quantizer = pipeline.up_to("quantizer")
    cached = {p.name for p in (tmp_path / "second/cache/catalog").rglob("*") if p.is_file()}
    assert "items.arrow" in cached
    assert not any(name.startswith("histories-") for name in cached)
    assert set(finished_artifacts(second)) == {"catalog", "fusion", "quantizer"}
    # And what the second machine built is there for the first.
    s3.requests.clear()
    with Pipeline(first) as pipeline:
        assert pipeline.up_to("quantizer").fingerprint == quantizer.fingerprint
    assert not [path for method, path in s3.requests if method in ("PUT", "POST")]


def test_a_gate_stops_the_road_and_another_threshold_costs_nothing(
    shop: SyntheticSummary, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    put(shop, str(tmp_path / "in"))
    config = configure(str(tmp_path / "in"), storage=str(tmp_path / "storage"))
    strict = config.model_copy(
        update={"quantizer": QuantizerConfig(quality=QualityConfig(min_perplexity=1e6))}
    )
    for _ in range(2):  # what was made is as bad the second time
        with pytest.raises(GateError, match="min_perplexity"), Pipeline(strict) as pipeline:
            pipeline.up_to("pretrain")
        assert "pretrain" not in pipeline.artifacts
    renamed = config.model_copy(update={"run": config.run.model_copy(update={"name": "again"})})
    capfd.readouterr()
    with Pipeline(renamed) as pipeline:
        pipeline.up_to("quantizer")
    assert capfd.readouterr().err.count("up to date") == 3


def test_an_upload_that_failed_is_made_up_for(shop: SyntheticSummary, s3: FaultProxy, tmp_path: Path) -> None:
    bucket = s3.bucket()
    put(shop, f"{bucket}/in")
    config = configure(f"{bucket}/in", storage=str(tmp_path / "storage"), remote=f"{bucket}/home")
    refused = s3.fault("status", r"items\.arrow", method="PUT", code=403)
    with pytest.raises(DataError, match="access is denied"), Pipeline(config) as pipeline:
        pipeline.up_to("catalog")
    assert refused.fired == 1
    with Pipeline(config) as pipeline:
        pipeline.up_to("catalog")
    with Pipeline(
        configure(f"{bucket}/in", storage=str(tmp_path / "second"), remote=f"{bucket}/home")
    ) as other:
        assert other.up_to("catalog").path.is_relative_to(tmp_path / "second/cache")


def test_input_that_changes_while_the_catalogue_is_built(
    shop: SyntheticSummary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "in"
    put(shop, str(place))
    config = configure(str(place), storage=str(tmp_path / "storage"))
    real = catalog_stage.run

    def meanwhile(*arguments: Any) -> Artifact:
        os.utime(place / "items.parquet", (1, 1))
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(catalog_stage, "run", meanwhile)
        with pytest.raises(DataError, match="changed while the catalogue was built"), Pipeline(config) as run:
            run.up_to("catalog")
    assert not list((tmp_path / "storage/artifacts").rglob("manifest.json"))
    with Pipeline(config) as run:
        run.up_to("catalog").verify()
