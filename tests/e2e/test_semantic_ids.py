"""The semantic IDs of a whole run against the taxonomy that the synthetic shop was made from."""

from __future__ import annotations

import numpy as np

from qbrec.storage.artifact import ArtifactStore
from qbrec.storage.catalog_view import CatalogView
from tests.support.cli import Road
from tests.support.taxonomy import recovered


def test_level_0_recovers_the_taxonomy(road: Road) -> None:
    store = ArtifactStore(road.storage)
    quantizer, catalog = (
        store.open(road.artifact("quantizer")),
        CatalogView(store.open(road.artifact("catalog"))),
    )
    ids = quantizer.load_npy("semantic_ids.npy")
    labels, categories = quantizer.load_json("labels.json"), catalog.categories(np.arange(len(ids)))
    found = recovered(ids, labels, categories)
    print(found)
    # Four short epochs on 400 items: a full run (3,000 items, `launch/quickstart.sh`) comes to .75.
    assert found.top > 0.4
    assert found.top > found.chance + 0.2
    assert found.named > 0.5
