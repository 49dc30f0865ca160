"""What the item graphs need: all ranks share the items, those counted in histories and those compared."""

from __future__ import annotations

from qbrec.config import RootConfig
from qbrec.neighbours.alike import EXACT_ITEMS
from qbrec.plan.disk import graph_bytes, view_widths
from qbrec.plan.memory import FLOAT, RankMemory
from qbrec.plan.scenario import Resolved, Scenario
from qbrec.plan.stages import INT64, StagePlan
from qbrec.ranking.cooccurrence import CHUNK_PAIRS
from qbrec.ranking.counted import COUNTED

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
    # As they are read, and their training parts.
    memory.host.during(
        "counting", "histories of all users", 2 * INT64 * scenario.users * scenario.interactions
    )
    # Place, item and user of each, found and then sorted.
    own = scenario.users * scenario.train_interactions / scenario.world
    memory.host.during("counting", "occurrences of items", 4 * INT64 * own)
    # Item, other item and weight: as found, in one piece, and added up.
    reach = max(min(counting.window, scenario.train_interactions) for counting, _ in COUNTED.values())
    memory.host.during("counting", "pairs counted at once", 3 * 24 * min(2 * reach * own, CHUNK_PAIRS))
    # On rank 0, gathered and as they are written.
    arrows = len(COUNTED) * items * config.ranking.neighbours
    memory.host.during("counting", "arrows counted, at most", 2 * 8 * arrows)
    disk = {"item graphs, at most": graph_bytes(config, scenario)}
    compared = items if items <= EXACT_ITEMS else items / resolved.levels[0]
    flops = sum(2.0 * items * compared * width for width in widths) / scenario.world if alike else 0.0
    hours = flops / (scenario.peak("float32") * scenario.mfu) / 3600
    return StagePlan("neighbours", memory, disk, hours=hours)
