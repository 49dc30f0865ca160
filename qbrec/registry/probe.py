"""Real histories that a version carries, so that its latency is measured on what people really did.

They are contexts of the hold-out, as item ids: what a test user had before the item that was sought. No id
of a user is among them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from qbrec.ranking.validate import contexts_and_targets, test_users
from qbrec.storage.artifact import Artifact, ArtifactWriter, artifact_key
from qbrec.storage.blocks import RaggedField
from qbrec.storage.catalog_view import CatalogView, Histories

PROBE = "probe"  # the part of the bundle
HISTORIES = "histories.json"
_RAGGED = (RaggedField("row", offsets="offset"), RaggedField("time", offsets="offset"))


def write_probe(folder: Path, catalog: Artifact, *, count: int) -> Artifact | None:
    """Write the part of a bundle that holds histories.

    Users are numbered in the order of a hash, so that the first ones are a sample of all.

    Args:
        folder: Of the part; it does not exist yet.
        catalog: With the histories; those of its target domain are taken.
        count: How many at most.

    Returns:
        None where nobody has a test item, or none is wanted.
    """
    domain = str(catalog.meta["target_domain"])
    found = _contexts(CatalogView(catalog), domain, count)
    if not found:
        return None
    key = artifact_key(PROBE, config={"count": count}, seed=0, inputs={"catalog": catalog.fingerprint})
    writer = ArtifactWriter(folder, kind=PROBE, key=key)
    writer.prepare()
    writer.save_json(HISTORIES, found)
    inputs = {"catalog": catalog.fingerprint}
    return writer.commit(meta={"num_histories": len(found)}, inputs=inputs, config={"count": count}, seed=0)


def _contexts(view: CatalogView, domain: str, count: int) -> list[list[str]]:
    """Item ids of the first `count` test users' histories up to the item sought."""
    blocks, found = view.histories(), list[list[str]]()
    for block in range(blocks.num_blocks):
        if len(found) >= count:
            break
        samples = np.arange(blocks.starts[block], blocks.starts[block + 1])
        read: dict[str, Any] = blocks.take(samples, ["user", "domain", "cut", *_RAGGED])
        some = Histories(read["user"], read["domain"], read["row"], read["time"], read["cut"])
        users = test_users(some)
        users = users[some.domain[users] == view.domain_number(domain)][: count - len(found)]
        contexts, _ = contexts_and_targets(some, users, part=1)
        found += [view.item_ids(contexts.row(i)) for i in range(len(contexts))]
    return found
