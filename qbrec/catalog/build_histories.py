"""Stage 0, histories: the driver's side. It holds a hash per item and totals, never the interactions."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qbrec.catalog import rejected
from qbrec.catalog.build_items import BuiltItems
from qbrec.catalog.contract import Domain
from qbrec.catalog.exchange import exchange, group_size, reduce
from qbrec.catalog.histories import INTERACTION_BYTES, HistoryJob, ReadJob, count_users
from qbrec.catalog.parts import block_size, join_parts, new_array
from qbrec.catalog.units import INTERACTION_UNIT_ROWS, cut_units
from qbrec.config.root import RootConfig
from qbrec.engine.context import StageContext
from qbrec.errors import DataError
from qbrec.storage.artifact import ArtifactWriter
from qbrec.storage.blocks import write_block_index

# Of one task that sorts a partition: it takes some 100 bytes for each, and more than these sort slower.
MAX_INTERACTIONS_PER_PARTITION = 1 << 22


def build_histories(
    ctx: StageContext, config: RootConfig, domains: list[Domain], writer: ArtifactWriter, items: BuiltItems
) -> tuple[dict[str, int], dict[str, Any]]:
    """Validate the interactions and store them as one history per user.

    Returns:
        Rows left out by reason, and facts for the manifest.

    Raises:
        DataError: Too many rows are bad, none is good, or nobody can be tested on.
    """
    import ray

    catalog, directory = config.catalog, writer.path
    names = tuple(domain.name for domain in domains)
    units = cut_units(domains, role="interactions", unit_rows=INTERACTION_UNIT_ROWS)
    total = sum(domain.interaction_rows for domain in domains)
    size = max(1, min(catalog.shard_bytes // INTERACTION_BYTES, MAX_INTERACTIONS_PER_PARTITION))
    partitions = -(-total // size)
    reference = ray.put(items.hashes)
    read = ReadJob(directory, domains, partitions, reference, items.refused)
    spans = [np.zeros((0, 3), np.int64)]
    with ctx.progress(len(units), "reading interactions") as progress:

        def add(summary: dict[str, Any]) -> None:
            progress.update(summary["units"])
            spans.append(summary["spans"])

        parts = exchange(
            units,
            read.split,
            partitions=2 * partitions,
            group=group_size(len(units), 2 * partitions),
            add=add,
        )
    reasons = rejected.settle(
        directory, role="interactions", domains=domains, max_fraction=catalog.max_rejected_fraction
    )
    num_users = list(reduce(parts[partitions:], count_users, release=False))
    first_user = np.concatenate([[0], np.cumsum(num_users)]).astype(np.int64)
    if first_user[-1] == 0:
        raise DataError(
            "not a single interaction is good",
            where=domains[0].interactions[0].path,
            fix="see rejected/interactions.parquet",
        )
    starts = _starts(np.concatenate(spans), len(domains), catalog.validation_fraction, catalog.test_fraction)
    block_bytes = block_size(catalog.block_bytes, total * INTERACTION_BYTES)
    job = HistoryJob(directory, catalog, first_user, starts, names, reference, block_bytes)
    both = [mine + users for mine, users in zip(parts[:partitions], parts[partitions:], strict=True)]
    del parts
    counts = new_array(directory, "train_counts", np.int64, len(items.hashes))
    records, kept, truncated = [], 0, 0
    tested = np.zeros(len(domains), np.int64)
    with ctx.progress(int(first_user[-1]), "writing histories") as progress:
        for partition, result in enumerate(reduce(both, job.write)):
            if result is None:
                continue
            counts[result["rows"]] += result["counts"]
            records.append(result["records"])
            kept += result["kept"]
            truncated += result["truncated"]
            tested += result["eval_users"]
            progress.update(num_users[partition])
    counts.flush()  # type: ignore[attr-defined]
    write_block_index(directory / "blocks.histories.npy", records)
    join_parts(directory, "users")
    target = config.data.target_domain
    eval_users = int(tested[names.index(target)])
    if not eval_users:
        raise DataError(
            f"no user of the target domain {target!r} has anything to be tested on",
            where=f"{domains[0].interactions[0].path}: split {catalog.split}",
            fix="bring users with three interactions at least, for global_time some of them late",
        )
    return reasons, {
        "num_users": int(first_user[-1]),
        "num_interactions": kept,
        "truncated_interactions": truncated,
        "eval_users": eval_users,
    }


def _starts(spans: NDArray[np.int64], num_domains: int, validation: float, test: float) -> NDArray[np.int64]:
    """For split global_time: when validation and test begin, by domain, int64 [domains, 2].

    Args:
        spans: Domain, first and last time of a unit, int64 [n, 3].
        num_domains: Number of domains.
        validation: Share of the time span for validation.
        test: Share of the time span for the test.
    """
    starts = np.zeros((num_domains, 2), np.int64)
    for number in np.unique(spans[:, 0]):
        mine = spans[spans[:, 0] == number]
        first, last = int(mine[:, 1].min()), int(mine[:, 2].max())
        for place, fraction in enumerate((validation + test, test)):
            starts[number, place] = last - int((last - first) * fraction)
    return starts
