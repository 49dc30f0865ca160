"""Nodes of a real Ray cluster go and come; training goes on with the ranks there are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.ray_nodes import Nodes, ray_nodes
from tests.support.toy_driver import Driver, assert_same_training
from tests.support.toy_stage import change_drill, checkpoints, losses, write_order

pytestmark = [pytest.mark.slow, pytest.mark.ray]
EPOCHS = 40  # 200 steps; the pace is set so that they never all pass before a fault


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    write_order(folder, {"launcher": "inprocess"}, epochs=EPOCHS, checkpoint_every=50)
    with Driver(folder) as driver:
        driver.must_succeed()
    return folder


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    with ray_nodes(cpus=(1, 1)) as nodes:
        yield nodes


def elastic(folder: Path, nodes: Nodes) -> None:
    compute = {"launcher": "ray", "num_workers": [1, 2], "ray_address": nodes.address}
    compute |= {"resize_interval_s": 3.0, "timeout_s": 60}
    write_order(folder, compute, epochs=EPOCHS, checkpoint_every=3, seconds=0.5)


def test_a_lost_node_shrinks_the_workers_and_a_new_one_grows_them(
    nodes: Nodes, undisturbed: Path, tmp_path: Path
) -> None:
    elastic(tmp_path, nodes)
    with Driver(tmp_path) as driver:
        driver.wait_for_step(7, world=2)
        nodes.nodes[1].kill()
        driver.wait_for_step(7, world=1)
        nodes.add()
        grown = driver.wait_for_step(8, world=2, skip=len(losses(tmp_path)))
        change_drill(tmp_path, seconds=0.0)
        driver.must_succeed()
    taken = losses(tmp_path)
    worlds = [line["world"] for line in taken]
    changes = [world for i, world in enumerate(worlds) if i == 0 or world != worlds[i - 1]]
    assert changes == [2, 1, 2]
    # Steps after the last checkpoint are taken again, and no more than those.
    assert 200 < len(taken) + 1 <= 200 + 1 + 2 * 3
    assert grown["step"] < 200
    assert_same_training(tmp_path, undisturbed)


def test_a_node_that_announces_its_end_costs_no_step(nodes: Nodes, undisturbed: Path, tmp_path: Path) -> None:
    elastic(tmp_path, nodes)
    change_drill(tmp_path, checkpoint_every=1000)
    with Driver(tmp_path) as driver:
        driver.wait_for_step(7, world=2)
        assert not checkpoints(tmp_path)
        nodes.nodes[1].announce_end()
        first = driver.wait_for_step(8, world=1)
        assert first["step"] - 1 in checkpoints(tmp_path)  # written because the node was to go
        change_drill(tmp_path, seconds=0.0)
        driver.must_succeed()
    taken = losses(tmp_path)
    assert [line["step"] for line in taken] == list(range(1, 201))
    assert {line["world"] for line in taken if line["step"] < first["step"]} == {2}
    assert {line["world"] for line in taken if line["step"] >= first["step"]} == {1}
    assert_same_training(tmp_path, undisturbed)
