"""What the item graphs need: pairs counted on rank 0, neighbours by content found by all ranks."""

from __future__ import annotations

from qbrec.config import RootConfig
from qbrec.neighbours.alike import EXACT_ITEMS
from qbrec.plan.disk import graph_bytes, view_widths
from qbrec.plan.memory import FLOAT, RankMemory
from qbrec.plan.scenario import Resolved, Scenario
from qbrec.plan.stages import INT64, StagePlan
from qbrec.ranking.cooccurrence import FOLLOWS, TOGETHER

_HALF = 2


def neighbours_plan(config: RootConfig, scenario: Scenario, resolved: Resolved) -> StagePlan:
    """The stage `neighbours`."""
    items, alike = scenario.items, config.ranking.alike
    widths = view_widths(config, scenario)
    memory = RankMemory.start(on_gpu=scenario.gpu is not None)
    if alike:
        memory.device.during("likeness", "vectors", FLOAT * items * max(widths))
        memory.host.during("likeness", "vectors as stored", 2 * _HALF * items * max(widths))
        memory.host.during("likeness", "neighbours found", 3 * len(widths) * items * alike * (FLOAT + INT64))
    memory.host.during(
        "counting", "histories of all users", 2 * INT64 * scenario.users * scenario.interactions
    )
    # While pairs are added up: the sum so far, the new part and their sum, 8 + 8 bytes an entry.
    reach = max(min(c.window, scenario.train_interactions) for c in (FOLLOWS, TOGETHER))
    pairs = min(2 * reach * scenario.users * scenario.train_interactions, float(items) ** 2)
    memory.host.during("counting", "pairs counted, at most", 3 * 16 * pairs)
    disk = {"item graphs, at most": graph_bytes(config, scenario)}
    compared = items if items <= EXACT_ITEMS else items / resolved.levels[0]
    flops = sum(2.0 * items * compared * width for width in widths) / scenario.world if alike else 0.0
    hours = flops / (scenario.peak("float32") * scenario.mfu) / 3600
    return StagePlan("neighbours", memory, disk, hours=hours)
