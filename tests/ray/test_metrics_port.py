"""A training's numbers on the port that Prometheus scrapes, beside Ray's own."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from qbrec.config import parse_config
from qbrec.config.stages import TrainConfig
from qbrec.engine.context import StageContext
from qbrec.engine.launch import process_group
from qbrec.engine.ray_metrics import PREFIX, RayGauges
from qbrec.engine.train import train
from qbrec.storage.artifact import ArtifactStore
from qbrec.tracking.export import GAUGES, Exporter
from tests.support.scrape import scrape
from tests.support.training import ToyLoader, ToyTask

SCHEDULE = TrainConfig(epochs=8, batch_size=8, micro_batch=2, learning_rate=0.01)


@pytest.mark.slow  # Ray refreshes its port every 10 s
@pytest.mark.usefixtures("ray_session")
def test_a_training_is_seen_on_the_port_of_its_node(tmp_path: Path) -> None:
    import ray

    (port,) = {node["MetricsExportPort"] for node in ray.nodes()}
    run_dir = tmp_path / "run"
    ctx = StageContext.local(ArtifactStore(tmp_path), run_dir, stage="toy", key="k" * 64)
    with Exporter(run_dir, run="seen", publish=RayGauges(GAUGES), poll_s=0.5):
        with process_group(parse_config({})):
            evaluate = {"m@1": 0.25}
            result = train(
                ctx, ToyTask(), ToyLoader(0, 1), config=SCHEDULE, label="toy", evaluate=lambda _: evaluate
            )
        assert result.steps == 40
        deadline, every = time.monotonic() + 60, {PREFIX + name for name in GAUGES}
        # Every gauge there is, so that a name in the dashboard is one that is served.
        values: dict[tuple[str, str | None], float] = {}
        while {name for name, _ in values} != every or values[f"{PREFIX}qbrec_step", None] < 40:
            assert time.monotonic() < deadline, f"the port shows only {values}"
            time.sleep(0.5)
            found = scrape(port, run="seen")
            values = {(name, labels.get("metric")): value for name, labels, value in found}
    assert values[f"{PREFIX}qbrec_metric", "m@1"] == 0.25
    assert values[f"{PREFIX}qbrec_loss", None] == pytest.approx(sum(result.losses[-20:]) / 20)
    assert {labels["stage"] for _, labels, _ in found} == {"toy"}
    phases = {labels["phase"] for name, labels, _ in found if name.endswith("phase_seconds")}
    assert phases >= {"data", "forward", "backward"}
